"""Dr. GRPO (arXiv 2503.20783, section 3.2): neither a response's length nor a group's spread changes its weight.

    J = 1/B sum_i 1/L sum_t min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i),   A_i = R_i - mean(R)

L is a constant, in the authors' code the longest response allowed. Advantages without the standard deviation are
`algorithm.normalize_std=false`.
"""

from __future__ import annotations

from torch import Tensor

from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig
from nemo_dapo.interfaces import LossFn
from nemo_dapo.losses import dapo


def make_loss_fn(config: AlgorithmConfig) -> LossFn:
    """DAPO's sum over tokens, divided by `loss_length` times the number of responses instead of by their tokens."""
    token_loss = dapo.make_loss_fn(config)

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = token_loss(logprobs, entropy, micro)
        return loss, sums | {"denominator": config.loss_length * micro.starts.sum()}

    return loss_fn
