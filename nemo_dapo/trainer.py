"""The training loop: Algorithm 1 of the DAPO paper (arXiv 2503.14476), line by line.

Every rank runs `fit`; rank 0 also holds the controller, which samples, and shares each step's batch out. Departures from
the paper's text: prompts are sampled one group at a time instead of in batches (the servers stay full), and the importance
ratio's denominator is recomputed by the trainer, because vLLM's own log-probabilities differ by its kernels' rounding.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_dapo import checkpoint, hf_folder, origin
from nemo_dapo.batching import minibatches
from nemo_dapo.collectives import gather_json
from nemo_dapo.config import Resume, RunConfig, Transport
from nemo_dapo.controller import Controller
from nemo_dapo.coordination import (
    StoppedError,
    found_alike,
    found_by_all,
    is_true_anywhere,
    lead,
    never,
    share_batch,
)
from nemo_dapo.interfaces import NonFiniteGradientError, Policy, RolloutEngine
from nemo_dapo.losses import load_loss_fn
from nemo_dapo.parity import Parity
from nemo_dapo.phase import Phase
from nemo_dapo.rollout.command import DTYPES
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.weights.direct import Direct, gpu_uuid
from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan, require_accepted
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.saves import Saves
from nemo_dapo.stages import Stages
from nemo_dapo.telemetry.memory import memory_record
from nemo_dapo.telemetry.metrics import Last, Mean, Metric, Sum, merge, merge_across_ranks, values
from nemo_dapo.types import Stage, TrainBatch

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What the run counts; prompts are counted by the sampler. Learning-rate schedules follow `optimizer_steps`."""

    rollout_steps: int = 0
    optimizer_steps: int = 0
    refused_updates: int = 0
    refused_in_a_row: int = 0


def find_checkpoint(config: RunConfig, run_dir: Path, group: Any) -> int | None:
    """Step of the checkpoint that the run goes on from, the same on every rank: the newest whole one. Collective.

    None where there is none, or with checkpoint.resume=never, which sets those of an earlier run aside. Raises what
    `checkpoint.choose` does.
    """
    checkpoints = run_dir / "checkpoints"
    if config.checkpoint.resume is Resume.auto:
        return checkpoint.choose(checkpoints, group)
    if dist.get_rank() == 0 and (place := checkpoint.set_aside(checkpoints)):
        print(f"checkpoint.resume=never: the checkpoints of an earlier run are now in {place}", flush=True)
    return None


class DAPOTrainer:
    """Trains `policy` on what `controller` samples. `controller` is None on every rank but 0; `group` is gloo over all."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        policy: Policy,
        controller: Controller | None,
        group: Any,
        *,
        resumed: int | None = None,
        phase: Phase | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """`resumed` is the step of the checkpoint to go on from, by `find_checkpoint`. `stop`, rank 0's, when set, has the
        run save and end: after the step that it is in, or at once in a rollout."""
        self.phase, self.stop = phase or Phase(), stop or threading.Event()
        self.resumed = resumed
        self.config, self.policy, self.controller, self.group = config, policy, controller, group
        self.stages = Stages(policy, controller.engine if controller else None)
        self.replicas: list[int] = gather_json(policy.replica, group)  # each rank's
        is_direct = config.rollout.transport is Transport.device and not config.rollout.replay
        mine = [node_name(), gpu_uuid() if is_direct else ""]
        self.seats = [Seat(*one) for one in gather_json(mine, group)]
        direct = Direct.on_gpu(self.seats, config.rollout.sync_timeout) if is_direct else None
        self.sender = Sender(lambda: hf_folder.expected_weights(Path(config.model.path)), direct=direct)
        self.checkpoints = run_dir / "checkpoints"
        self.saves = Saves(config, self.checkpoints, group, last=resumed or 0)
        self.loss_fn = load_loss_fn(config.algorithm)
        self.progress = Progress()
        self.parity = Parity(config.rollout.max_logprob_gap, group)
        self.record: dict[str, Metric] = {}

    def fit(self) -> None:
        """Algorithm 1. Raises what stops a run: a broken trainer/vLLM pair, repeated non-finite gradients, dead servers."""
        self.resume()
        self.sync_weights()
        if self.config.evaluation.at_start and self.progress.rollout_steps == 0:
            self.evaluate()
            self.log()
        self.record = {}
        while self.progress.rollout_steps < self.config.trainer.max_steps:  # line 1
            try:
                self.step()
            except StoppedError:
                return
            self.evaluate_when_due()
            self.log()  # before the checkpoint: a kill between the two must not cost the step's record
            self.save_when_due()

    # ---------------------------------------------------------------- one step

    def step(self) -> None:
        """Lines 2 to 11. Raises StoppedError, on every rank, where one was asked to stop before the rollout is there."""
        self.phase.step = self.progress.rollout_steps + 1
        with self.timed("step"):
            batch, uids = self.collect_or_save()  # lines 2 and 4 to 9
            old_logprobs = self.old_logprobs(batch)  # line 3
            for chosen in self.minibatches(batch.num_sequences):  # line 10
                self.update(batch, chosen, old_logprobs, uids)  # line 11
            self.progress.rollout_steps += 1
            self.sync_weights()

    def minibatches(self, num_sequences: int) -> list[Tensor]:
        """The sequences of each optimizer step."""
        return minibatches(num_sequences, self.config.algorithm.minibatch_size, self.config.algorithm.group_size)

    def collect_or_save(self) -> tuple[TrainBatch, list[str]]:
        """`collect`; where the run is to stop first, what the step began with is saved: its prompts are to come again."""
        state = self.state()  # no longer than the rollout: it holds every group of the window
        try:
            if is_true_anywhere(self.stop.is_set(), self.group):
                raise StoppedError
            return self.collect()
        except StoppedError:
            self.finish_save(waits=True)
            if self.saves.last != self.progress.rollout_steps:
                self.save(state)
            raise

    def collect(self) -> tuple[TrainBatch, list[str]]:
        """This rank's part of the batch; on rank 0 also the uids of its prompts, which is all that the step still needs."""
        controller, step = self.controller, self.progress.rollout_steps + 1
        with self.phase.enter("rollout"):
            rollout = lead(lambda: controller.collect(step) if controller else never(), self.group, self.stop)
            if rollout is not None:
                self.record |= {name: Last(value) for name, value in rollout.metrics.items()}
            batch = share_batch(rollout.batch if rollout else None, self.group, self.replicas, self.owners)
            self.stages.enter(Stage.score)
            return batch, [group.prompt.uid for group in rollout.groups] if rollout else []

    def owners(self, lengths: Tensor) -> Tensor:
        """[B] int64: the replica that trains on each sequence."""
        return self.policy.owners(lengths, self.minibatches(lengths.numel()))

    def old_logprobs(self, batch: TrainBatch) -> tuple[Tensor | None, Tensor | None]:
        """[T] under theta_old, by the trainer, and under the reference model: each None where the loss needs none."""
        if not batch.num_sequences:
            return None, None
        minibatches = self.minibatches(batch.num_sequences)
        judges = self.parity.can_judge(batch)
        with self.timed("logprobs"):
            old = reference = None
            if scored := self.scored_before_updates(batch, minibatches, judges):
                old = self.policy.logprobs(batch, scored)
            if judges and old is not None:
                self.parity.judge(batch, old)
            if self.config.algorithm.kl_coeff:
                reference = self.policy.reference_logprobs(batch, minibatches)
        return old, reference

    def scored_before_updates(self, batch: TrainBatch, minibatches: list[Tensor], judges: bool) -> list[Tensor]:
        """Those whose log-probabilities theta_old must give in advance: all but the first, whose update scores them itself.

        All of them where the batch `judges` the pair, or where that pass records the routes that updates are to follow.
        """
        records_routes = self.config.model.replay_routes and batch.routes is None
        return minibatches if records_routes or judges else minibatches[1:]

    def update(
        self, batch: TrainBatch, chosen: Tensor, logprobs: tuple[Tensor | None, Tensor | None], uids: list[str]
    ) -> None:
        """One optimizer step on the sequences `chosen`; a non-finite gradient is refused, reported and counted."""
        if not int((batch.lengths - batch.prompt_lengths)[chosen].sum()):
            return  # all of it was filtered: there is no gradient, and the optimizer must not move by its momentum
        tokens = batch.token_indices(chosen)
        old, reference = (None if values is None else values[tokens] for values in logprobs)
        if int(chosen[0]) == 0:
            old = None  # the first update of the step: theta is theta_old
        try:
            with self.timed("update"):
                self.stages.enter(Stage.train)
                metrics = self.policy.update(batch.select(chosen), self.loss_fn, old, reference)
        except NonFiniteGradientError as error:
            self.refuse(error, chosen, uids)
            return
        self.progress.optimizer_steps += 1
        self.progress.refused_in_a_row = 0
        for name, metric in metrics.items():
            self.add(f"train/{name}", metric)

    def refuse(self, error: NonFiniteGradientError, chosen: Tensor, uids: list[str]) -> None:
        """Count a refused update and name its prompts; re-raise after optimizer.max_refused_updates in a row."""
        self.progress.refused_updates += 1
        self.progress.refused_in_a_row += 1
        if self.controller is not None:
            group_size = self.config.algorithm.group_size
            named = {uids[int(chosen[i]) // group_size] for i in error.sequences}
            log.error(
                "update refused in step %d (%d in a row, optimizer.max_refused_updates=%d end the run): %s; prompts %s",
                *(self.phase.step, self.progress.refused_in_a_row, self.config.optimizer.max_refused_updates),
                *(error, sorted(named) or "unknown"),
            )
        if self.progress.refused_in_a_row >= self.config.optimizer.max_refused_updates:
            raise found_alike(error)

    def sync_weights(self) -> None:
        """Give vLLM the new weights, under the rollout step as their version. Every rank takes part in the export.

        What goes to devices nobody keeps: where the servers died of it, those that were started anew are sent it again,
        which their fleet bounds.
        """
        with self.timed("sync"):
            self.send_weights()
            while self.sender.direct and is_true_anywhere(bool(self.engine and self.engine.must_repeat), self.group):
                self.stages.enter(Stage.score)  # servers sleep: from here the order is the usual one
                self.send_weights()

    def send_weights(self) -> None:
        engine = self.engine
        self.stages.enter(Stage.sync)
        if self.sender.direct and not self.sender.has_looked:
            with found_by_all():
                self.sender.look(self.policy.export_weights(), DTYPES[self.config.model.precision])
        plan = self.share_plan(engine.begin_update(self.progress.rollout_steps, self.seats) if engine else None)
        sent = self.sender.send(self.policy.export_weights(), plan, dist.get_rank())
        everyone = [Sent.of_json(one) for one in gather_json(sent.as_json(), self.group)]
        with found_by_all():
            require_accepted(everyone)
        if engine is not None:
            engine.finish_update(everyone)
        self.stages.enter(Stage.generate)

    @property
    def engine(self) -> RolloutEngine | None:
        """On rank 0."""
        return None if self.controller is None else self.controller.engine

    def share_plan(self, plan: UpdatePlan | None) -> UpdatePlan:
        """Rank 0's, on every rank."""
        return UpdatePlan.of_json(gather_json(plan and plan.as_json(), self.group)[0])

    # ---------------------------------------------------------------- beside the algorithm

    def evaluate_when_due(self) -> None:
        every, step = self.config.evaluation.every, self.progress.rollout_steps
        if every and (step % every == 0 or step == self.config.trainer.max_steps):
            self.evaluate()

    def evaluate(self) -> None:
        controller, step = self.controller, self.progress.rollout_steps
        if self.stages.now is not Stage.generate:
            self.sync_weights()
        try:
            with self.timed("eval"):
                result = lead(lambda: controller.evaluate(step) if controller else never(), self.group, self.stop)
        except StoppedError:  # the step itself is done: it is recorded and saved
            return
        if result is not None:
            self.record |= {f"eval/{name}": Last(value) for name, value in result.metrics().items()}
            accuracies = [one.avg.value for one in result.sets.values()]
            self.add("eval/accuracy", Mean(sum(accuracies), len(accuracies)))

    def save_when_due(self) -> None:
        step = self.progress.rollout_steps
        due = self.saves.is_due(step)
        self.finish_save(waits=due)
        if due:
            self.save(self.state(), behind=self.config.checkpoint.asynchronous and not self.saves.is_last(step))

    def state(self) -> dict[str, Any] | None:
        """What changes from step to step beside the policy, on rank 0."""
        return None if self.controller is None else self.controller.state_dict() | {"progress": asdict(self.progress)}

    def origin(self) -> dict[str, Any]:
        """What a resume compares: the model that the run started from, and options."""
        model = self.config.model
        return {
            "model": self.model,
            "precision": model.precision.value,
            "adapters": origin.adapters(model.lora),
            "optimizer": self.optimizer_options(),
        }

    def optimizer_options(self) -> dict[str, Any]:
        options: dict[str, Any] = json.loads(json.dumps(asdict(self.config.optimizer), default=lambda one: one.value))
        return options

    @functools.cached_property
    def model(self) -> dict[str, Any]:
        """Of the folder that the run started from."""
        return hf_folder.fingerprint(Path(self.config.model.path))

    def save(self, state: dict[str, Any] | None, *, behind: bool = False) -> None:
        """Write a checkpoint, or begin to: one that is written `behind` the training is completed by `finish_save`.

        The training's seconds of it are in the next step's record. Raises what Saves does.
        """
        if self.controller is not None:
            self.controller.export_statistics()
            state = (state or {}) | self.origin()
        with self.timed("save"):
            (self.saves.begin if behind else self.saves.save)(self.progress.rollout_steps, self.policy, state)

    def finish_save(self, *, waits: bool) -> None:
        """Complete the checkpoint that is written behind the training, if it is written or `waits`."""
        if self.saves.writing is not None:
            with self.timed("save"):
                self.saves.finish(waits=waits)

    def resume(self) -> None:
        """Go on from the checkpoint of step `resumed`.

        One of weights alone is where a run begins. Raises ValueError, before anything of the policy is read, where it is of
        another model or other data. Options of the optimizer may have changed: this run's are used, and said.
        """
        if self.resumed is None:
            return
        with self.phase.enter("load"):
            # Rank 0 alone goes on with the window: a gigabyte, which each rank of a host would hold beside the others'.
            read = checkpoint.read_state if self.controller else checkpoint.read_state_without_window
            state = read(self.checkpoints, self.resumed)
            lead(lambda: self.restore_controller(state) if self.controller else never(), self.group)
            checkpoint.load(self.checkpoints, self.resumed, self.policy)
        self.progress = Progress(**state.get("progress", {}))
        if self.controller is not None and checkpoint.has_weights_alone(state):
            print(f"begun with the weights of {self.checkpoints}; all else is at its beginning", flush=True)
        elif self.controller is not None:
            print(f"resumed from {self.checkpoints} at {self.progress}", flush=True)

    async def restore_controller(self, state: dict[str, Any]) -> None:
        """Rank 0's part of `resume`; raises ValueError for another model or other data."""
        assert self.controller is not None
        origin.require_same_model(state, self.config.model)
        if checkpoint.has_weights_alone(state):
            return
        self.controller.load_state_dict(state)
        before = state["optimizer"]
        now = self.optimizer_options()
        changed = [f"optimizer.{k} {before.get(k)} -> {value}" for k, value in now.items() if before.get(k) != value]
        if changed:
            print(f"other options than the checkpoint's, used from here on: {', '.join(changed)}", flush=True)

    def log(self) -> None:
        """The step's record to the sinks, after a word with every rank: memory is the most that any of them holds."""
        memory = merge_across_ranks(memory_record() | self.policy.memory_record(), self.group)
        record, self.record = values(self.record | memory), {}
        if self.controller is None:
            return
        self.parity.report(record)
        counters = {f"progress/{name}": float(value) for name, value in asdict(self.progress).items()}
        self.controller.record(self.progress.rollout_steps, record | counters)

    def add(self, name: str, metric: Metric) -> None:
        """Merge `metric` into the step's record, by its type."""
        self.record = merge([self.record, {name: metric}])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds inside are added to `time/<name>` of the step's record; the name is this rank's phase meanwhile."""
        start = time.monotonic()
        with self.phase.enter(name):
            yield
        self.add(f"time/{name}", Sum(time.monotonic() - start))
