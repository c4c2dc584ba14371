"""The importance correction: what a token's term of the loss weighs when another policy sampled it than theta_old.

The rollout engine computes with other kernels, and under a window of age m > 0 also with older weights. The objective is
decoupled (arXiv 2110.00641; AReaL, 2505.24298): the ratio theta / theta_old, theta_old scored by the trainer when the step
begins, is what is clipped; theta_old / rollout, one number a token that carries no gradient, is what weighs the term.
Three corrections that combine, each off by default:

    cap        weight min(ratio, cap): truncated importance sampling
    band       tokens whose ratio lies outside [low, high] are out; with cap = high that is IcePop (2510.18855)
    sequence   responses whose ratio, the product or the geometric mean of their tokens', does are out (Liu et al., "When
               Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch", 2025)

A token that is out still counts among those that divide the loss, as in IcePop: what is left weighs what it did before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig, SequenceRatio


def weighted_advantages(
    config: AlgorithmConfig, old_logprobs: Tensor, micro: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """[T] advantages times their weights, and sums: tokens whose weight was cut to the cap, and tokens that are out."""
    ratio = algorithm.bounded(torch.where(micro.mask, old_logprobs - micro.rollout_logprobs, 0.0)).exp()
    out = micro.mask & _outside(config, old_logprobs, ratio, micro)
    advantages, cut = micro.advantages, torch.zeros_like(out)
    if config.importance_cap:
        cut = ~out & (ratio > config.importance_cap)
        advantages = advantages * algorithm.importance_weights(
            old_logprobs, micro.rollout_logprobs, micro.mask, cap=config.importance_cap
        )
    sums = {"importance_cut": cut.sum(), "importance_masked": out.sum()}
    return torch.where(out, 0.0, advantages), algorithm.detached(sums, old_logprobs.dtype)


def _outside(config: AlgorithmConfig, old_logprobs: Tensor, ratio: Tensor, micro: MicroBatch) -> Tensor:
    """[T] tokens outside the band, or of a response outside its own."""
    out = algorithm.outside(ratio, low=config.importance_low, high=config.importance_high)
    if config.importance_sequence is SequenceRatio.none:
        return out
    whole = algorithm.response_ratios(
        old_logprobs,
        micro.rollout_logprobs,
        micro.mask,
        micro.segment,
        micro.response_lengths,
        geometric=config.importance_sequence is SequenceRatio.mean,
    )
    return out | algorithm.outside(whole, low=config.importance_sequence_low, high=config.importance_sequence_high)
