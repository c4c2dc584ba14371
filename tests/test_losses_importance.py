"""The importance correction against numbers worked out by hand, and each part broken on purpose.

Two responses, of 2 and 1 tokens, advantages +1 and -1, the pack padded. theta / theta_old is 1.1, 0.9, 1.2: inside every
clip range; theta_old / rollout is `behaviour`. float32 rounds at 6e-8 relative, fewer than twenty operations: 1e-5 holds.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch, pack
from nemo_dapo.config import AlgorithmConfig, SequenceRatio
from nemo_dapo.losses import LOSSES, importance, load_loss_fn
from nemo_dapo.mismatch import Mismatch
from nemo_dapo.telemetry.metrics import EffectiveShare, Max, Mean
from nemo_dapo.types import TrainBatch
from tests.mutation import mutant, noticed_by

OLD = torch.tensor([-1.0, -2.0, -0.5])
RATIOS = torch.tensor([1.1, 0.9, 1.2])
MIXED = [2.0, 0.5, 3.0]


def micro_batch(behaviour: list[float], *, has_old: bool = True) -> MicroBatch:
    old = torch.tensor([0.0, OLD[0], OLD[1], 0.0, OLD[2]])
    ratios = torch.tensor([1.0, behaviour[0], behaviour[1], 1.0, behaviour[2]])
    batch = TrainBatch(
        tokens=torch.tensor([3, 4, 5, 6, 7]),
        lengths=torch.tensor([3, 2]),
        prompt_lengths=torch.tensor([1, 1]),
        rollout_logprobs=old - ratios.log(),
        advantages=torch.tensor([1.0, -1.0]),
    )
    return pack(batch, [0, 1], multiple_of=4, old_logprobs=old if has_old else None)


def scores(micro: MicroBatch, tokens: Tensor) -> Tensor:
    """[T] log-probabilities that are NaN where masked: what stands there must not matter."""
    values = torch.full(micro.mask.shape, math.nan)
    values[micro.mask] = tokens
    return values.requires_grad_()


def run(impl: ModuleType, behaviour: list[float] = MIXED, **options: object) -> tuple[float, list[float], list[float]]:
    """Eq. 8 under the correction: (loss, gradient with respect to the three log-probabilities, [cut, out])."""
    micro = micro_batch(behaviour)
    logprobs = scores(micro, OLD + RATIOS.log())
    assert micro.old_logprobs is not None
    old = torch.where(micro.mask, micro.old_logprobs, math.inf)
    advantages, sums = impl.weighted_advantages(AlgorithmConfig(**options), old, micro)  # type: ignore[arg-type]
    loss, _ = algorithm.dapo_loss(logprobs, old, advantages, micro.mask, clip_low=0.2, clip_high=0.28)
    loss.backward()
    assert logprobs.grad is not None
    counted = [sums["importance_cut"].item(), sums["importance_masked"].item()]
    return loss.item(), logprobs.grad[micro.mask].tolist(), counted


def close(actual: object, expected: object) -> None:
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-7)


def check_off_is_off(impl: ModuleType) -> None:
    loss, gradient, counted = run(impl)
    close(loss, -(1.1 + 0.9 - 1.2))
    close(gradient, [-1.1, -0.9, 1.2])
    assert counted == [0, 0]


def check_the_ratio_to_the_old_policy_is_clipped_and_the_one_to_the_behaviour_weighs(impl: ModuleType) -> None:
    # theta / rollout is 2.2, 0.45, 3.6: were that clipped, the first would lose its gradient.
    loss, gradient, counted = run(impl, importance_cap=2.5)
    close(loss, -(2 * 1.1 + 0.5 * 0.9 - 2.5 * 1.2))
    close(gradient, [-2.2, -0.45, 3.0])
    assert counted == [1, 0]


def check_tokens_outside_the_band_are_out(impl: ModuleType) -> None:
    for bounds, left in (((0.6, 2.5), [-1.1, 0, 0]), ((0.6, 0.0), [-1.1, 0, 1.2]), ((0.0, 2.5), [-1.1, -0.9, 0])):
        loss, gradient, counted = run(impl, importance_low=bounds[0], importance_high=bounds[1])
        close(gradient, left)
        close(loss, sum(left))  # of a loss that is linear in the ratio
        assert counted == [0, left.count(0)]


def check_a_token_that_is_out_is_not_cut(impl: ModuleType) -> None:
    _, gradient, counted = run(impl, importance_cap=1.5, importance_high=2.5)
    close(gradient, [-1.65, -0.45, 0])
    assert counted == [1, 1]


def check_a_response_is_out_by_the_product_of_its_ratios(impl: ModuleType) -> None:
    product = {"importance_sequence": SequenceRatio.product}
    # 2 x 3 = 6 and 1.5; then 0.5 x 0.5 = 0.25 and 0.9: single tokens and geometric means are all within these bounds.
    for behaviour, bound in (([2.0, 3.0, 1.5], {"high": 3.5}), ([0.5, 0.5, 0.9], {"low": 0.4})):
        options = product | {f"importance_sequence_{side}": value for side, value in bound.items()}
        _, gradient, counted = run(impl, behaviour, **options)
        close(gradient, [0, 0, 1.2])
        assert counted == [0, 2]  # and not the prompt


def check_a_response_is_out_by_the_geometric_mean_of_its_ratios(impl: ModuleType) -> None:
    mean = {"importance_sequence": SequenceRatio.mean, "importance_sequence_high": 2.0}
    _, gradient, counted = run(impl, [2.0, 3.0, 1.5], **mean)  # root of 6 = 2.45
    close(gradient, [0, 0, 1.2])
    assert counted == [0, 2]
    _, gradient, counted = run(impl, [1.5, 1.6, 1.5], **mean)  # whose product is 2.4
    close(gradient, [-1.1, -0.9, 1.2])
    assert counted == [0, 0]


def check_band_and_responses_combine(impl: ModuleType) -> None:
    _, gradient, counted = run(
        impl,
        [2.0, 3.0, 0.5],
        importance_low=0.6,
        importance_sequence=SequenceRatio.product,
        importance_sequence_high=5.0,
    )
    close(gradient, [0, 0, 0])
    assert counted == [0, 3]


CHECKS = {name: check for name, check in dict(globals()).items() if name.startswith("check_")}
MUTANTS = {
    "ratio inverted": ("old_logprobs - micro.rollout_logprobs, 0.0", "micro.rollout_logprobs - old_logprobs, 0.0"),
    "wrong side cut": ("(ratio > config.importance_cap)", "(ratio < config.importance_cap)"),
    "out and cut": ("~out & (ratio", "(ratio"),
    "prompt counted": ("micro.mask & _outside", "_outside"),
    "none out": ("torch.where(out, 0.0, advantages)", "advantages"),
    "all others out": ("torch.where(out, 0.0, advantages)", "torch.where(out, advantages, 0.0)"),
    "never weighed": ("if config.importance_cap:", "if False:"),
    "uncapped": ("cap=config.importance_cap", "cap=1e9"),
    "no lower bound": ("low=config.importance_low", "low=0.0"),
    "no upper bound": ("high=config.importance_high", "high=0.0"),
    "no lower bound of responses": ("low=config.importance_sequence_low", "low=0.0"),
    "no upper bound of responses": ("high=config.importance_sequence_high", "high=0.0"),
    "always the mean": ("geometric=config.importance_sequence is SequenceRatio.mean", "geometric=True"),
    "always the product": ("geometric=config.importance_sequence is SequenceRatio.mean", "geometric=False"),
    "band forgotten": ("return out | algorithm", "return algorithm"),
    "responses forgotten": ("is SequenceRatio.none", "is not None"),
    "advantages dropped": ("advantages, cut = micro.advantages,", "advantages, cut = micro.advantages.abs(),"),
    "counts swapped": (
        '{"importance_cut": cut.sum(), "importance_masked": out.sum()}',
        '{"importance_cut": out.sum(), "importance_masked": cut.sum()}',
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_correction_is_right(name: str) -> None:
    CHECKS[name](importance)


@cache
def killers(name: str) -> set[str]:
    return noticed_by(CHECKS, mutant(inspect.getsource(importance), name, *MUTANTS[name]))


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutation_is_caught(name: str) -> None:
    assert killers(name), f"no check notices: {name}"


def test_every_check_catches_a_mutation() -> None:
    assert set(CHECKS) <= set().union(*(killers(name) for name in MUTANTS)), "a check that cannot fail is a defect"


def test_a_number_that_is_none_is_not_masked_away() -> None:
    assert math.isnan(run(importance, [math.nan, 0.5, 3.0], importance_cap=2.0, importance_low=0.4)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_part(name: str) -> None:
    """The first response, whose ratios multiply to 6, has no gradient; on a step's only update theta is theta_old."""
    config = AlgorithmConfig(
        loss=name, loss_length=1, importance_sequence=SequenceRatio.product, importance_sequence_high=5.0
    )
    micro = micro_batch([2.0, 3.0, 1.5], has_old=False)
    logprobs = scores(micro, OLD)
    loss, sums = load_loss_fn(config)(logprobs, torch.zeros_like(logprobs), micro)
    loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad[micro.mask].tolist(), [0, 0, 1])
    assert sums["importance_masked"] == 2


def test_on_the_only_update_of_a_step_weights_are_of_the_policy_itself_and_carry_no_gradient() -> None:
    micro = micro_batch(MIXED, has_old=False)
    logprobs = scores(micro, OLD)
    loss, _ = load_loss_fn(AlgorithmConfig(importance_cap=2.5))(logprobs, torch.zeros_like(logprobs), micro)
    loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad[micro.mask].tolist(), [-2.0, -0.5, 2.5])


# Metrics, whatever the loss


def alone(host: Tensor, op: object) -> Tensor:
    return host


def measured(micros: list[MicroBatch]) -> dict[str, float]:
    mismatch = Mismatch()
    for micro in micros:
        assert micro.old_logprobs is not None
        mismatch.see(torch.where(micro.mask, micro.old_logprobs, math.nan), micro)
    return {name: metric.value for name, metric in mismatch.metrics(alone, counts=True).items()}


def test_the_mismatch_by_hand() -> None:
    found = measured([micro_batch(MIXED)])
    logs = [math.log(ratio) for ratio in MIXED]
    close(found["gap"], sum(map(abs, logs)) / 3)
    close(found["gap_max"], math.log(3))
    assert (found["gap_newest"], found["gap_newest_max"]) == (found["gap"], found["gap_max"])  # all are
    close(found["gap_kl"], sum(ratio - 1 - log for ratio, log in zip(MIXED, logs, strict=True)) / 3)
    close(found["effective_sample_size"], 5.5**2 / (3 * (4 + 0.25 + 9)))


def test_the_newest_tokens_have_a_gap_of_their_own() -> None:
    micro = micro_batch(MIXED)
    assert micro.newest is None
    micro.newest = torch.zeros_like(micro.mask)
    micro.newest[micro.mask.nonzero()[:2]] = True  # those of ratio 2 and 0.5; what stands elsewhere is NaN
    found, logs = measured([micro]), [math.log(ratio) for ratio in MIXED]
    close(found["gap"], sum(map(abs, logs)) / 3)
    close(found["gap_max"], math.log(3))
    close(found["gap_newest"], math.log(2))
    close(found["gap_newest_max"], math.log(2))
    micro.newest[:] = False
    assert measured([micro]).keys() == found.keys() - {"gap_newest", "gap_newest_max"}  # of no tokens there is none


def test_the_newest_tokens_figures_are_those_of_a_whole_look_at_them_alone_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, whole = [], algorithm.logprob_gap

    def counted(*tensors: Tensor) -> dict[str, Tensor]:
        looks.append(tensors)
        return whole(*tensors)

    monkeypatch.setattr(algorithm, "logprob_gap", counted)
    generator = torch.Generator().manual_seed(5)
    micro = micro_batch(MIXED)
    micro.mask = torch.rand(997, generator=generator) < 0.7
    micro.newest = micro.mask & (torch.rand(997, generator=generator) < 0.3)
    micro.rollout_logprobs = -3 * torch.rand(997, generator=generator)
    old = torch.where(micro.mask, -3 * torch.rand(997, generator=generator), math.nan).requires_grad_()
    mismatch = Mismatch()
    mismatch.see(old, micro)
    of_newest = whole(old, micro.rollout_logprobs, micro.newest)
    of_all = whole(old, micro.rollout_logprobs, micro.mask)
    ((sums, largest),) = mismatch._seen
    names = ("gap", "gap_kl", "weight", "weight_squared", "tokens")
    assert sums.tolist() == [
        *(float(of_all[name]) for name in names),
        float(of_newest["gap"]),
        float(of_newest["tokens"]),
    ]
    assert largest.tolist() == [float(of_all["gap_max"]), float(of_newest["gap_max"])]
    assert float(of_newest["gap"]) < 0.5 * float(of_all["gap"])
    assert not (sums.requires_grad)
    assert not (largest.requires_grad)
    assert len(looks) == 1  # of all tokens; of the newest no weights and no divergence are worked out


def test_the_mismatch_does_not_depend_on_micro_batches() -> None:
    lengths = torch.tensor([3, 5, 4, 6])
    batch = TrainBatch(
        tokens=torch.arange(18),
        lengths=lengths,
        prompt_lengths=torch.tensor([1, 2, 1, 3]),
        rollout_logprobs=torch.linspace(-3.0, -1.0, 18),
        advantages=torch.ones(4),
        newest=torch.arange(18) % 5 < 2,
    )
    old = torch.linspace(-2.0, -1.5, 18)
    whole = measured([pack(batch, range(4), old_logprobs=old)])
    newest = [t for t in (1, 2, 5, 6, 7, 9, 10, 11, 15, 16, 17) if t % 5 < 2]  # responses' tokens
    apart = (old - batch.rollout_logprobs).abs()
    close(whole["gap_newest"], float(apart[newest].mean()))
    assert whole["gap_newest"] < 0.95 * whole["gap"]
    assert whole["effective_sample_size"] < 0.999  # else every share is one, and equal
    for cuts in ([0, 1, 4], [0, 2, 2, 3, 4]):
        packs = [pack(batch, range(a, b), old_logprobs=old) for a, b in pairwise(cuts)]
        close(measured(packs), whole)


def test_a_rank_that_repeats_another_s_tokens_counts_none() -> None:
    mismatch, micro = Mismatch(), micro_batch(MIXED)
    assert micro.old_logprobs is not None
    mismatch.see(micro.old_logprobs, micro)
    theirs = {
        dist.ReduceOp.SUM: torch.tensor([3.0, 1.0, 6.0, 12.0, 4.0, 0.5, 2.0]),
        dist.ReduceOp.MAX: torch.tensor([2.0, 0.375]),
    }

    def reduce(host: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        assert not host.any()
        return theirs[op]

    found = mismatch.metrics(reduce, counts=False)
    assert found["gap_max"] == Max(2.0)
    assert (found["gap_newest"], found["gap_newest_max"]) == (Mean(0.5, 2.0), Max(0.375))
    assert found["effective_sample_size"] == EffectiveShare(6.0, 12.0, 4.0)
    assert found["effective_sample_size"].value == 36 / 48
    mismatch.clear()
    assert mismatch._seen == []
