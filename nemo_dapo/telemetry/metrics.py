"""Metrics whose reduction is their type, so that micro-batches and ranks add up in one way only.

    Mean(6.0, 3) + Mean(1.0, 1) -> 7 / 4, not the mean of 2 and 1

A record maps names to metrics. Names are namespaced: `rollout/...`, `train/...`, `eval/...`, `time/...` (seconds).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import torch.distributed as dist

from nemo_dapo.collectives import gather_json


@dataclass(frozen=True)
class Mean:
    """`total / count`; NaN when nothing was counted. Keep sums, never averages: only sums add up."""

    total: float
    count: float

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class EffectiveShare:
    """Effective sample size of importance weights, (sum w)^2 / sum w^2, as a share of their `count`; NaN of none."""

    weights: float
    squares: float
    count: float

    def merge(self, other: EffectiveShare) -> EffectiveShare:
        return EffectiveShare(self.weights + other.weights, self.squares + other.squares, self.count + other.count)

    @property
    def value(self) -> float:
        return self.weights**2 / (self.squares * self.count) if self.squares else math.nan


@dataclass(frozen=True)
class Sum:
    value: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


@dataclass(frozen=True)
class Max:
    """The larger value; NaN wins, since it must be seen."""

    value: float

    def merge(self, other: Max) -> Max:
        return self if math.isnan(self.value) or self.value >= other.value else other


@dataclass(frozen=True)
class Min:
    """The smaller value; NaN wins, since it must be seen."""

    value: float

    def merge(self, other: Min) -> Min:
        return self if math.isnan(self.value) or self.value <= other.value else other


@dataclass(frozen=True)
class Last:
    """The value of the last record merged: a learning rate, a version. Equal on all ranks, or it is the wrong type."""

    value: float

    def merge(self, other: Last) -> Last:
        return other


Metric = Mean | EffectiveShare | Sum | Max | Min | Last
Record = Mapping[str, Metric]
KINDS: dict[str, type[Metric]] = {kind.__name__: kind for kind in (Mean, EffectiveShare, Sum, Max, Min, Last)}


def merge(records: Iterable[Record]) -> dict[str, Metric]:
    """One record of several; a name may be absent in some. Raises ValueError when a name changes its type."""
    merged: dict[str, Metric] = {}
    for record in records:
        for name, metric in record.items():
            before = merged.get(name)
            if before is not None and type(before) is not type(metric):
                raise ValueError(
                    f"metric {name!r} is a {type(before).__name__} in one record and a {type(metric).__name__} in another: "
                    f"reduce it in one way everywhere"
                )
            merged[name] = metric if before is None else before.merge(metric)  # type: ignore[arg-type]
    return merged


def merge_across_ranks(record: Record, group: dist.ProcessGroup | None = None) -> dict[str, Metric]:
    """The records of all ranks of `group` merged in rank order, on every rank. Collective where torch.distributed runs."""
    if not dist.is_initialized():
        return dict(record)
    plain = {name: [type(metric).__name__, *astuple(metric)] for name, metric in record.items()}
    everyone = gather_json(plain, group)
    return merge({name: KINDS[kind](*numbers) for name, (kind, *numbers) in one.items()} for one in everyone)


def values(record: Record) -> dict[str, float]:
    return {name: float(metric.value) for name, metric in record.items()}
