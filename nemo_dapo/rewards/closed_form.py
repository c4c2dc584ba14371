"""Closed-form expressions (`\\frac{1+\\sqrt{5}}{2}`, `2x^2-1`) read by a small grammar and compared by their values.

Two expressions are equal when they agree to 40 digits at three points of their variables; doubles at the same points refuse
most unequal pairs first, and refuse whatever overflows them, so no tower of powers ever reaches the exact arithmetic.
Nothing here evaluates text: the grammar knows numbers, letters, four operations, powers, roots and a few functions.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_TOKENS = 300
MAX_DEPTH = 24
DEGREE = "°"
_LARGEST = 1e300
_DIGITS = 50  # of the exact comparison; agreement is asked to 40

_FUNCTIONS = ("sin", "cos", "tan", "exp", "ln", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
_GREEK_LETTERS = """alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi
varphi chi psi omega"""
_GREEK = frozenset(_GREEK_LETTERS.split())
_TOKEN = re.compile(
    r"\\?(?:sqrt|frac|binom|pi|" + "|".join(sorted(_FUNCTIONS, key=len, reverse=True)) + r"|log)(?![a-z])"
    r"|\\[A-Za-z]+|[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]|\S"
)

Tree = tuple[Any, ...]


class UnreadableError(ValueError):
    """The text is not in the grammar, or too large: the caller judges it by other means."""


@lru_cache(maxsize=4096)
def parse(text: str) -> Tree | None:
    """Syntax tree of a normalised text, None when it is not a closed form within the limits."""
    tokens = _TOKEN.findall(text) if len(text) <= 4 * MAX_TOKENS and text.replace(DEGREE, "").isascii() else []
    if not tokens or len(tokens) > MAX_TOKENS:
        return None
    try:
        reader = _Reader(tokens)
        tree = reader.sum(0)
        return tree if reader.at == len(tokens) else None
    except (UnreadableError, IndexError):
        return None


def same_value(answer: Tree, truth: Tree) -> bool | None:
    """Whether two expressions agree at every point; None when doubles cannot hold them."""
    return _agree(answer, truth, ratio=False)


def proportional(answer: Tree, truth: Tree) -> bool | None:
    """Whether `answer` is a constant times `truth`: the two equations `answer = 0`, `truth = 0` are the same."""
    return _agree(answer, truth, ratio=True)


def constant(tree: Tree) -> Fraction | None:
    """The value of a real expression without variables, to 50 digits."""
    if _names(tree) or _value(tree, _DOUBLES, 0) is None:
        return None
    exact = _value(tree, _exact(), 0)
    if exact is None or exact != exact or abs(exact.imag) > 1e-40:
        return None
    sign, mantissa, exponent, _ = exact.real._mpf_
    return (-1) ** sign * int(mantissa) * Fraction(2) ** exponent


def _agree(answer: Tree, truth: Tree, ratio: bool) -> bool | None:
    for arithmetic, tolerance in ((lambda: _DOUBLES, 1e-7), (_exact, 1e-40)):
        pairs = [(_value(answer, arithmetic(), p), _value(truth, arithmetic(), p)) for p in range(3)]
        if any(a is None or t is None for a, t in pairs):
            return None
        scale = _scale(pairs) if ratio else 1
        if not scale or not all(abs(a - scale * t) <= tolerance * max(abs(a), abs(scale * t), 1) for a, t in pairs):
            return False
    return True


def _scale(pairs: list[tuple[Any, Any]]) -> Any:
    first, second = pairs[0]
    return first / second if second else 0


class _Reader:
    """Recursive descent over tokens; `depth` bounds the recursion."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.tokens[self.at]
        if expected and token != expected:
            raise UnreadableError(token)
        self.at += 1
        return token

    def sum(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        left = self.product(depth)
        while self.peek() in ("+", "-"):
            left = (self.take(), left, self.product(depth))
        return left

    def product(self, depth: int) -> Tree:
        left = self.signed(depth)
        while True:
            token = self.peek()
            if token in ("*", "/"):
                left = (self.take(), left, self.signed(depth))
            elif token and _starts_atom(token):
                left = self.adjacent(left, depth)
            else:
                return left

    def adjacent(self, left: Tree, depth: int) -> Tree:
        """Juxtaposition: a product, or a mixed number (`3\\frac{1}{2}`)."""
        if self.peek()[0].isdigit() or self.peek()[0] == ".":
            raise UnreadableError("two numbers side by side")
        right = self.power(depth)
        plain = left[0] == "number" and right[0] == "/" and all(part[0] == "number" for part in right[1:])
        return ("+" if plain else "*", left, right)

    def signed(self, depth: int) -> Tree:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        value = self.power(depth)
        return ("-", ("number", "0"), value) if sign < 0 else value

    def power(self, depth: int) -> Tree:
        base = self.atom(depth)
        while self.peek() in ("!", DEGREE):
            base = (self.take(), base)
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.argument(depth) if self.peek() == "{" else self.signed(depth + 1)
        return ("^", base, exponent)

    def argument(self, depth: int) -> Tree:
        """`{…}`."""
        self.take("{")
        inside = self.sum(depth + 1)
        self.take("}")
        return inside

    def atom(self, depth: int) -> Tree:
        token = self.take()
        name = token.lstrip("\\")
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return ("number", token.replace(",", ""))
        if token in "({[":
            inside = self.sum(depth + 1)
            self.take({"(": ")", "{": "}", "[": "]"}[token])
            return inside
        if name in ("frac", "binom", "sqrt", "log") or name in _FUNCTIONS:
            return self.call(name, depth)
        if name == "pi" or (token.startswith("\\") and name in _GREEK) or (len(token) == 1 and token.isalpha()):
            return self.variable(name)
        raise UnreadableError(token)

    def variable(self, name: str) -> Tree:
        if self.peek() == "_":
            self.take()
            name += "_" + (self.subscript() if self.peek() == "{" else self.take())
        return ("name", name)

    def subscript(self) -> str:
        self.take("{")
        parts = []
        while self.peek() != "}":
            parts.append(self.take())
        self.take("}")
        return "".join(parts)

    def call(self, name: str, depth: int) -> Tree:
        if name in ("frac", "binom"):
            return ("/" if name == "frac" else name, self.argument(depth), self.argument(depth))
        if name == "sqrt":
            return self.root(depth)
        if name == "log":
            return self.logarithm(depth)
        power = None
        if self.peek() == "^":  # \sin^2 x
            self.take()
            power = self.argument(depth) if self.peek() == "{" else self.atom(depth)
            if power[0] != "number":  # \sin^{-1}: inverse or reciprocal, who knows
                raise UnreadableError(name)
        inside = self.operand(depth)
        return ("^", (name, inside), power) if power else (name, inside)

    def operand(self, depth: int) -> Tree:
        """What a function applies to: a bracket, or the factors that follow it (`\\sin 2x`)."""
        if self.peek() in ("(", "{", "["):
            return self.atom(depth + 1)
        value = self.power(depth + 1)
        while self.peek() and _starts_atom(self.peek()) and self.peek() not in ("(", "[", "{"):
            if self.peek().lstrip("\\") in _FUNCTIONS:
                break
            value = self.adjacent(value, depth + 1)
        return value

    def root(self, depth: int) -> Tree:
        degree: Tree = ("number", "2")
        if self.peek() == "[":
            degree = self.atom(depth)
        inside = self.atom(depth)
        return ("^", inside, ("/", ("number", "1"), degree))

    def logarithm(self, depth: int) -> Tree:
        """`\\log_b x`; without a base it may mean e or 10, which is left to the symbolic comparison."""
        self.take("_")
        base = self.argument(depth) if self.peek() == "{" else self.atom(depth)
        return ("/", ("ln", self.operand(depth)), ("ln", base))


def _starts_atom(token: str) -> bool:
    return token[0].isalnum() or token[0] in "({[\\" or (token[0] == "." and len(token) > 1)


class Arithmetic:
    """Numbers of one precision: how to make one, and its functions."""

    def __init__(self, number: Callable[[str], Any], functions: dict[str, Callable[[Any], Any]], gamma: Any) -> None:
        self.number = number
        self.functions = functions
        self.gamma = gamma


def _double_gamma(x: complex) -> complex:
    if x.imag or x.real <= 0:
        raise ValueError("gamma is taken of positive reals only")
    return complex(math.gamma(x.real))


_CMATH_NAMES = {"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
_DOUBLES = Arithmetic(
    lambda text: complex(float(text)), {f: getattr(cmath, _CMATH_NAMES.get(f, f)) for f in _FUNCTIONS}, _double_gamma
)


@lru_cache(maxsize=1)
def _exact() -> Arithmetic:
    import mpmath

    context = mpmath.MPContext()
    context.dps = _DIGITS
    functions = {f: getattr(context, _CMATH_NAMES.get(f, f)) for f in _FUNCTIONS}
    return Arithmetic(lambda text: context.mpc(context.mpf(text)), functions, context.gamma)


def _value(tree: Tree, arithmetic: Arithmetic, point: int) -> Any:
    """Value at one of three points: NaN, which equals nothing, where it is undefined; None where it overflows a double."""
    try:
        value = _compute(tree, arithmetic, point)
        return value if abs(value) < _LARGEST or value != value else None
    except OverflowError:
        return None
    except (ZeroDivisionError, ValueError):
        return math.nan


def _compute(tree: Tree, arithmetic: Arithmetic, point: int) -> Any:
    head = tree[0]
    if head == "number":
        return arithmetic.number(tree[1])
    if head == "name":
        return _named(tree[1], arithmetic, point)
    args = [_compute(part, arithmetic, point) for part in tree[1:]]
    if head in arithmetic.functions:
        return arithmetic.functions[head](args[0])
    if head == "!":
        return _factorial(args[0], arithmetic)
    if head == DEGREE:
        return args[0] * _named("pi", arithmetic, point) / 180
    if head == "binom":
        n, k = args
        return _factorial(n, arithmetic) / (_factorial(k, arithmetic) * _factorial(n - k, arithmetic))
    left, right = args
    if head == "+":
        return left + right
    if head == "-":
        return left - right
    if head == "*":
        return left * right
    return left / right if head == "/" else left**right


def _factorial(n: Any, arithmetic: Arithmetic) -> Any:
    if n.real > 170:
        raise OverflowError("a factorial this large does not fit a double")
    return arithmetic.gamma(n + 1)


def _named(name: str, arithmetic: Arithmetic, point: int) -> Any:
    """pi, e, i, or a variable's value at `point`: fixed by its name, irrational-looking, of either sign."""
    if name == "pi":
        return arithmetic.functions["arctan"](arithmetic.number("1")) * 4
    if name == "e":
        return arithmetic.functions["exp"](arithmetic.number("1"))
    if name == "i":
        return arithmetic.number("-1") ** arithmetic.number("0.5")
    draw = zlib.crc32(f"{name.lower()}:{point}".encode()) % 1_999_993
    return arithmetic.number(f"{draw - 1_000_000}") / arithmetic.number("437281")


def _names(tree: Tree) -> bool:
    """Whether a variable occurs."""
    if tree[0] == "name":
        return tree[1] not in ("pi", "e", "i")
    return tree[0] != "number" and any(_names(part) for part in tree[1:])
