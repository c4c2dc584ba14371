"""Every number of the schema has a range, declared where the option is, and nothing outside it starts a run."""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_dapo import config as schema
from nemo_dapo import entry
from nemo_dapo.config import DataSetConfig, RewardTermConfig, RunConfig, validate, validate_evaluation
from nemo_dapo.config.ranges import LARGEST_COUNT, RANGE, Range, number, out_of_range

CONF = Path(__file__).parents[1] / "conf" / "config.yaml"


@dataclass
class Inner:
    rate: float = number(0.5, at_least=0)
    count: int = number(1)
    bound: float | None = number(None, above=1)


@dataclass
class Outer:
    inner: dict[str, Inner] = field(default_factory=dict)


def full() -> RunConfig:
    """A configuration with an entry in every dict of dataclasses, so that the walk meets every option there is."""
    run = RunConfig()
    run.model.path = "somewhere"
    run.data.train["mine"] = DataSetConfig(format="columns")
    run.data.eval["held.out"] = DataSetConfig(format="columns")
    run.reward.extra["style"] = RewardTermConfig(function="module:name")
    return run


def classes(schema_class: type) -> Iterator[type]:
    """`schema_class` and every dataclass that its annotations mention."""
    yield schema_class
    for annotation in typing.get_type_hints(schema_class).values():
        for part in (annotation, *typing.get_args(annotation)):
            if is_dataclass(part):
                yield from classes(typing.cast(type, part))


def mentions_a_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(mentions_a_number(part) for part in typing.get_args(annotation))


def places(value: Any, name: str = "") -> Iterator[tuple[str, Any, str, Range]]:
    """(full name, the object that holds it, its attribute, its range) of every option with a range below `value`."""
    for option in fields(value):
        here, inner = f"{name}.{option.name}".lstrip("."), getattr(value, option.name)
        if RANGE in option.metadata:
            yield here, value, option.name, option.metadata[RANGE]
        for below, item in {
            here: inner,
            **({f"{here}.{k}": v for k, v in inner.items()} if isinstance(inner, dict) else {}),
        }.items():
            if is_dataclass(item):
                yield from places(item, below)


NAMES = [name for name, *_ in places(full())]


def test_every_number_of_the_schema_declares_its_range() -> None:
    undeclared = [
        f"{one.__name__}.{option.name}"
        for one in classes(RunConfig)
        for option in fields(one)
        if mentions_a_number(typing.get_type_hints(one)[option.name]) and RANGE not in option.metadata
    ]
    assert undeclared == []
    assert len(NAMES) > 60  # the walk above meets them all


def test_a_number_without_a_range_would_be_found() -> None:
    assert [mentions_a_number(kind) for kind in (int, float | None, dict[str, float], str, bool, dict[str, str])] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def probes(declared: Range, default: float | None) -> list[float]:
    """What users write by mistake: 0, negative, one beyond each bound, infinite, NaN, huge."""
    step = 1 if isinstance(default, int) else 1e-3
    bounds = [
        bound for bound in (declared.at_least, declared.above, declared.at_most, declared.below) if math.isfinite(bound)
    ]
    around = [type(step)(bound) + sign * step for bound in bounds for sign in (-1, 1)]
    return [0, -1, -5, *around, math.inf, -math.inf, math.nan, 1e300, 10**30, -(10**30)]


def allowed(declared: Range, value: float) -> bool:
    """The range's meaning, written out once more and otherwise."""
    if value in declared.also:
        return True
    if math.isnan(value) or math.isinf(value):
        return False
    return not (
        value < declared.at_least or value <= declared.above or value > declared.at_most or value >= declared.below
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_out_of_range_is_refused_by_name_value_expectation_and_default(name: str) -> None:
    run = full()
    holder, attribute, declared = next(rest for place, *rest in places(run) if place == name)
    default = getattr(holder, attribute)
    refused = 0
    for value in probes(declared, default):
        setattr(holder, attribute, value)
        complaints = list(out_of_range(run))
        if allowed(declared, value):
            assert complaints == []
            continue
        refused += 1
        (line,) = complaints
        assert line == f"{name}={value} must be {declared}; the default is {'null' if default is None else default}"
        for check in (validate, validate_evaluation):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared
                check(copy.deepcopy(run), 1)
            assert str(caught.value) == f"configuration:\n  - {line}"
    assert refused >= 3  # infinite twice, NaN


@pytest.mark.parametrize(
    "argument",
    [
        "checkpoint.every=-1", "checkpoint.keep=-1", "evaluation.every=-1", "trainer.max_steps=0",
        "rollout.num_servers=0", "rollout.max_concurrent_sequences=0", "rollout.max_prompt_length=0",
        "rollout.temperature=nan", "rollout.temperature=0", "rollout.top_p=1.5", "rollout.top_p=0", "rollout.top_k=-2",
        "rollout.max_logprob_gap=-1", "rollout.port=99999", "rollout.sync_timeout=inf", "rollout.vllm.seed_of_mine=nan",
        "algorithm.max_attempts=inf", "algorithm.clip_low=1.5", "algorithm.kl_coeff=nan", "algorithm.group_size=1",
        "algorithm.importance_cap=0.5", "algorithm.dual_clip=1", "optimizer.lr=0", "optimizer.lr=inf",
        "optimizer.adam_beta2=1.5", "optimizer.warmup_steps=-1", "optimizer.max_refused_updates=0",
        "reward.correct=inf", "reward.overlong.factor=-1", "evaluation.max_response_length=-5",
        "data.train.arithmetic.weight=0", "data.train.arithmetic.weight=inf", "data.train.arithmetic.max_problems=-5",
        "logger.rollout_every=-1", "parallel.timeout_minutes=0", "seed=4294967296",
    ],
)  # fmt: skip
def test_a_command_line_with_a_number_out_of_range_is_refused(argument: str) -> None:
    schema.register()
    run = entry.composed(CONF, ["experiment=demo", f"++{argument}"])
    assert run is not None
    name, _, _ = argument.partition("=")
    with pytest.raises(ValueError, match=f"  - {name}=.* must be "):
        validate(run, 1)


def test_every_number_out_of_range_is_told_at_once() -> None:
    run = full()
    run.optimizer.lr = math.nan
    run.data.eval["held.out"].weight = -1.0
    run.model.megatron = {"layernorm_epsilon": math.inf, "window": [1, math.nan]}
    assert [line.partition(" must be ")[0] for line in out_of_range(run)] == [
        "model.megatron.layernorm_epsilon=inf",
        "model.megatron.window[1]=nan",
        "optimizer.lr=nan",
        "data.eval.held.out.weight=-1.0",
    ]


def test_a_range_is_told_in_words() -> None:
    assert str(Range(above=0, at_most=1)) == "above 0 and at most 1"
    assert str(Range(at_least=1, also=(-1, 0), why="0 = off")) == "at least 1, or -1, or 0 (0 = off)"
    assert str(Range()) == "a finite number"


def test_a_default_out_of_its_own_range_is_a_defect_of_the_schema() -> None:
    with pytest.raises(AssertionError, match="the default 2 must be at most 1"):
        number(2, at_most=1)


def test_a_declared_range_survives_composition() -> None:
    given = {"inner": {"a": {"rate": "-1e-4", "count": 2**31, "bound": 1}}}
    merged = OmegaConf.merge(OmegaConf.structured(Outer), given)
    assert list(out_of_range(OmegaConf.to_object(merged))) == [
        "inner.a.rate=-0.0001 must be at least 0; the default is 0.5",
        f"inner.a.count=2147483648 must be at most {LARGEST_COUNT}; the default is 1",
        "inner.a.bound=1.0 must be above 1; the default is null",
    ]
