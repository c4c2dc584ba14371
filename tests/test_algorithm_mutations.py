"""Each equation is broken on purpose, one line at a time; the checks of test_algorithm.py must notice every one.

A mutant is a replacement in the source of algorithm.py, so it can never test something the module no longer says.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType

import pytest

from nemo_dapo import algorithm
from tests import test_algorithm
from tests.mutation import mutant, noticed_by

SOURCE = inspect.getsource(algorithm)

LOSS_MASK = "log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)"

# what was broken: (correct text, broken text)
MUTANTS = {
    # Eq. 9
    "population std": ("shifted.std(dim=-1, keepdim=True)", "shifted.std(dim=-1, keepdim=True, correction=0)"),
    "variance for std": ("shifted.std(dim=-1, keepdim=True)", "shifted.var(dim=-1, keepdim=True)"),
    "std over the batch": ("shifted.std(dim=-1, keepdim=True)", "shifted.std()"),
    "mean over the batch": ("shifted.mean(dim=-1, keepdim=True)", "shifted.mean()"),
    "advantages not centered": ("shifted - shifted.mean(dim=-1, keepdim=True)", "shifted"),
    "advantages of the wrong sign": ("centered = shifted - shifted.mean", "centered = -shifted + shifted.mean"),
    "always divided by std": ("if not normalize_std:", "if False:"),
    "never divided by std": ("if not normalize_std:", "if True:"),
    "eps left out": ("keepdim=True) + eps)", "keepdim=True))"),
    "rounding of equal rewards": ("shifted = rewards - rewards[..., :1]", "shifted = rewards"),
    # Eq. 11
    "all-wrong groups kept": ("(num_correct > 0) & ", ""),
    "all-right groups kept": (" & (num_correct < correct.shape[-1])", ""),
    "all-right off by one": ("(num_correct < correct.shape[-1])", "(num_correct < correct.shape[-1] - 1)"),
    "all-wrong off by one": ("(num_correct > 0)", "(num_correct > 1)"),
    # Eq. 13
    "length rewarded": ("factor * (remaining - 1)", "-factor * (remaining - 1)"),
    "penalty unbounded": (".clamp(-1.0, 0.0)", ".clamp(max=0.0)"),
    "short answers rewarded": (".clamp(-1.0, 0.0)", ".clamp(min=-1.0)"),
    "factor forgotten": ("factor * (remaining", "1.0 * (remaining"),
    "factor clamped away": ("factor * (remaining - 1).clamp(-1.0, 0.0)", "(factor * (remaining - 1)).clamp(-1.0, 0.0)"),
    "buffer after the limit": ("(remaining - 1)", "(remaining)"),
    "buffer off by one": ("(max_length - lengths)", "(max_length - lengths - 1)"),
    "buffer of zero divides": ("if buffer == 0:", "if False:"),
    # Eq. 8
    "symmetric clip, low": ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_low, 1 + clip_low)"),
    "symmetric clip, high": ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_high)"),
    "clip bounds swapped": ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
    "no lower clip": ("clamp(1 - clip_low, 1 + clip_high)", "clamp(max=1 + clip_high)"),
    "no upper clip": ("clamp(1 - clip_low, 1 + clip_high)", "clamp(min=1 - clip_low)"),
    "max for min": ("torch.minimum(", "torch.maximum("),
    "always clipped": ("torch.minimum(ratio * advantages, clipped_ratio * advantages)", "clipped_ratio * advantages"),
    "never clipped": ("torch.minimum(ratio * advantages, clipped_ratio * advantages)", "ratio * advantages"),
    "reward descended": ("return -objective.sum()", "return objective.sum()"),
    "mean over tokens": ("return -objective.sum()", "return -objective.sum() / mask.sum().clamp(min=1)"),
    "mean over positions": ("return -objective.sum()", "return -objective.sum() / max(len(mask), 1)"),
    "ratio inverted": (LOSS_MASK, "log_ratio = torch.where(mask, old_logprobs - logprobs, 0.0)"),
    "no ratio": (LOSS_MASK, "log_ratio = torch.where(mask, logprobs - logprobs.detach(), 0.0)"),
    "ratio without exp": ("bounded(log_ratio).exp()", "1 + bounded(log_ratio)"),
    "ratio detached": ("bounded(log_ratio).exp()", "bounded(log_ratio).exp().detach() + 0 * log_ratio"),
    "mask missing on ratios": (LOSS_MASK, "log_ratio = logprobs - old_logprobs"),
    "mask missing on advantages": ("advantages = torch.where(mask, advantages, 0.0)", "pass"),
    "mask multiplied": (LOSS_MASK, "log_ratio = (logprobs - old_logprobs) * mask"),
    "mask inverted": ("mask = mask.bool()\n    # Chosen", "mask = ~mask.bool()\n    # Chosen"),
    "NaN scrubbed from real tokens": (LOSS_MASK, f"{LOSS_MASK}.nan_to_num()"),
    "no bound on the exponent": ("ratio = bounded(log_ratio).exp()", "ratio = log_ratio.exp()"),
    "bound kills the gradient": (
        "log_ratio + (log_ratio.clamp(max=MAX_LOG_RATIO) - log_ratio).detach()",
        "log_ratio.clamp(max=MAX_LOG_RATIO)",
    ),
    # Dual clip
    "dual clip on every sign": ("dual = (advantages < 0) & (ratio", "dual = (ratio"),
    "dual clip on A > 0": ("dual = (advantages < 0)", "dual = (advantages > 0)"),
    "dual clip raises the loss": ("(ratio > dual_clip)", "(ratio < dual_clip)"),
    "dual clip ignored": ("torch.where(dual, dual_clip * advantages, objective)", "objective"),
    "dual clip of the wrong sign": ("torch.where(dual, dual_clip *", "torch.where(dual, -dual_clip *"),
    "dual clip on by default": ("dual_clip: float | None = None", "dual_clip: float | None = 10.0"),
    # Metrics
    "clipped_high blind to the sign": ("((advantages > 0) & (ratio > 1 + clip_high))", "(ratio > 1 + clip_high)"),
    "clipped_low blind to the sign": ("((advantages < 0) & (ratio < 1 - clip_low))", "(ratio < 1 - clip_low)"),
    "clipped_high at the lower clip": ("(ratio > 1 + clip_high)", "(ratio > 1 + clip_low)"),
    "clipped_low at the upper clip": ("(ratio < 1 - clip_low)", "(ratio < 1 - clip_high)"),
    "masked ratios counted": ("torch.where(mask, ratio, 0.0).sum()", "ratio.sum()"),
    "masked positions counted": (
        'log_ratio, estimator="k3").sum(),\n        "tokens": mask.sum()',
        'log_ratio, estimator="k3").sum(),\n        "tokens": torch.ones_like(mask).sum()',
    ),
    "masked positions counted in the gap": (
        'apart.max(), "tokens": mask.sum()',
        'apart.max(), "tokens": torch.ones_like(mask).sum()',
    ),
    "divergence reversed": (
        'kl_penalty(torch.zeros_like(log_ratio), log_ratio, estimator="k3")',
        'kl_penalty(log_ratio, torch.zeros_like(log_ratio), estimator="k3")',
    ),
    "sums keep the graph": ("value.detach().to(dtype)", "value.to(dtype)"),
    # KL estimators
    "KL direction": ("log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs"),
    "k1 sign": ("return -log_ratio", "return log_ratio"),
    "k2 without one half": ("0.5 * log_ratio.square()", "log_ratio.square()"),
    "k2 detached": ("0.5 * log_ratio.square()", "0.5 * log_ratio.detach().square() + 0 * log_ratio"),
    "k3 without - x": ("torch.expm1(bounded(log_ratio)) - log_ratio", "torch.expm1(bounded(log_ratio))"),
    "k3 by exp": ("torch.expm1(bounded(log_ratio)) -", "bounded(log_ratio).exp() - 1 -"),
    "k3 overflows": ("torch.expm1(bounded(log_ratio))", "torch.expm1(log_ratio)"),
    # Trainer against rollout engine
    "weights inverted": (
        "old_logprobs - rollout_logprobs, 0.0)\n",
        "rollout_logprobs - old_logprobs, 0.0)\n",
    ),
    "weights not capped": ("log_ratio.exp().clamp(max=cap)", "log_ratio.exp()"),
    "weights floored": ("clamp(max=cap)", "clamp(min=0.5, max=cap)"),
    "weights keep the graph": ("clamp(max=cap), 0.0).detach()", "clamp(max=cap), 0.0)"),
    "masked weights of one": ("torch.where(mask, log_ratio.exp()", "torch.where(mask | True, log_ratio.exp()"),
    "responses inverted": ("old_logprobs - rollout_logprobs, 0.0).detach()", "rollout_logprobs - old_logprobs, 0.0)"),
    "responses keep the graph": (
        "old_logprobs - rollout_logprobs, 0.0).detach()",
        "old_logprobs - rollout_logprobs, 0.0)",
    ),
    "responses not masked": (
        "torch.where(mask.bool(), old_logprobs - rollout_logprobs, 0.0)",
        "(old_logprobs - rollout_logprobs)",
    ),
    "product for mean": ("sums / lengths.clamp(min=1) if geometric else sums", "sums"),
    "mean for product": ("lengths.clamp(min=1) if geometric else sums", "lengths.clamp(min=1)"),
    "no lower bound": ("(ratio < low) | ", ""),
    "no upper bound": (" | (ratio > (high or torch.inf))", ""),
    "bounds are outside": ("(ratio < low)", "(ratio <= low)"),
    "a bound of 0 bounds": ("(high or torch.inf)", "high"),
    "NaN is outside": ("(ratio < low) |", "~(ratio >= low) |"),
    "weights of masked tokens": ("bounded(difference).exp(), 0.0)", "bounded(difference).exp(), 1.0)"),
    "weights of the other side": ("bounded(difference).exp()", "bounded(-difference).exp()"),
    "square of the sum": ("weight.square().sum()", "weight.sum().square()"),
    "gap with sign": ("torch.where(mask, difference, 0.0).abs()", "torch.where(mask, difference, 0.0)"),
    "absolute gap not masked": ("torch.where(mask, difference, 0.0)", "difference"),
    "the largest is the mean": ("apart.max()", "apart.mean()"),
    "the gap is the mean": ("apart.sum()", "apart.mean()"),
    "gap not masked": ("torch.where(mask, logprobs - rollout_logprobs, 0.0)", "logprobs - rollout_logprobs"),
    "gap divergence reversed": (
        'kl_penalty(torch.zeros_like(difference), difference, estimator="k3")',
        'kl_penalty(difference, torch.zeros_like(difference), estimator="k3")',
    ),
}


def mutate(name: str) -> ModuleType:
    return mutant(SOURCE, name, *MUTANTS[name])


@cache
def killers(name: str) -> set[str]:
    return noticed_by(test_algorithm.CHECKS, mutate(name))


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutation_is_caught(name: str) -> None:
    assert killers(name), f"no check of test_algorithm.py notices: {name}"


def test_every_check_catches_a_mutation() -> None:
    caught = set().union(*(killers(name) for name in MUTANTS))
    assert set(test_algorithm.CHECKS) <= caught, "a check that cannot fail is a defect"
