"""What the losses share: the old policy, the KL term, the entropy bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig


def old_policy(logprobs: Tensor, micro: MicroBatch) -> Tensor:
    """Log-probabilities under theta_old; on the first update of a step that is theta: the ratio is 1 and only its
    gradient matters."""
    return logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs


def with_penalties(
    config: AlgorithmConfig,
    loss: Tensor,
    sums: dict[str, Tensor],
    logprobs: Tensor,
    entropy: Tensor | None,
    micro: MicroBatch,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` plus, where their coefficients are not 0, the KL term and the entropy bonus; their sums beside the others.

    `weights` [T] is what a token counts for in the loss (None: 1), and so in both terms; metrics count tokens alike.
    """
    assert entropy is not None
    mask, weight = micro.mask, 1.0 if weights is None else weights
    entropy = torch.where(mask, entropy, 0.0)
    sums["entropy"] = entropy.detach().sum()
    if config.entropy_coeff:
        loss = loss - config.entropy_coeff * (weight * entropy).sum()
    if config.kl_coeff:
        assert micro.ref_logprobs is not None
        kl = algorithm.kl_penalty(
            torch.where(mask, logprobs, 0.0),
            torch.where(mask, micro.ref_logprobs, 0.0),
            estimator=config.kl_estimator.value,
        )
        sums["kl"] = kl.detach().sum()
        loss = loss + config.kl_coeff * (weight * kl).sum()
    return loss, sums
