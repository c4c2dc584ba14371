"""The mathematics of DAPO (arXiv 2503.14476): tensors and floats in, tensors out.

Shapes: N prompts a step, G samples a prompt, T tokens of a packed micro-batch.
Names say who computed a log-probability: `logprobs` (the policy being trained, theta), `old_logprobs` (the trainer, before
the first update of this step), `rollout_logprobs` (the rollout engine, when it sampled the token), `ref_logprobs` (the
frozen reference). All are in nats.

Everything a loss returns is a *sum* over tokens. Eq. 8 divides by the token count of the whole batch, which no function
here can know: the caller divides once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(20) = 5e8: far outside any clip range, and its square still fits float32 in a gradient norm.
MAX_LOG_RATIO = 20.0


def group_advantages(rewards: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Eq. 9: each reward [N, G] against its group, (R - mean) / (std + eps); [N, G].

    `std` is the sample standard deviation (divisor G - 1), as in the public recipe; `normalize_std=False` leaves the
    division out. A group of equal rewards gives exactly 0. Raises ValueError when G < 2.
    """
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"a group has {rewards.shape[-1]} sample; its advantage compares at least 2: set algorithm.group_size >= 2"
        )
    # Mean and std do not see a shift, rounding does: without it the mean of sixteen 0.7s is not 0.7, and the tiny
    # difference divided by the tiny std becomes an advantage of a few percent.
    shifted = rewards - rewards[..., :1]
    centered = shifted - shifted.mean(dim=-1, keepdim=True)
    if not normalize_std:
        return centered
    return centered / (shifted.std(dim=-1, keepdim=True) + eps)


def is_informative(correct: Tensor) -> Tensor:
    """Eq. 11: groups with 0 < correct < G; `correct` [N, G] bool -> [N] bool. Raises ValueError when it is not bool."""
    if correct.dtype != torch.bool:
        raise ValueError(f"`correct` has dtype {correct.dtype}, expected bool: pass verdicts, not rewards")
    num_correct = correct.sum(dim=-1)
    return (num_correct > 0) & (num_correct < correct.shape[-1])


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Eq. 13 times `factor`: what a response of `lengths` tokens (any shape) pays for length, in [-factor, 0].

    Nothing up to `max_length - buffer`, then linearly more, `-factor` from `max_length` on. `buffer=0` switches it off.
    Raises ValueError unless 0 <= buffer <= max_length.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"overlong buffer={buffer} must lie between 0 and max_length={max_length}")
    if buffer == 0:
        return torch.zeros(lengths.shape, device=lengths.device)
    remaining = (max_length - lengths) / buffer  # 1 where the buffer begins, 0 where it ends
    return factor * (remaining - 1).clamp(-1.0, 0.0)


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 8 without its normaliser: -sum_t min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t).

    All inputs are [T]; `mask` is true on response tokens. Returns the loss, a scalar with gradient, and scalar sums
    without: `clipped_high` (A > 0, ratio above), `clipped_low` (A < 0, ratio below), `dual_clipped`, `ratio`, `approx_kl`
    (k3 estimate of KL(old || theta)) and `tokens`. `dual_clip` c bounds the loss of a token with A < 0 by c |A|
    (arXiv 1912.09729, Eq. 5). Masked positions give no loss and no gradient, whatever they hold; a non-finite number on
    a response token makes the loss non-finite. Raises ValueError when dual_clip <= 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be greater than 1, or None: it bounds ratios above 1")
    mask = mask.bool()
    # Chosen before exp: multiplying by the mask afterwards turns an infinity at a masked position into 0 * inf = NaN.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = bounded(log_ratio).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    dual = torch.zeros_like(mask)
    if dual_clip is not None:
        dual = (advantages < 0) & (ratio > dual_clip)
        objective = torch.where(dual, dual_clip * advantages, objective)
    sums = {
        "clipped_high": ((advantages > 0) & (ratio > 1 + clip_high)).sum(),
        "clipped_low": ((advantages < 0) & (ratio < 1 - clip_low)).sum(),
        "dual_clipped": dual.sum(),
        "ratio": torch.where(mask, ratio, 0.0).sum(),
        "approx_kl": kl_penalty(torch.zeros_like(log_ratio), log_ratio, estimator="k3").sum(),
        "tokens": mask.sum(),
    }
    return -objective.sum(), detached(sums, logprobs.dtype)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """KL(policy || reference) estimated at each token that the policy sampled; same shape as the inputs.

    With x = ref_logprobs - logprobs (Schulman, "Approximating KL divergence", 2020): k1 = -x (unbiased, any sign),
    k2 = x^2 / 2, k3 = exp(x) - 1 - x (unbiased, never negative). As a loss, k2 has the gradient of the true divergence in
    expectation; k1's is zero in expectation and k3's is that of the reverse divergence. No mask is applied: zero the
    inputs of masked positions first when they may be non-finite. Raises ValueError on another name.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(bounded(log_ratio)) - log_ratio  # expm1: near 0 the difference drowns in exp's rounding
    raise ValueError(f"estimator={estimator!r} is unknown: expected k1, k2 or k3")


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Truncated importance sampling: min(p_trainer / p_rollout, cap) of each token, detached; [T], 0 where masked.

    Corrects for sampling with another engine than the one that trains. Multiply the advantages by it: weights are
    positive, so that scales each token's term of Eq. 8 and leaves its clipping alone. Raises ValueError when cap < 1.
    """
    if cap < 1:
        raise ValueError(f"importance weight cap={cap} must be at least 1: a perfect match has weight 1")
    mask = mask.bool()
    log_ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0.0)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0).detach()


def response_ratios(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, segment: Tensor, lengths: Tensor, *, geometric: bool
) -> Tensor:
    """p_trainer / p_rollout of whole responses, at each of their tokens: the product of the tokens' ratios, or, where
    `geometric`, its root of as many as there are; [T], detached.

    `segment` [T] is the response that a token belongs to, `lengths` [S] the responses' tokens, all of which must be here.
    """
    log_ratio = torch.where(mask.bool(), old_logprobs - rollout_logprobs, 0.0).detach()
    sums = torch.zeros(lengths.shape, dtype=log_ratio.dtype, device=log_ratio.device).index_add(0, segment, log_ratio)
    return (sums / lengths.clamp(min=1) if geometric else sums).exp()[segment]


def outside(ratio: Tensor, *, low: float, high: float) -> Tensor:
    """Where `ratio` lies below `low` or above `high`, 0 being no bound. NaN does not: masked, it would never be seen."""
    return (ratio < low) | (ratio > (high or torch.inf))


def logprob_gap(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far trainer and rollout engine disagree on the same tokens [T]: scalars without gradient.

    Sums: `gap` of |logprobs - rollout_logprobs|, `gap_kl` of the k3 estimate of KL(rollout || trainer), `weight` and
    `weight_squared` of p_trainer / p_rollout, `tokens` of the mask. `gap_max` is the largest difference.
    """
    mask = mask.bool()
    difference = torch.where(mask, logprobs - rollout_logprobs, 0.0)
    weight = torch.where(mask, bounded(difference).exp(), 0.0)
    found = absolute_gap(difference, mask) | {
        "gap_kl": kl_penalty(torch.zeros_like(difference), difference, estimator="k3").sum(),
        "weight": weight.sum(),
        "weight_squared": weight.square().sum(),
    }
    return detached(found, logprobs.dtype)


def absolute_gap(difference: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of |difference| [T] on the tokens of `mask` [T] bool: the sum `gap`, the largest `gap_max`, the number `tokens`."""
    apart = torch.where(mask, difference, 0.0).abs()
    return {"gap": apart.sum(), "gap_max": apart.max(), "tokens": mask.sum()}


def bounded(log_ratio: Tensor) -> Tensor:
    """`log_ratio` with values above MAX_LOG_RATIO lowered to it and its gradient left alone.

    A plain clamp has no gradient beyond its limit: a token with A < 0 whose probability exploded, the one that most needs
    pushing down, would be the only one left out. Infinities become NaN, so that they are seen and not trained on.
    """
    return log_ratio + (log_ratio.clamp(max=MAX_LOG_RATIO) - log_ratio).detach()


def detached(sums: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """One dtype, so that the caller can stack and reduce them together (counts are exact up to 2^24 in float32)."""
    return {name: value.detach().to(dtype) for name, value in sums.items()}
