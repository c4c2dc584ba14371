"""Every equation against numbers worked out by hand.

A check is a function of the implementation, so that test_algorithm_mutations.py can run the same checks on broken ones.
Tolerances: float32 rounds at 6e-8 relative and each value takes fewer than ten operations, so 1e-6 relative holds; where
1e-12 is asked for, the inputs are float64.
"""

from __future__ import annotations

import ast
import inspect
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nemo_dapo import algorithm

NAN, INF = math.nan, math.inf


def close(actual: Tensor, expected: list[list[float]] | list[float] | float, tolerance: float = 1e-6) -> None:
    assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def loss(impl: ModuleType, ratios: list[float], advantages: list[float], **options: float | None):
    """dapo_loss on tokens with the given ratios; returns (loss, sums, gradient with respect to logprobs)."""
    old = torch.linspace(-2.0, -0.5, len(ratios), dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    mask = torch.ones(len(ratios), dtype=torch.bool)
    clip = {"clip_low": 0.2, "clip_high": 0.28} | options
    value, sums = impl.dapo_loss(logprobs, old, torch.tensor(advantages, dtype=torch.float64), mask, **clip)
    value.backward()
    return value.detach(), sums, logprobs.grad


# Eq. 9


def check_advantages_use_the_sample_standard_deviation(impl: ModuleType) -> None:
    # Mean 0; squares sum to 4; sample variance 4/3, std 1.1547 (the population's would be 1).
    rewards = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    value = 1 / (math.sqrt(4 / 3) + 1e-6)
    close(impl.group_advantages(rewards), [[value, value, -value, -value]], 1e-12)


def check_advantages_are_centered_in_each_group(impl: ModuleType) -> None:
    # Row 1: mean 0.25, deviations .75 and three -.25, sample variance (.5625 + 3 * .0625) / 3 = .25. Row 2: mean 6, std 2.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 9.0, 5.0]])
    close(impl.group_advantages(rewards, eps=0.0), [[1.5, -0.5, -0.5, -0.5], [-0.5, -0.5, 1.5, -0.5]])


def check_advantages_without_std_are_plain_differences(impl: ModuleType) -> None:
    close(impl.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), normalize_std=False), [[0.5, -0.5, -0.5, 0.5]])


def check_eps_is_added_to_the_std(impl: ModuleType) -> None:
    # std of (0, 2) is sqrt(2); eps = 1 makes it 2.41421.
    value = 1 / (math.sqrt(2) + 1)
    close(impl.group_advantages(torch.tensor([[0.0, 2.0]], dtype=torch.float64), eps=1.0), [[-value, value]], 1e-12)


def check_equal_rewards_give_exactly_zero(impl: ModuleType) -> None:
    # In float32 the mean of these differs from each of them by rounding; divided by a tiny std that is no longer small.
    for reward in (0.7, -0.1, 1.0, 1e3 / 3, 1e-8):
        advantages = impl.group_advantages(torch.full((3, 13), reward))
        assert torch.equal(advantages, torch.zeros(3, 13))


# Eq. 11


def check_only_mixed_groups_are_informative(impl: ModuleType) -> None:
    correct = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert impl.is_informative(correct).tolist() == [False, True, True, True, False]


# Eq. 13


def check_overlong_penalty_grows_through_the_buffer(impl: ModuleType) -> None:
    lengths = torch.tensor([0, 16383, 16384, 16385, 18432, 20479, 20480])
    expected = [0.0, 0.0, 0.0, -1 / 4096, -0.5, -4095 / 4096, -1.0]
    close(impl.overlong_penalty(lengths, max_length=20480, buffer=4096), expected)


def check_overlong_penalty_is_bounded(impl: ModuleType) -> None:
    lengths = torch.tensor([101, 120, 10**6])
    close(impl.overlong_penalty(lengths, max_length=100, buffer=10, factor=2.5), [-2.5, -2.5, -2.5])


def check_overlong_factor_scales_the_penalty(impl: ModuleType) -> None:
    lengths = torch.tensor([[90, 95], [100, 50]])
    penalty = impl.overlong_penalty(lengths, max_length=100, buffer=10, factor=0.5)
    close(penalty, [[0.0, -0.25], [-0.5, 0.0]])


def check_overlong_without_a_buffer_is_off(impl: ModuleType) -> None:
    close(impl.overlong_penalty(torch.tensor([1, 100, 101]), max_length=100, buffer=0), [0.0, 0.0, 0.0])


# Eq. 8


def check_loss_is_the_negated_clipped_sum(impl: ModuleType) -> None:
    # A > 0: min(r, 1.28) A.   A < 0: max(r, 0.8) A.
    ratios = [0.5, 1.0, 1.25, 1.5, 0.5, 0.9, 1.0, 1.5]
    advantages = [2.0, 2.0, 2.0, 2.0, -1.0, -1.0, -1.0, -1.0]
    expected = -(2 * (0.5 + 1.0 + 1.25 + 1.28) - (0.8 + 0.9 + 1.0 + 1.5))
    close(loss(impl, ratios, advantages)[0], expected, 1e-12)


def check_each_sign_is_clipped_at_its_own_bound(impl: ModuleType) -> None:
    # One token at a time: a sum could hide two errors that cancel.
    cases = [(1.4, 1.0, -1.28), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.4, -1.0, 1.4), (1.25, 1.0, -1.25)]
    for ratio, advantage, expected in cases:
        close(loss(impl, [ratio], [advantage])[0], expected, 1e-12)


def check_clipped_tokens_have_no_gradient(impl: ModuleType) -> None:
    # d(-ratio A)/d(logprob) = -ratio A wherever the unclipped term is the smaller one, else 0.
    _, _, gradient = loss(impl, [1.4, 0.5, 0.5, 1.4, 1.0], [1.0, 1.0, -1.0, -1.0, 3.0])
    close(gradient, [0.0, -0.5, 0.0, 1.4, -3.0], 1e-12)


def check_first_update_is_the_policy_gradient(impl: ModuleType) -> None:
    # theta = theta_old: every ratio is 1, the gradient is -A, nothing is clipped and the divergence is 0.
    _, sums, gradient = loss(impl, [1.0, 1.0, 1.0], [0.5, -1.5, 0.0])
    close(gradient, [-0.5, 1.5, 0.0], 1e-12)
    assert [sums[k].item() for k in ("clipped_high", "clipped_low", "ratio", "approx_kl")] == [0.0, 0.0, 3.0, 0.0]


def check_gradient_equals_finite_differences(impl: ModuleType) -> None:
    old = torch.tensor([-1.0, -0.3, -2.0, -0.7, -1.1, -0.2], dtype=torch.float64)
    shift = torch.tensor([0.1, -0.6, 0.7, 0.5, -0.5, 1.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 0.5, -1.0, -2.0, -0.5], dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 1, 1], dtype=torch.bool)
    for dual_clip in (None, 3.0):

        def f(logprobs: Tensor, dual_clip: float | None = dual_clip) -> Tensor:
            return impl.dapo_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)[0]

        assert torch.autograd.gradcheck(f, ((old + shift).requires_grad_(),), raise_exception=False)


def check_dual_clip_caps_negative_advantages_alone(impl: ModuleType) -> None:
    # c = 3: the loss of A = -1 at ratio 5 is 3, without gradient; A > 0 and ratios below 3 are as without it.
    cases = [(5.0, -1.0, 3.0, 0.0), (2.0, -1.0, 2.0, 2.0), (0.5, -1.0, 0.8, 0.0), (0.5, 1.0, -0.5, -0.5)]
    for ratio, advantage, expected, slope in cases:
        value, sums, gradient = loss(impl, [ratio], [advantage], dual_clip=3.0)
        close(value, expected, 1e-12)
        close(gradient, [slope], 1e-12)
        assert sums["dual_clipped"] == (ratio == 5.0)
    # Without the upper clip in the way (clip_high = 9): the cap must not touch A > 0.
    value, _, gradient = loss(impl, [5.0], [1.0], dual_clip=3.0, clip_high=9.0)
    close(value, -5.0, 1e-12)
    close(gradient, [-5.0], 1e-12)


def check_dual_clip_is_off_by_default(impl: ModuleType) -> None:
    close(loss(impl, [50.0], [-1.0])[0], 50.0, 1e-12)


def check_sums_count_what_they_name(impl: ModuleType) -> None:
    # Above / below with the sign that makes the clip bind, and with the one that does not.
    # 1.25 lies between the two widths of the clip, 0.75 too.
    ratios = [1.3, 1.3, 1.3, 0.75, 0.7, 1.25, 0.81, 1.3]
    advantages = [1.0, 2.0, -1.0, -1.0, 1.0, 1.0, -1.0, 0.0]
    _, sums, _ = loss(impl, ratios, advantages)
    assert sums["clipped_high"] == 2
    assert sums["clipped_low"] == 1
    assert sums["tokens"] == 8
    close(sums["ratio"], sum(ratios), 1e-12)
    close(sums["approx_kl"], sum(r - 1 - math.log(r) for r in ratios), 1e-9)
    assert all(value.shape == () and not value.requires_grad for value in sums.values())


def check_loss_is_a_sum_over_tokens(impl: ModuleType) -> None:
    # Splitting a batch into micro-batches of any size adds up to the same loss; a mean anywhere inside would not.
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(37, generator=generator, dtype=torch.float64)
    logprobs = old + 0.3 * torch.randn(37, generator=generator, dtype=torch.float64)
    advantages = torch.randn(37, generator=generator, dtype=torch.float64)
    mask = torch.rand(37, generator=generator) < 0.7

    def total(pieces: list[int]) -> tuple[float, float]:
        value, tokens = 0.0, 0.0
        for part in zip(*(x.split(pieces) for x in (logprobs, old, advantages, mask)), strict=True):
            piece, sums = impl.dapo_loss(*part, clip_low=0.2, clip_high=0.28)
            value, tokens = value + piece.item(), tokens + sums["tokens"].item()
        return value, tokens

    whole = total([37])
    assert whole[1] == mask.sum()
    for pieces in ([1, 36], [10, 20, 7], [1] * 37):
        assert total(pieces) == pytest.approx(whole, rel=1e-12)


def check_masked_tokens_never_leak(impl: ModuleType) -> None:
    # The first two tokens are real; the rest hold every combination of garbage and must be invisible.
    garbage = [(a, b, c) for a in (NAN, INF, -INF, 900.0, -1.0) for b in (NAN, -INF, -1.0) for c in (NAN, -INF, 2.0)]
    logprobs = torch.tensor([-0.5, -1.0] + [g[0] for g in garbage]).requires_grad_()
    old = torch.tensor([-0.6, -0.8] + [g[1] for g in garbage])
    advantages = torch.tensor([1.0, -1.0] + [g[2] for g in garbage])
    mask = torch.tensor([True, True] + [False] * len(garbage))
    for dual_clip in (None, 3.0):
        value, sums = impl.dapo_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
        (gradient,) = torch.autograd.grad(value, logprobs)
        ratios = [math.exp(0.1), math.exp(-0.2)]
        close(value.detach(), -ratios[0] + ratios[1])
        close(gradient, [-ratios[0], ratios[1]] + [0.0] * len(garbage))
        close(sums["ratio"], sum(ratios))
        close(sums["approx_kl"], sum(r - 1 - math.log(r) for r in ratios))
        assert sums["tokens"] == 2
        assert sums["clipped_high"] == sums["clipped_low"] == sums["dual_clipped"] == 0


def check_a_fully_masked_batch_is_zero_and_connected(impl: ModuleType) -> None:
    # A rank without response tokens must still take part in the backward pass.
    for tokens in (0, 3):
        logprobs = torch.full((tokens,), NAN, requires_grad=True)
        zeros, mask = torch.zeros(tokens), torch.zeros(tokens, dtype=torch.bool)
        value, sums = impl.dapo_loss(logprobs, zeros, zeros, mask, clip_low=0.2, clip_high=0.28)
        value.backward()
        assert value == 0
        assert sums["tokens"] == 0
        assert logprobs.grad is not None
        assert torch.equal(logprobs.grad, torch.zeros(tokens))


def check_extreme_ratios_stay_finite_and_keep_their_gradient(impl: ModuleType) -> None:
    # exp(200) overflows float32. The token with A < 0 must still be pushed down, not left out by the bound.
    old = torch.tensor([-300.0, -0.1, -300.0])
    logprobs = torch.tensor([-100.0, -200.0, -100.0], requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, 1.0])
    value, sums = impl.dapo_loss(logprobs, old, advantages, torch.ones(3), clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(value, logprobs)
    assert torch.isfinite(value)
    assert all(torch.isfinite(x) for x in sums.values())
    close(gradient / math.exp(algorithm.MAX_LOG_RATIO), [1.0, 0.0, 0.0])


def check_a_non_finite_response_token_is_not_hidden(impl: ModuleType) -> None:
    one = torch.ones(1)
    for bad in (NAN, INF):
        value, _ = impl.dapo_loss(torch.tensor([bad]), -one, one, one, clip_low=0.2, clip_high=0.28)
        assert not torch.isfinite(value)


# KL


def check_kl_estimators_by_hand(impl: ModuleType) -> None:
    # x = ref - policy = ln 2, ln 0.5, 0
    policy = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    ref = policy + torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).log()
    ln2 = math.log(2)
    close(impl.kl_penalty(policy, ref, estimator="k1"), [-ln2, ln2, 0.0], 1e-12)
    close(impl.kl_penalty(policy, ref, estimator="k2"), [ln2**2 / 2, ln2**2 / 2, 0.0], 1e-12)
    close(impl.kl_penalty(policy, ref, estimator="k3"), [1 - ln2, -0.5 + ln2, 0.0], 1e-12)


def check_kl_estimators_agree_with_the_divergence(impl: ModuleType) -> None:
    # Exact expectations over a three-word vocabulary: k1 and k3 are unbiased, k2 is not and is left out.
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    divergence = (policy * (policy / ref).log()).sum().item()
    for estimator in ("k1", "k3"):
        values = impl.kl_penalty(policy.log(), ref.log(), estimator=estimator)
        close((policy * values).sum(), divergence, 1e-12)


def check_k2_has_the_gradient_of_the_divergence(impl: ModuleType) -> None:
    # sum_v p_v d k2_v / d logits with p_v held fixed = the gradient of KL(p || ref).
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - ref.log())).sum(), logits, retain_graph=True)[0]
    estimate = (logprobs.exp().detach() * impl.kl_penalty(logprobs, ref.log(), estimator="k2")).sum()
    assert_close(torch.autograd.grad(estimate, logits)[0], exact, rtol=1e-12, atol=1e-12)


def check_k3_is_exact_for_tiny_differences(impl: ModuleType) -> None:
    # x^2 / 2 = 5e-9; exp(x) - 1 - x in float32 rounds at 6e-8 and would be off by its own size, or negative. Logprobs
    # near 0, so that their difference itself is exact.
    x = torch.tensor([1e-4, -1e-4])
    k3 = impl.kl_penalty(torch.zeros(2), x, estimator="k3")
    assert_close(k3, x.square() / 2, rtol=2e-3, atol=0.0)  # next term: x^3 / 6; expm1 itself rounds at 6e-8 * x = 6e-12


def check_k3_stays_finite(impl: ModuleType) -> None:
    policy = torch.tensor([-200.0], requires_grad=True)
    value = impl.kl_penalty(policy, torch.tensor([-0.1]), estimator="k3")
    (gradient,) = torch.autograd.grad(value.sum(), policy)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert gradient < 0  # descending raises the probability of the token that the reference prefers


# Trainer against rollout engine


def check_importance_weights_are_truncated_ratios(impl: ModuleType) -> None:
    old = (torch.tensor([1.0, 2.0, 8.0, 0.25], dtype=torch.float64).log() - 1.0).requires_grad_()
    weights = impl.importance_weights(old, -torch.ones(4, dtype=torch.float64), torch.ones(4), cap=4.0)
    close(weights, [1.0, 2.0, 4.0, 0.25], 1e-12)
    assert not weights.requires_grad


def check_importance_weights_ignore_masked_tokens(impl: ModuleType) -> None:
    old = torch.tensor([-1.0, NAN, INF, -INF])
    weights = impl.importance_weights(old, torch.tensor([-1.0, -1.0, NAN, INF]), torch.tensor([1, 0, 0, 0]), cap=2.0)
    close(weights, [1.0, 0.0, 0.0, 0.0])


def check_response_ratios_are_products_or_geometric_means(impl: ModuleType) -> None:
    # Ratios 2 and 8 of one response, 0.5 of another; a prompt token of the first and the padding are masked.
    old = torch.tensor([NAN, 2.0, 8.0, 0.5, 9.0], dtype=torch.float64).log().requires_grad_()
    mask, segment = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 2])
    inputs = old, torch.zeros(5, dtype=torch.float64), mask, segment, torch.tensor([2, 1, 0])
    close(impl.response_ratios(*inputs, geometric=False), [16, 16, 16, 0.5, 1], 1e-12)
    close(impl.response_ratios(*inputs, geometric=True), [4, 4, 4, 0.5, 1], 1e-12)
    assert not impl.response_ratios(*inputs, geometric=True).requires_grad


def check_a_ratio_is_outside_beyond_bounds_that_are_set(impl: ModuleType) -> None:
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 1e30, NAN])  # the bounds themselves are inside, and what is no number
    assert impl.outside(ratio, low=0.5, high=2.0).tolist() == [True, False, False, False, True, False]
    assert impl.outside(ratio, low=0.5, high=0.0).tolist() == [True, False, False, False, False, False]
    assert not impl.outside(ratio, low=0.0, high=0.0).any()


def check_weighted_advantages_weigh_the_loss(impl: ModuleType) -> None:
    # min(w a, w b) = w min(a, b) for w > 0: the way importance_weights is meant to be used changes no clipping.
    ratios, advantages, weights = [1.4, 0.5, 0.5, 1.1], [1.0, 1.0, -1.0, -2.0], [0.5, 2.0, 1.5, 1.0]
    weighted = loss(impl, ratios, [a * w for a, w in zip(advantages, weights, strict=True)])[0]
    each = [loss(impl, [r], [a])[0].item() for r, a in zip(ratios, advantages, strict=True)]
    close(weighted, sum(w * x for w, x in zip(weights, each, strict=True)), 1e-12)


def check_logprob_gap_by_hand(impl: ModuleType) -> None:
    logprobs = torch.tensor([-1.0, -2.0, NAN, -1.0], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([-1.5, -1.0, -1.0, -INF], dtype=torch.float64)
    sums = impl.logprob_gap(logprobs, rollout, torch.tensor([1, 1, 0, 0]))
    close(sums["gap"], 1.5, 1e-12)
    close(sums["gap_kl"], (math.exp(0.5) - 1.5) + math.exp(-1.0), 1e-12)
    close(sums["gap_max"], 1.0, 1e-12)
    close(sums["weight"], math.exp(0.5) + math.exp(-1.0), 1e-12)
    close(sums["weight_squared"], math.exp(1.0) + math.exp(-2.0), 1e-12)
    assert sums["tokens"] == 2
    assert not any(value.requires_grad for value in sums.values())


def check_absolute_gap_by_hand(impl: ModuleType) -> None:
    found = impl.absolute_gap(torch.tensor([-1.5, NAN, 0.5, INF]), torch.tensor([True, False, True, False]))
    assert {name: float(value) for name, value in found.items()} == {"gap": 2.0, "gap_max": 1.5, "tokens": 2.0}


CHECKS = {name: check for name, check in dict(globals()).items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_the_equations_hold(name: str) -> None:
    CHECKS[name](algorithm)


# Misuse


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size >= 2"):
        algorithm.group_advantages(torch.ones(4, 1))


def test_rewards_in_place_of_verdicts_are_refused() -> None:
    with pytest.raises(ValueError, match="pass verdicts, not rewards"):
        algorithm.is_informative(torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("buffer", [-1, 101])
def test_a_buffer_outside_the_response_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"buffer={buffer} must lie between 0 and max_length=100"):
        algorithm.overlong_penalty(torch.tensor([1]), max_length=100, buffer=buffer)


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0])
def test_a_dual_clip_that_would_cap_ordinary_tokens_is_refused(dual_clip: float) -> None:
    with pytest.raises(ValueError, match="must be greater than 1"):
        loss(algorithm, [1.0], [1.0], dual_clip=dual_clip)


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="expected k1, k2 or k3"):
        algorithm.kl_penalty(torch.zeros(1), torch.zeros(1), estimator="k4")


def test_an_importance_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        algorithm.importance_weights(torch.zeros(1), torch.zeros(1), torch.ones(1), cap=0.5)


def test_only_torch_is_imported() -> None:
    statements = [node for node in ast.walk(ast.parse(inspect.getsource(algorithm))) if isinstance(node, ast.Import)]
    sources = [node for node in ast.walk(ast.parse(inspect.getsource(algorithm))) if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in statements for alias in node.names} == {"torch"}
    assert {node.module for node in sources} == {"__future__", "torch"}
