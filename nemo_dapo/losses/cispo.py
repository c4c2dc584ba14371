"""CISPO (MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5): clips the importance weight, so that no token loses its gradient.

    J = 1/sum|o_i| sum_i sum_t sg(clip(ratio_t, 1 - clip_low, 1 + clip_high)) A_i log pi(o_t)

The paper leaves the lower bound out (`clip_low=1`) and tunes the upper one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig
from nemo_dapo.interfaces import LossFn
from nemo_dapo.losses.importance import weighted_advantages
from nemo_dapo.losses.terms import old_policy, with_penalties


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4 without its normaliser; inputs [T] and sums as those of `algorithm.dapo_loss`, `clipped_*` for either sign."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = algorithm.bounded(log_ratio).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = weight * advantages * torch.where(mask, logprobs, 0.0)
    sums = {
        "clipped_high": (ratio > 1 + clip_high).sum(),
        "clipped_low": (ratio < 1 - clip_low).sum(),
        "ratio": torch.where(mask, ratio, 0.0).sum(),
        "approx_kl": algorithm.kl_penalty(torch.zeros_like(log_ratio), log_ratio, estimator="k3").sum(),
        "tokens": mask.sum(),
    }
    return -objective.sum(), algorithm.detached(sums, logprobs.dtype)


def make_loss_fn(config: AlgorithmConfig) -> LossFn:
    """CISPO, plus, where their coefficients are not 0, the KL term and the entropy bonus."""

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        old_logprobs = old_policy(logprobs, micro)
        advantages, shares = weighted_advantages(config, old_logprobs, micro)
        loss, sums = cispo_loss(
            logprobs, old_logprobs, advantages, micro.mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        return with_penalties(config, loss, sums | shares, logprobs, entropy, micro)

    return loss_fn
