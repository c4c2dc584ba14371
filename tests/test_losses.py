"""Each loss against numbers worked out by hand, and each broken on purpose: the checks must notice every mutant.

Two responses, of 2 and 1 tokens, advantages +1 and -1, ratios (1.5, 0.9) and 0.5; the pack is padded. float32 rounds at
6e-8 relative and a value takes fewer than twenty operations: 1e-5 holds.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from types import ModuleType

import pytest
import torch

from nemo_dapo.batching import make_batch, pack
from nemo_dapo.config import AlgorithmConfig, KLEstimator
from nemo_dapo.config.checks import LOSSES as NAMES
from nemo_dapo.losses import LOSSES, cispo, dr_grpo, gspo, load_loss_fn
from nemo_dapo.types import Group, Prompt, Sample, TrainBatch, Verdict
from tests.mutation import mutant, noticed_by

OLD = [-1.0, -2.0, -0.5]  # log-probabilities of the three response tokens under the old policy
RATIOS = [1.5, 0.9, 0.5]
MEAN = math.sqrt(1.5 * 0.9)  # geometric, of the first response


def run(
    impl: ModuleType, ratios: list[float] = RATIOS, **options: object
) -> tuple[float, dict[str, float], list[float]]:
    """(loss, sums, gradient) of the module's loss, the gradient with respect to the three log-probabilities."""
    batch = TrainBatch(
        tokens=torch.tensor([3, 4, 5, 6, 7]),
        lengths=torch.tensor([3, 2]),
        prompt_lengths=torch.tensor([1, 1]),
        rollout_logprobs=torch.zeros(5),
        advantages=torch.tensor([1.0, -1.0]),
    )
    old = torch.tensor([0.0, OLD[0], OLD[1], 0.0, OLD[2]])
    reference = old - torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3])
    micro = pack(batch, [0, 1], multiple_of=4, old_logprobs=old, ref_logprobs=reference)
    logprobs = torch.full(micro.mask.shape, math.nan)  # what stands at masked positions must not matter
    logprobs[micro.mask] = torch.tensor(OLD) + torch.tensor(ratios).log()
    logprobs.requires_grad_()
    entropy = torch.where(micro.mask, torch.tensor(0.5), torch.tensor(math.inf))
    loss, sums = impl.make_loss_fn(AlgorithmConfig(**options))(logprobs, entropy, micro)  # type: ignore[arg-type]
    loss.backward()
    assert logprobs.grad is not None
    assert not logprobs.grad[~micro.mask].any()
    return loss.item(), {name: value.item() for name, value in sums.items()}, logprobs.grad[micro.mask].tolist()


def close(actual: object, expected: object) -> None:
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-7)


# GSPO


def check_gspo_weighs_each_response_by_the_geometric_mean_of_its_ratios(impl: ModuleType) -> None:
    loss, sums, gradient = run(impl, clip_low=0.9, clip_high=0.9)
    close(loss, -(MEAN - 0.5))
    close(gradient, [-MEAN / 2, -MEAN / 2, 0.5])  # d s / d logprob = s / |o|
    assert sums["denominator"] == 2  # responses, not tokens, and not the padding
    close(sums["ratio"], 2 * MEAN + 0.5)


def check_gspo_clips_whole_responses_above_and_below(impl: ModuleType) -> None:
    loss, sums, gradient = run(impl, clip_low=0.3, clip_high=0.1)
    close(loss, -(1.1 - 0.7))
    close(gradient, [0, 0, 0])
    assert (sums["clipped_high"], sums["clipped_low"]) == (2, 1)


def check_gspo_leaves_the_pessimistic_side_alone(impl: ModuleType) -> None:
    # Ratios that moved against their advantages are not clipped: min(0.5, 0.7) = 0.5 and min(-1.5, -1.1) = -1.5.
    loss, sums, gradient = run(impl, ratios=[0.5, 0.5, 1.5], clip_low=0.3, clip_high=0.1)
    close(loss, -(0.5 - 1.5))
    close(gradient, [-0.25, -0.25, 1.5])
    assert (sums["clipped_high"], sums["clipped_low"]) == (0, 0)


def check_gspo_penalties_are_means_of_each_response(impl: ModuleType) -> None:
    plain, _, _ = run(impl, clip_low=0.9, clip_high=0.9)
    loss, sums, _ = run(impl, clip_low=0.9, clip_high=0.9, kl_coeff=0.5, kl_estimator=KLEstimator.k1, entropy_coeff=0.1)
    kl = [math.log(ratio) + gap for ratio, gap in zip(RATIOS, (0.1, 0.2, 0.3), strict=True)]
    close(sums["kl"], sum(kl))
    close(loss, plain + 0.5 * ((kl[0] + kl[1]) / 2 + kl[2]) - 0.1 * 2 * 0.5)


# CISPO


def check_cispo_clips_the_weight_and_keeps_every_gradient(impl: ModuleType) -> None:
    loss, sums, gradient = run(impl, clip_low=0.2, clip_high=0.28)
    close(gradient, [-1.28, -0.9, 0.8])
    now = [old + math.log(ratio) for old, ratio in zip(OLD, RATIOS, strict=True)]
    close(loss, -(1.28 * now[0] + 0.9 * now[1] - 0.8 * now[2]))
    assert (sums["clipped_high"], sums["clipped_low"], sums["tokens"]) == (1, 1, 3)
    close(sums["ratio"], sum(RATIOS))


def check_cispo_without_bounds_is_the_policy_gradient(impl: ModuleType) -> None:
    _, sums, gradient = run(impl, clip_low=1.0, clip_high=9.0)
    close(gradient, [-1.5, -0.9, 0.5])
    close(sums["approx_kl"], sum(ratio - 1 - math.log(ratio) for ratio in RATIOS))
    assert "denominator" not in sums


# Dr. GRPO


def check_dr_grpo_divides_by_a_constant_a_response(impl: ModuleType) -> None:
    loss, sums, gradient = run(impl, clip_low=0.9, clip_high=0.9, loss_length=7)
    close(loss, -(1.5 + 0.9 - 0.5))
    close(gradient, [-1.5, -0.9, 0.5])
    assert sums["denominator"] == 14


CHECKS = {name: check for name, check in dict(globals()).items() if name.startswith("check_")}
MUTANTS: dict[str, tuple[ModuleType, str, str]] = {
    "sum for mean": (gspo, "share * log_ratio", "log_ratio"),
    "no exp": (gspo, ".exp()[segment]", "[segment] + 1"),
    "responses weighed by length": (gspo, "-(share * objective).sum()", "-objective.sum()"),
    "reward descended": (gspo, "-(share * objective)", "(share * objective)"),
    "max for min": (gspo, "torch.minimum(ratio", "torch.maximum(ratio"),
    "never clipped": (gspo, "ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)", "ratio * advantages)"),
    "always clipped": (gspo, "torch.minimum(ratio * advantages, ", "torch.maximum(-ratio * 1e9, "),
    "clip bounds swapped": (gspo, "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
    "mask missing": (gspo, "torch.where(mask, logprobs - old_logprobs, 0.0)", "logprobs - old_logprobs"),
    "ratio inverted": (gspo, "mask, logprobs - old_logprobs,", "mask, old_logprobs - logprobs,"),
    "padding counted": (gspo, "micro.starts.sum()", "(micro.response_lengths >= 0).sum()"),
    "tokens for responses": (gspo, "micro.starts.sum()", "micro.mask.sum()"),
    "penalties summed": (gspo, "entropy, micro, weights)", "entropy, micro)"),
    "clipped high blind": (gspo, "(advantages > 0) & (ratio > 1 + clip_high)", "(ratio > 1 + clip_low)"),
    "clipped low blind": (gspo, "(advantages < 0) & (ratio < 1 - clip_low)", "(ratio < 1 + clip_high)"),
    "masked ratios": (gspo, "torch.where(mask, ratio, 0.0).sum()", "ratio.sum()"),
    "gradient through the weight": (cispo, ".exp().detach()", ".exp()"),
    "weight unclipped": (cispo, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio"),
    "weight clipped above only": (cispo, "clamp(1 - clip_low, 1 + clip_high)", "clamp(max=1 + clip_high)"),
    "weight clipped below only": (cispo, "clamp(1 - clip_low, 1 + clip_high)", "clamp(min=1 - clip_low)"),
    "advantage left out": (cispo, "weight * advantages * ", "weight * "),
    "cispo descends": (cispo, "-objective.sum()", "objective.sum()"),
    "mean over tokens": (cispo, "-objective.sum()", "-objective.sum() / 3"),
    "NaN leaks": (cispo, "torch.where(mask, logprobs, 0.0)", "logprobs"),
    "cispo ratio inverted": (cispo, "mask, logprobs - old_logprobs,", "mask, old_logprobs - logprobs,"),
    "divergence reversed": (
        cispo,
        "torch.zeros_like(log_ratio), log_ratio, estimator",
        "log_ratio, torch.zeros_like(log_ratio), estimator",
    ),
    "cispo counts the wrong side": (cispo, "(ratio > 1 + clip_high)", "(ratio < 1 + clip_high)"),
    "cispo counts nothing below": (cispo, "(ratio < 1 - clip_low)", "(ratio < 0)"),
    "no constant": (dr_grpo, "config.loss_length * ", ""),
    "its own lengths": (dr_grpo, "config.loss_length * micro.starts.sum()", "micro.mask.sum()"),
    "dr_grpo counts the padding": (dr_grpo, "micro.starts.sum()", "(micro.response_lengths >= 0).sum()"),
}


def checks_of(module: ModuleType) -> dict[str, object]:
    prefix = f"check_{module.__name__.rpartition('.')[2]}_"
    return {name: check for name, check in CHECKS.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", CHECKS)
def test_the_equations_hold(name: str) -> None:
    module = next(module for module in (gspo, cispo, dr_grpo) if name in checks_of(module))
    CHECKS[name](module)


@cache
def killers(name: str) -> set[str]:
    module, correct, broken = MUTANTS[name]
    return noticed_by(checks_of(module), mutant(inspect.getsource(module), name, correct, broken))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutation_is_caught(name: str) -> None:
    assert killers(name), f"no check notices: {name}"


def test_every_check_catches_a_mutation() -> None:
    assert set(CHECKS) <= set().union(*(killers(name) for name in MUTANTS)), "a check that cannot fail is a defect"


def test_the_names_in_the_options_are_the_losses_there_are() -> None:
    assert set(NAMES) == set(LOSSES)
    assert all(callable(load_loss_fn(AlgorithmConfig(loss=name, loss_length=1))) for name in NAMES)


def test_a_filtered_response_leaves_its_prompt_alone_and_the_rest_untouched() -> None:
    prompt = Prompt("a", (1, 2), "", "")
    samples = tuple(Sample([5, 6, 7], [-1.0, -2.0, -3.0], reason, ()) for reason in ("length", "stop"))
    group = Group(prompt, samples, (Verdict(False), Verdict(True)))
    batch = make_batch([group], torch.tensor([[-1.0, 1.0]]), overlong_filter=True)
    assert batch.lengths.tolist() == [2, 5]
    assert batch.num_response_tokens == 3  # the denominator is what is left
    assert batch.tokens.tolist() == [1, 2, 1, 2, 5, 6, 7]
    assert batch.rollout_logprobs.tolist() == [0, 0, 0, 0, -1, -2, -3]
    assert batch.advantages.tolist() == [-1, 1]
    assert pack(batch, [0, 1]).mask.sum() == 3
