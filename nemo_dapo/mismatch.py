"""How far the trainer's log-probabilities are from the rollout engine's on the tokens of an update, whatever the loss.

Tokens that older weights sampled differ by what was learned since as well: the pair is judged by the newest ones alone.
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

SUMS = ("gap", "gap_kl", "weight", "weight_squared", "tokens", "gap_newest", "tokens_newest")
LARGEST = ("gap_max", "gap_newest_max")
# What they are called of the newest weights' tokens.
NEWEST = {"gap": "gap_newest", "tokens": "tokens_newest", "gap_max": "gap_newest_max"}

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
        newest = found
        if micro.newest is not None:
            gap = algorithm.absolute_gap(old_logprobs - micro.rollout_logprobs, micro.newest)
            newest = algorithm.detached(gap, old_logprobs.dtype)
        found |= {NEWEST[name]: newest[name] for name in NEWEST}
        sums, largest = (torch.stack([found[name] for name in names]) for names in (SUMS, LARGEST))
        self._seen.append((sums, largest))

    def metrics(self, reduce: Reduce, *, counts: bool) -> dict[str, Metric]:
        """Over all ranks' tokens; a rank that repeats another's `counts` nothing. Collective.

        `gap` and `gap_max` are |difference| in nats, `gap_kl` estimates KL(rollout || trainer) a token (k3).
        `gap_newest` and `gap_newest_max` are of the newest tokens alone, absent where there are none.
        """
        seen = self._seen if counts else []
        sums = sum((s.double().cpu() for s, _ in seen), torch.zeros(len(SUMS), dtype=torch.float64))
        largest = torch.stack([torch.zeros(len(LARGEST)), *(x.float().cpu() for _, x in seen)]).amax(0)
        total = dict(zip(SUMS, reduce(sums, dist.ReduceOp.SUM).tolist(), strict=True))
        most = dict(zip(LARGEST, reduce(largest, dist.ReduceOp.MAX).tolist(), strict=True))
        tokens, newest = total["tokens"], total["tokens_newest"]
        found: dict[str, Metric] = {
            "gap": Mean(total["gap"], tokens),
            "gap_kl": Mean(total["gap_kl"], tokens),
            "gap_max": Max(most["gap_max"]),
            "effective_sample_size": EffectiveShare(total["weight"], total["weight_squared"], tokens),
        }
        if newest:
            found |= {"gap_newest": Mean(total["gap_newest"], newest), "gap_newest_max": Max(most["gap_newest_max"])}
        return found
