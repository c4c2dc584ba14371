"""What a numeric option may be: declared where the option is, checked in one walk over the typed configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

Number = TypeVar("Number", int, float, "int | None", "float | None")

LARGEST_COUNT = 2**31 - 1  # of a whole number: what torch, NumPy's seeds and C libraries take alike
RANGE = "range"  # key in the metadata of a dataclass field


@dataclass(frozen=True)
class Range:
    """The finite values within four bounds; `also` holds others that have a meaning of their own, such as 0 = off."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    also: tuple[float, ...] = ()
    why: str = ""

    def __contains__(self, value: float) -> bool:
        within = self.at_least <= value <= self.at_most and self.above < value < self.below
        return value in self.also or (within and math.isfinite(value))

    def __str__(self) -> str:
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        bounds = [f"{word} {bound:.10g}" for word, bound in words.items() if math.isfinite(bound)]
        choices = [" and ".join(bounds) or "a finite number", *(f"{value:g}" for value in self.also)]
        return ", or ".join(choices) + (f" ({self.why})" if self.why else "")


def number(
    default: Number,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    also: tuple[float, ...] = (),
    why: str = "",
) -> Number:
    """A dataclass field for a number in this Range, never infinite or NaN; a whole one is at most LARGEST_COUNT."""
    if isinstance(default, int):
        at_most = min(at_most, LARGEST_COUNT)
    declared = Range(at_least, above, at_most, below, also, why)
    assert default is None or default in declared, f"the default {default} must be {declared}"
    value: Number = field(default=default, metadata={RANGE: declared})
    return value


def out_of_range(config: Any) -> Iterator[str]:
    """Every number of a typed configuration that its option may not be: full name, value, expectation, default.

    Numbers without a range, such as those passed through to Megatron-core and vLLM, must be finite.
    """
    for name, value, option in _numbers(config, "", None):
        declared = option.metadata.get(RANGE, Range()) if option else Range()
        if value not in declared:
            yield f"{name}={value} must be {declared}{_default(option)}"


def _numbers(value: Any, name: str, option: Field[Any] | None) -> Iterator[tuple[str, float, Field[Any] | None]]:
    """(full name, number, the field it was declared by) of all that `value` holds, however deep."""
    if is_dataclass(value):
        for inner in fields(value):
            yield from _numbers(getattr(value, inner.name), f"{name}.{inner.name}".lstrip("."), inner)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}", option)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{name}[{i}]", option)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value, option


def _default(option: Field[Any] | None) -> str:
    if option is None or RANGE not in option.metadata:
        return ""
    return f"; the default is {'null' if option.default is None else option.default}"
