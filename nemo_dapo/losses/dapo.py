"""DAPO (arXiv 2503.14476, Eq. 8): every response token weighs the same."""

from __future__ import annotations

from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig
from nemo_dapo.interfaces import LossFn
from nemo_dapo.losses.importance import weighted_advantages
from nemo_dapo.losses.terms import old_policy, with_penalties


def make_loss_fn(config: AlgorithmConfig) -> LossFn:
    """Eq. 8 without its normaliser, plus, where their coefficients are not 0, the KL term and the entropy bonus."""

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        old_logprobs = old_policy(logprobs, micro)
        advantages, shares = weighted_advantages(config, old_logprobs, micro)
        loss, sums = algorithm.dapo_loss(
            logprobs,
            old_logprobs,
            advantages,
            micro.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        return with_penalties(config, loss, sums | shares, logprobs, entropy, micro)

    return loss_fn
