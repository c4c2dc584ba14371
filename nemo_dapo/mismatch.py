"""How far the trainer's log-probabilities are from the rollout engine's on the tokens of an update, whatever the loss.

Weights are p_trainer / p_rollout of single tokens, before any correction cuts them: their effective sample size says how
much of the batch a full correction would leave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch
from nemo_dapo.telemetry.metrics import EffectiveShare, Max, Mean, Metric

SUMS = ("gap", "gap_kl", "weight", "weight_squared", "tokens")

Reduce = Callable[[Tensor, dist.ReduceOp.RedOpType], Tensor]
"""The tensor over all ranks."""


class Mismatch:
    """Sums over the micro-batches seen since `clear`, on the host."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []

    def see(self, old_logprobs: Tensor, micro: MicroBatch) -> None:
        """One micro-batch, whose tokens scored `old_logprobs` [T] under the policy before the step."""
        found = algorithm.logprob_gap(old_logprobs, micro.rollout_logprobs, micro.mask)
        self._seen.append((torch.stack([found[name] for name in SUMS]), found["gap_max"]))

    def metrics(self, reduce: Reduce, *, counts: bool) -> dict[str, Metric]:
        """Over all ranks' tokens; a rank that repeats another's `counts` nothing. Collective.

        `gap` and `gap_max` are |difference| in nats, `gap_kl` estimates KL(rollout || trainer) a token (k3).
        """
        seen = self._seen if counts else []
        sums = sum((s.double().cpu() for s, _ in seen), torch.zeros(len(SUMS), dtype=torch.float64))
        largest = torch.stack([torch.zeros(()), *(x.float().cpu() for _, x in seen)]).max()
        total = dict(zip(SUMS, reduce(sums, dist.ReduceOp.SUM).tolist(), strict=True))
        tokens = total["tokens"]
        return {
            "gap": Mean(total["gap"], tokens),
            "gap_kl": Mean(total["gap_kl"], tokens),
            "gap_max": Max(float(reduce(largest, dist.ReduceOp.MAX))),
            "effective_sample_size": EffectiveShare(total["weight"], total["weight_squared"], tokens),
        }
