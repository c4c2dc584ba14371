"""The one place where a Verdict of somebody else's making becomes one of ours: every field is checked."""

from __future__ import annotations

import math
import numbers
from typing import Any

from nemo_dapo.types import MAX_SCORE, Verdict


def make_verdict(correct: Any, extracted: Any = None, error: Any = None, score: Any = None) -> Verdict:
    """A Verdict of these fields; ValueError names the first one that cannot be, its value and what was expected.

    NumPy's and torch's scalars count as the Python ones; an empty `error` is none.
    """
    correct = _plain(correct)
    if not isinstance(correct, bool):
        raise ValueError(f"correct={_shown(correct)} must be True or False")
    for name, value in (("extracted", extracted), ("error", error)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}={_shown(value)} must be a text or None")
    return Verdict(correct, extracted, error or None, None if score is None else _score(score))


def to_verdict(value: Any, *, correct_above: float = 0.0) -> Verdict:
    """A Verdict of what a reward function returned: a Verdict, a bool, or a number, correct where above `correct_above`.

    Raises ValueError for anything else.
    """
    if isinstance(value, Verdict):
        return make_verdict(value.correct, value.extracted, value.error, value.score)
    value = _plain(value)
    if isinstance(value, bool):
        return Verdict(correct=value)
    if not isinstance(value, numbers.Real):
        raise ValueError(f"the reward function returned {_shown(value)}; expected a Verdict, a bool or a number")
    score = _score(value)
    return Verdict(correct=score > correct_above, score=score)


def _score(value: Any) -> float:
    value = _plain(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_SCORE:  # not: NaN is unequal to everything
        raise ValueError(f"score={_shown(value)} must be a finite number within {MAX_SCORE:g} of 0")
    return float(value)


def _plain(value: Any) -> Any:
    """A Python scalar in place of a NumPy or torch one."""
    return value.item() if callable(getattr(value, "item", None)) else value


def _shown(value: Any) -> str:
    """The value for an error message: `repr` of a huge integer raises, and its length is nobody's interest."""
    if isinstance(value, int) and abs(value) > MAX_SCORE:
        return f"an integer of {int(math.log10(abs(value))) + 1} digits"
    return f"{value!r:.100}"
