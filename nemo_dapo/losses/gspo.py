"""GSPO (arXiv 2507.18071, Eq. 5 to 7): one ratio a response, the geometric mean of its tokens', clipped as a whole.

    J = 1/B sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i),   s_i = exp(1/|o_i| sum_t log ratio_t)

The paper's clip range is four orders narrower than a token's: 3e-4 and 4e-4.
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


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    segment: Tensor,
    lengths: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 5 without its normaliser, the number of responses. Per token [T]: log-probabilities, advantages, mask and
    `segment`, the response that it belongs to; `lengths` [S] are the responses' tokens. Sums count tokens: a clipped
    response counts as all of its own.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    share = torch.where(mask, 1.0 / lengths.clamp(min=1)[segment], 0.0)  # of its response that a token is
    mean = torch.zeros(lengths.shape, dtype=logprobs.dtype, device=logprobs.device)
    ratio = algorithm.bounded(mean.index_add(0, segment, share * log_ratio)).exp()[segment]
    advantages = torch.where(mask, advantages, 0.0)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    sums = {
        "clipped_high": ((advantages > 0) & (ratio > 1 + clip_high)).sum(),
        "clipped_low": ((advantages < 0) & (ratio < 1 - clip_low)).sum(),
        "ratio": torch.where(mask, ratio, 0.0).sum(),
        "approx_kl": algorithm.kl_penalty(torch.zeros_like(log_ratio), log_ratio, estimator="k3").sum(),
        "tokens": mask.sum(),
    }
    return -(share * objective).sum(), algorithm.detached(sums, logprobs.dtype)


def make_loss_fn(config: AlgorithmConfig) -> LossFn:
    """GSPO, plus, where their coefficients are not 0, each response's mean KL term and entropy bonus."""

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        old_logprobs = old_policy(logprobs, micro)
        advantages, shares = weighted_advantages(config, old_logprobs, micro)  # a mask of whole responses, if any
        loss, sums = gspo_loss(
            logprobs,
            old_logprobs,
            advantages,
            micro.mask,
            micro.segment,
            micro.response_lengths,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        weights = 1.0 / micro.response_lengths.clamp(min=1)[micro.segment]
        loss, sums = with_penalties(config, loss, sums | shares, logprobs, entropy, micro, weights)
        return loss, sums | {"denominator": micro.starts.sum()}

    return loss_fn
