"""What trees are worth: exactly where they are rational, else by mpmath at points of their variables.

Two trees are equal when they are the same rational number, or agree at every point relative to their own size. The digits
carried grow with the largest and smallest number met on the way, so that `1 - 2^{-300}` under a root is still told from 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from nemo_dapo.rewards.math.reader import DEGREE, FUNCTIONS, Tree, names

MAX_BITS = 20_000  # of an exact number
MAX_SIZE = 700  # decimal exponent of any number met; beyond, a tree is unreadable
_POINTS = 3  # values of the variables: positive and negative ones
_FIRST_DIGITS = 40

_MPMATH_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "fabs"}
_UNARY = (*FUNCTIONS, "abs", "floor", "ceil")


class OutOfReachError(ArithmeticError):
    """A number too large, too small or undefined: the tree has no value here."""


def same_value(answer: Tree, truth: Tree) -> bool:
    """Whether two trees are equal wherever their variables stand."""
    ours, theirs = exact(answer), exact(truth)
    if ours is not None and theirs is not None:
        return ours == theirs
    return any(all(_near(a, t) for a, t in pairs) for pairs in _readings(answer, truth))


def proportional(answer: Tree, truth: Tree) -> int:
    """Sign of the real constant c with `answer = c * truth`: two relations of such sides are one; 0 where there is none.

    What vanishes (an identity) or does not depend on a variable is proportional to nothing.
    """
    if not names(answer) or names(answer) != names(truth):
        return 0
    for pairs in _readings(answer, truth):
        (a0, t0), *others = pairs
        if not all(a and t for a, t in pairs) or all(_near(t, t0) for _, t in others):
            continue
        factor = a0 / t0
        if abs(factor.imag) < abs(factor) * 1e-20 and all(_near(a * t0, a0 * t) for a, t in others):
            return 1 if factor.real > 0 else -1
    return 0


def constant(tree: Tree) -> Fraction | None:
    """The value of a real tree without variables: exact, or to 40 digits."""
    value = exact(tree)
    if value is not None or names(tree):
        return value
    try:
        number = _value(tree, _Numbers(_FIRST_DIGITS, 0, "ln"))
    except OutOfReachError:
        return None
    if abs(number.imag) > 1e-30 * abs(number) or not number:
        return None
    sign, mantissa, exponent, _ = number.real._mpf_
    return (-1) ** sign * int(mantissa) * Fraction(2) ** exponent


@lru_cache(maxsize=4096)
def exact(tree: Tree) -> Fraction | None:
    """The rational number that a tree writes with integers, decimals, four operations, powers, factorials; else None."""
    try:
        return _exact(tree)
    except (OutOfReachError, ZeroDivisionError):
        return None


def _exact(tree: Tree) -> Fraction:
    head = tree[0]
    if head == "number":
        return Fraction(tree[1])
    if head not in ("+", "-", "*", "/", "^", "!", "binom", "abs", "floor", "ceil"):
        raise OutOfReachError(head)
    args = [_exact(part) for part in tree[1:]]
    value = _operate(head, args)
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise OutOfReachError("too many digits")
    return value


def _operate(head: str, args: list[Fraction]) -> Fraction:
    first, last = args[0], args[-1]
    if head == "+":
        return first + last
    if head == "-":
        return first - last
    if head == "*":
        return first * last
    if head == "/":
        return first / last
    if head == "^":
        return _power(first, last)
    if head == "abs":
        return abs(first)
    if head in ("floor", "ceil"):
        return Fraction(first.__floor__() if head == "floor" else first.__ceil__())
    if head == "!":
        return Fraction(_factorial(first))
    n, k = first, last
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n:
        raise OutOfReachError("binomial")
    return Fraction(_factorial(n), _factorial(k) * _factorial(n - k))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise OutOfReachError("a root")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > MAX_BITS:
        raise OutOfReachError("too many digits")
    return base ** int(exponent)


def _factorial(n: Fraction) -> int:
    if n.denominator != 1 or not 0 <= n <= 2_000:
        raise OutOfReachError("factorial")
    return int(mpmath.libmp.ifac(int(n)))


def _readings(answer: Tree, truth: Tree) -> Iterator[list[tuple[Any, Any]]]:
    """Both values at every point; twice when a `\\log` without a base may mean either, the same one on both sides."""
    for log in ("ln", "log10") if _has(answer, "log") or _has(truth, "log") else ("ln",):
        try:
            yield _pairs(answer, truth, log)
        except OutOfReachError:
            continue


def _pairs(answer: Tree, truth: Tree, log: str) -> list[tuple[Any, Any]]:
    """Both values at every point, to the digits that the sizes met call for."""
    points = range(_POINTS if names(answer) or names(truth) else 1)
    rough = [_Numbers(_FIRST_DIGITS, point, log) for point in points]
    for numbers in rough:
        for tree in (answer, truth):
            _value(tree, numbers)
    digits = 60 + 3 * max(numbers.size for numbers in rough)
    fine = [(_Numbers(digits, point, log), _Numbers(digits + 40, point, log)) for point in points]
    return [(_settled(answer, *numbers), _settled(truth, *numbers)) for numbers in fine]


def _settled(tree: Tree, fine: _Numbers, finer: _Numbers) -> Any:
    """The value with `finer` numbers, or 0 where forty more digits make it smaller by twenty: that is rounding noise."""
    value = _value(tree, finer)
    return value * 0 if value and abs(value) * 10**20 < abs(_value(tree, fine)) else value


def _near(a: Any, t: Any) -> bool:
    """Whether two numbers share two thirds of the digits carried."""
    return a == t or bool(abs(a - t) * 10 ** (2 * a.context.dps // 3) <= max(abs(a), abs(t)))


def _has(tree: Tree, head: str) -> bool:
    return tree[0] == head or any(_has(part, head) for part in tree[1:] if isinstance(part, tuple))


class _Numbers:
    """Arithmetic of `digits` digits at one point, which keeps the largest decimal exponent it has met."""

    def __init__(self, digits: int, point: int, log: str) -> None:
        self.context = _context(digits)
        self.point = point
        self.log = log
        self.size = 0

    def met(self, value: Any) -> Any:
        """`value`, counted. Raises OutOfReachError for one that is undefined, too large or too small."""
        parts = [part for part in (value.real, value.imag) if part]
        if not all(self.context.isfinite(part) for part in parts):
            raise OutOfReachError("undefined")
        size = max((abs(self.context.mag(part)) for part in parts), default=0) * 3 // 10
        if size > MAX_SIZE:
            raise OutOfReachError("too large or too small")
        self.size = max(self.size, size)
        return value

    def named(self, name: str, arguments: tuple[Any, ...] = ()) -> Any:
        """pi, e, i, or a number fixed by the name, its arguments and the point: irrational-looking, of either sign."""
        if name in ("pi", "e"):
            return self.context.mpc(getattr(self.context, name))
        if name == "i":
            return self.context.mpc(0, 1)
        given = ",".join(self.context.nstr(argument, 25) for argument in arguments)
        draw = hashlib.sha256(f"{name}({given}):{self.point}".encode()).digest()
        sign = 1 if self.point == 0 or draw[16] % 2 else -1
        return self.context.mpc(sign * int.from_bytes(draw[:8], "big") + 1) / (1 << 62)


@lru_cache(maxsize=256)
def _context(digits: int) -> Any:
    context = mpmath.MPContext()
    context.dps = digits
    return context


def _value(tree: Tree, numbers: _Numbers) -> Any:
    try:
        return _compute(tree, numbers)
    except (ZeroDivisionError, ValueError, OverflowError, NotImplementedError) as error:
        raise OutOfReachError(str(error)) from error


def _compute(tree: Tree, numbers: _Numbers) -> Any:
    head, context = tree[0], numbers.context
    if head == "number":
        return numbers.met(context.mpc(context.mpf(tree[1])))
    if head == "name":
        return numbers.named(tree[1])
    if head == "apply":
        return numbers.named(tree[1], tuple(_compute(part, numbers) for part in tree[2:]))
    args = [_compute(part, numbers) for part in tree[1:]]
    return numbers.met(context.mpc(_calculate(head, args, numbers)))


def _calculate(head: str, args: list[Any], numbers: _Numbers) -> Any:
    context, first, last = numbers.context, args[0], args[-1]
    if head in _UNARY:
        if head in ("floor", "ceil") and abs(first - context.nint(first.real)) < context.mpf(10) ** -20:
            return context.nint(first.real)
        return getattr(context, _MPMATH_NAMES.get(head, head))(first)
    if head == "log":
        return context.ln(first) / (context.ln(10) if numbers.log == "log10" else 1)
    if head == "!":
        return context.gamma(_small(first) + 1)
    if head == DEGREE:
        return first * context.pi / 180
    if head == "binom":
        return context.binomial(_small(first), _small(last))
    if head == "^":
        return _raise(first, last, numbers)
    return {"+": first.__add__, "-": first.__sub__, "*": first.__mul__, "/": first.__truediv__}[head](last)


def _raise(base: Any, exponent: Any, numbers: _Numbers) -> Any:
    if base and abs(exponent) * abs(numbers.context.mag(base)) > 4 * MAX_SIZE and abs(base - 1) > 1e-9:
        raise OutOfReachError("too large a power")
    return base**exponent


def _small(value: Any) -> Any:
    if abs(value) > 500:
        raise OutOfReachError("too large a factorial")
    return value
