"""Whether trainer and servers are a pair: the same weights give the same tokens the same log-probabilities on either side.

Judged by the newest tokens alone (`TrainBatch.newest`): what older weights sampled differs by what was learned since.
"""

from __future__ import annotations

import logging

import torch.distributed as dist
from torch import Tensor

from nemo_dapo.coordination import found_alike, is_true_anywhere
from nemo_dapo.telemetry.metrics import Mean, merge_across_ranks
from nemo_dapo.types import TrainBatch

log = logging.getLogger(__name__)


class Parity:
    """Judges a pair by its first batch that has newest tokens, before it is trained on, and looks at every later step.

    `limit` is rollout.max_logprob_gap in nats; `group` is gloo over all ranks.
    """

    def __init__(self, limit: float, group: dist.ProcessGroup | None) -> None:
        self.limit, self.group = limit, group
        self.is_judged = False
        self._is_apart = False  # by the last step's figure

    def can_judge(self, batch: TrainBatch) -> bool:
        """Whether the pair is yet to be judged, and some rank holds newest tokens. Collective."""
        if self.is_judged:
            return False
        newest = batch.num_response_tokens if batch.newest is None else int(batch.newest.sum())
        return is_true_anywhere(newest > 0, self.group)

    def judge(self, batch: TrainBatch, logprobs: Tensor) -> None:
        """Compare the trainer's `logprobs` [T] with the servers': a broken pair is refused. Collective.

        Raises RuntimeError, on every rank, when their mean absolute difference exceeds the limit.
        """
        gap = self._gap(batch, logprobs)
        if not gap <= self.limit:  # NaN too
            error = RuntimeError(
                f"trainer and vLLM disagree on the log-probabilities of the same tokens by {gap:.2g} nats on average, "
                f"expected at most rollout.max_logprob_gap={self.limit}: training on this pair would follow noise. Compare "
                "the precision of both (model.precision, the server log; FP8 on one side alone), try "
                "rollout.vllm.enforce_eager=true, or raise the limit, as a mixture of experts may need: each side routes "
                "some tokens otherwise"
            )
            raise found_alike(error)
        self.is_judged = True

    def _gap(self, batch: TrainBatch, logprobs: Tensor) -> float:
        """Mean absolute difference over all ranks' newest tokens."""
        apart = (logprobs - batch.rollout_logprobs).abs()
        tokens = int((batch.held_lengths - batch.prompt_lengths).clamp(min=0).sum())
        if batch.newest is not None:
            apart, tokens = apart[batch.newest], int(batch.newest.sum())
        # Each replica is counted as often as it has ranks, numerator and denominator alike.
        return merge_across_ranks({"gap": Mean(float(apart.sum()), tokens)}, self.group)["gap"].value

    def report(self, record: dict[str, float]) -> None:
        """What a step's updates found on its newest tokens gets the rollout's name; one warning where it is too large."""
        if "train/gap_newest" not in record:
            return  # older ones alone
        gap = record.pop("train/gap_newest")
        record |= {"rollout/logprob_gap": gap, "rollout/logprob_gap_max": record.pop("train/gap_newest_max")}
        was_apart, self._is_apart = self._is_apart, not gap <= self.limit  # NaN too
        if self._is_apart and not was_apart:
            log.warning(
                "trainer and vLLM differ by %.2g nats a token, above rollout.max_logprob_gap=%g: see "
                "rollout/logprob_gap in metrics.jsonl; algorithm.importance_cap=2 corrects for it",
                *(gap, self.limit),
            )
