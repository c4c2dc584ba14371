"""Numbers as people write them, read exactly: signs, thousands, fractions, mixed numbers, powers of ten, units, percent.

The rule of equality (`same_quantity`), from the strictest case on:
  - a whole-number truth is matched by that number alone: tolerance zero;
  - two exact values are compared as fractions: 0.5 = 1/2 = 50 %;
  - a truth without finite decimals (1/3) is matched by its decimals, rounded or cut, from 4 significant digits on
    (0.3333): relative error at most 1e-3, far below the effect of a wrong digit;
  - of two decimals the longer may round to the shorter when that has 5 significant digits and 4 decimals: relative error
    5e-5, within the 1e-4 of Qwen2.5-Math's evaluation; or when the longer is a double printed in full (15 digits and
    more) within 1e-12 of one of at most 12 digits.
Percent: 50% is 0.5, and 50 where the truth leaves the sign out. Known units must agree when both sides name one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from nemo_dapo.rewards.math.units import agree, currency_unit, read_unit

MAX_DIGITS = 200  # of one number; Python integers of this size cost nothing
MAX_EXPONENT = 400  # of a power of ten

_INT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_SIGNED = rf"[+-]? ?{_DECIMAL}"
_TEN_TO = r"10 ?(?:\^|\*\*) ?[{(]?([+-]?[0-9]{1,4})[})]?"

_SIMPLE = re.compile(r"-?[0-9]{1,18}")
_PREFIX = re.compile(r"([+-]?) ?((?:US ?\$|\$|[€£¥₹]|USD|Rs\.?|INR|EUR|GBP)?) ?(-?) ?")
_MIXED = re.compile(r"([0-9]+) ?\\frac\{ ?([0-9]+) ?\}\{ ?([0-9]+) ?\}|([0-9]+) ([0-9]+) ?/ ?([0-9]+)")
_RATIO = re.compile(
    rf"\\frac\{{ ?({_SIGNED}) ?\}}\{{ ?({_SIGNED}) ?\}}|({_DECIMAL}) ?/ ?({_SIGNED})|\(({_SIGNED})\) ?/ ?\(({_SIGNED})\)"
)
_SCIENTIFIC = re.compile(rf"({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,4}})(?![0-9])| ?\* ?{_TEN_TO})|{_TEN_TO}")
_NUMBER = re.compile(_DECIMAL)
_REPEATING = re.compile(
    r"([0-9]*)\.(?:([0-9]*)\\(?:overline|bar|dot) ?\{? ?([0-9]+) ?\}?|([0-9]*?(?:([0-9]{1,2})\5\5+))(?:\.\.\.))"
)
_DOTTED = re.compile(r"([0-9]*?)([0-9]{1,2})\2\2+")


@dataclass(frozen=True)
class Quantity:
    """An exact value with how it was written: `decimals` after the point (None for a fraction), `significant` digits."""

    value: Fraction
    decimals: int | None = None
    significant: int = 0
    percent: bool = False
    unit: str = ""


@lru_cache(maxsize=8192)
def parse_quantity(text: str) -> Quantity | None:
    """The number that `text` (normalised) is, with its unit; None when it is anything else, or over the size limits."""
    if _SIMPLE.fullmatch(text):
        return Quantity(Fraction(int(text)), 0, len(text))
    if len(text) > 2 * MAX_DIGITS or not any(c in "0123456789" for c in text[:60]):
        return None
    prefix = _PREFIX.match(text)
    sign = -1 if prefix and "-" in (prefix[1], prefix[3]) else 1
    start = prefix.end() if prefix else 0
    found = _read_mixed(text, start) or _read_ratio(text, start) or _read_scientific(text, start)
    found = found or _read_repeating(text, start) or _read_number(text, start)
    if found is None:
        return None
    quantity, end = found
    currency = prefix[2].strip() if prefix else ""
    return _with_unit(quantity, sign, currency, text[end:])


def same_quantity(answer: Quantity, truth: Quantity) -> bool:
    """Whether `answer` is `truth` by the rule in this module's docstring."""
    if not agree(answer.unit, truth.unit):
        return False
    if answer.percent == truth.percent:
        return _same_value(answer, truth)
    hundredth = Fraction(1, 100)
    if answer.percent:  # the truth may be the bare figure, or the ratio
        return _same_value(answer, truth) or answer.value * hundredth == truth.value
    return _same_value(answer, truth) or answer.value == truth.value * hundredth


def _same_value(answer: Quantity, truth: Quantity) -> bool:
    if answer.value == truth.value:
        return True
    if truth.value.denominator == 1 or answer.value.denominator == 1:
        return False
    if answer.decimals is None:  # an exact answer to a decimal truth (22/7 for 3.142857)
        return is_rounded(truth, answer.value)
    if truth.decimals is None:
        return not _terminates(truth.value) and answer.significant >= 4 and _is_rounding(answer, truth.value)
    short, long = sorted((answer, truth), key=lambda q: q.significant)
    if long.significant >= 15 and short.significant <= 12:
        return abs(long.value - short.value) <= abs(short.value) * Fraction(1, 10**12)
    enough = short.significant >= 5 and (short.decimals or 0) >= 4
    return enough and long.significant > short.significant and _is_rounding(short, long.value, cut=False)


def _terminates(value: Fraction) -> bool:
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _is_rounding(short: Quantity, value: Fraction, cut: bool = True) -> bool:
    """Whether `short` is `value` rounded (or cut) at the last digit `short` shows."""
    scale = 10 ** (short.decimals or 0)
    error = abs(short.value - value) * scale
    return error <= Fraction(1, 2) or (cut and error < 1 and abs(short.value) < abs(value))


def is_decimal_of(quantity: Quantity, value: Fraction) -> bool:
    """Whether a written decimal is the irrational `value` (given to many digits), as for 1/3."""
    if quantity.decimals is None or quantity.significant < 4 or quantity.value.denominator == 1:
        return False
    return _is_rounding(quantity, value)


def is_rounded(truth: Quantity, value: Fraction) -> bool:
    """Whether a decimal truth of 5 significant digits and 4 decimals is the exact `value`, rounded; or a double of it."""
    if truth.decimals is None or truth.decimals < 4 or truth.significant < 5 or truth.value.denominator == 1:
        return False
    if truth.significant >= 15:
        return abs(truth.value - value) <= abs(value) * Fraction(1, 10**14)
    return _is_rounding(truth, value, cut=False)


def _with_unit(quantity: Quantity, sign: int, currency: str, rest: str) -> Quantity | None:
    attached, rest = rest[:1], rest.strip()
    if attached.isalpha() and len(rest) == 1:
        return None
    if not rest:
        unit, scale, percent = "", 1, False
    else:
        found = read_unit(rest)
        if found is None:
            return None
        unit, scale, percent = found
    if currency:
        unit = unit or currency_unit(currency)
    decimals = quantity.decimals if scale == 1 else None
    return Quantity(sign * scale * quantity.value, decimals, quantity.significant, percent, unit)


def _decimal(text: str) -> Quantity | None:
    """`-1,234.50` exactly; None over `MAX_DIGITS`."""
    digits = text.replace(",", "").replace(" ", "")
    if len(digits) > MAX_DIGITS:
        return None
    whole, _, fraction = digits.partition(".")
    significant = len((whole + fraction).lstrip("+-0"))
    value = Fraction(
        int(f"{whole or '0'}{fraction}" if whole not in "+-" else f"{whole}0{fraction}"), 10 ** len(fraction)
    )
    return Quantity(value, len(fraction), significant)


def _read_mixed(text: str, start: int) -> tuple[Quantity, int] | None:
    match = _MIXED.match(text, start)
    if match is None or len(match.group()) > MAX_DIGITS:
        return None
    whole, top, bottom = (int(part) for part in match.groups() if part is not None)
    return (Quantity(whole + Fraction(top, bottom)), match.end()) if bottom else None


def _read_ratio(text: str, start: int) -> tuple[Quantity, int] | None:
    match = _RATIO.match(text, start)
    if match is None:
        return None
    top, bottom = (_decimal(part) for part in match.groups() if part is not None)
    if top is None or bottom is None or bottom.value == 0:
        return None
    return Quantity(top.value / bottom.value), match.end()


def _read_scientific(text: str, start: int) -> tuple[Quantity, int] | None:
    match = _SCIENTIFIC.match(text, start)
    if match is None:
        return None
    exponent = int(match[2] or match[3] or match[4])
    mantissa = _decimal(match[1] or "1")
    if mantissa is None or abs(exponent) > MAX_EXPONENT:
        return None
    value = mantissa.value * Fraction(10) ** exponent
    return Quantity(value, max((mantissa.decimals or 0) - exponent, 0), mantissa.significant), match.end()


def _read_repeating(text: str, start: int) -> tuple[Quantity, int] | None:
    """`0.1\\overline{6}` and `0.333...`, exactly."""
    match = _REPEATING.match(text, start)
    if match is None or len(match.group()) > MAX_DIGITS:
        return None
    whole, before, block = match[1] or "0", match[2] or "", match[3]
    if block is None:  # dots: the last digit, or pair of digits, has been written three times
        before, block = _DOTTED.fullmatch(match[4]).groups()  # type: ignore[union-attr]
    scale = 10 ** len(before)
    value = Fraction(int(whole + before), scale) + Fraction(int(block), scale * (10 ** len(block) - 1))
    return Quantity(value), match.end()


def _read_number(text: str, start: int) -> tuple[Quantity, int] | None:
    match = _NUMBER.match(text, start)
    number = _decimal(match.group()) if match else None
    return (number, match.end()) if match and number else None
