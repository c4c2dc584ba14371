"""The four stages of a step, in the one order in which trainer and servers can share GPUs.

    score     parameters                      -> log-probabilities
    train     + gradients, optimizer states   -> updates
    sync      parameters | servers' weights   -> transfer
    generate             | + servers' cache   -> rollout, evaluation

Left of the bar is what the trainer holds, right of it what the servers do, which sleep in the first two. Where they share
no GPU nothing moves, and the order is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from nemo_dapo.interfaces import Policy, RolloutEngine
from nemo_dapo.ledger import Read, ServerMemory, read_device
from nemo_dapo.types import Stage

# What may follow each. A step without updates goes from score to sync: servers that slept have lost their weights.
NEXT: dict[Stage, Sequence[Stage]] = {
    Stage.score: (Stage.train, Stage.sync),
    Stage.train: (Stage.score, Stage.sync),
    Stage.sync: (Stage.generate,),
    Stage.generate: (Stage.score,),
}


def check_order(now: Stage, then: Stage) -> None:
    """Raises RuntimeError when `then` cannot follow `now`."""
    if then not in NEXT[now]:
        possible = " or ".join(stage.value for stage in NEXT[now])
        raise RuntimeError(f"stage {then.value} cannot follow {now.value}, only {possible} can")


def put_to_sleep(
    engine: RolloutEngine | None, weights: int, group: dist.ProcessGroup | None, read: Read = read_device
) -> ServerMemory:
    """Have fresh servers asleep, before a policy is built on their GPUs; what they will take of this rank's when they wake.

    `weights` is the bytes of the model on each of a server's GPUs. Collective; `engine` is None on every rank but 0.
    """
    awake = read()
    dist.barrier(group=group)  # every rank has looked
    if engine is not None:
        engine.sleep()
    dist.barrier(group=group)
    return ServerMemory.released(awake, read(), weights)


class Stages:
    """Moves policy and servers from stage to stage together; `engine` is None on every rank but 0. Collective."""

    def __init__(self, policy: Policy, engine: RolloutEngine | None) -> None:
        self.policy, self.engine = policy, engine

    @property
    def now(self) -> Stage:
        return self.policy.stage

    def enter(self, stage: Stage) -> None:
        """Go to `stage`; nothing where it is entered already.

        Servers sleep before the policy takes memory and wake after it gave some back. Raises RuntimeError for an order that
        cannot be, and what `Policy.enter` does.
        """
        before = self.policy.stage
        if stage is before:
            return
        check_order(before, stage)
        if self.engine is not None and before is Stage.generate:
            self.engine.sleep()
        self.policy.enter(stage)
        if self.engine is not None and stage is Stage.sync:
            self.engine.wake_weights()
        if self.engine is not None and stage is Stage.generate:
            self.engine.wake_up()
