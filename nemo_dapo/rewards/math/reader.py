"""Expressions (`\\frac{1+\\sqrt{5}}{2}`, `2x^2-1`, `f(2x)`) read by a small grammar into trees.

math-verify's reader is not used: it reads `(2)(3)` and `2 3` as 5, `204_5` as 204, `f(2x)` as `2fx`, `30^\\circ` as 30 and
`R` as `r`, in silence. This one refuses what it does not know, so that nothing is equal by a misreading. Nothing here
evaluates text. A tree is a tuple: ("number", digits), ("name", name), ("apply", name, arguments…) or (operation, trees…).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

MAX_TOKENS = 300
MAX_DEPTH = 24
DEGREE = "°"
FUNCTIONS = (
    "sin", "cos", "tan", "cot", "sec", "csc", "exp", "ln", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
)  # fmt: skip
_FUNCTION_LETTER_LIST = """f g h F G H P Q T y u phi psi varphi Phi Psi"""
FUNCTION_LETTERS = frozenset(_FUNCTION_LETTER_LIST.split())  # before a bracket: applied to it

_GREEK_LETTERS = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma
tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"""
_GREEK = frozenset(_GREEK_LETTERS.split())
_TOKEN = re.compile(
    r"\\?(?:sqrt|frac|binom|pi|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r"|log)(?![a-z])"
    r"|\\[A-Za-z]+|[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]|\S"
)
_BRACKETS = {"(": ")", "{": "}", "[": "]", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_ROUNDINGS = {r"\lfloor": "floor", r"\lceil": "ceil"}
# A run of letters is a product of variables only while it is short; `dy/dx` is no quotient, `f^{-1}(x)` no power.
_NOT_A_PRODUCT = re.compile(
    r"(?<![A-Za-z\\])(?!(?:sqrt|frac|binom|arc|sinh?|cosh?|tanh?|log|exp|cot|sec|csc)[^a-z])[A-Za-z]{4,}"
    r"|(?<![A-Za-z\\])(?:and|for|not|the|but|yes|one|two|six|ten|odd|all|any|nor|mod|min|max|gcd|lcm|det)(?![A-Za-z])"
    r"|\\frac\{ ?(?:d|\\partial)[^{}]*\}\{ ?(?:d|\\partial) ?[A-Za-z]|(?<![A-Za-z])d[a-z] ?/ ?d[a-z]"
    r"|(?<![A-Za-z])[fghFGH] ?\^ ?(?:\{[^{}]*\}|[0-9a-z-]) ?\("
)
_COMMAND = re.compile(r"\\(?:(phi|psi|varphi|Phi|Psi)(?![A-Za-z])|[A-Za-z]+)")
_BARE = re.compile(r"([A-Za-z])(?![('_])")

Tree = tuple[Any, ...]


class UnreadableError(ValueError):
    """The text is not in the grammar, or too large: it equals nothing but itself."""


def bare_letters(text: str) -> frozenset[str]:
    """Letters that stand in `text` without an argument in brackets: there, and in what is compared with it, variables."""
    greek = {m[1] for m in _COMMAND.finditer(text) if m[1] and text[m.end() : m.end() + 1] not in ("(", "'", "_")}
    return frozenset({m[1] for m in _BARE.finditer(_COMMAND.sub(" ", text))} | greek)


@lru_cache(maxsize=4096)
def parse(text: str, variables: frozenset[str] = frozenset()) -> Tree | None:
    """The tree of a normalised text, None when it is none; `variables` are letters that are no functions."""
    if len(text) > 4 * MAX_TOKENS or not text.replace(DEGREE, "").isascii() or _NOT_A_PRODUCT.search(text):
        return None
    tokens = _TOKEN.findall(text)
    if not tokens or len(tokens) > MAX_TOKENS:
        return None
    try:
        reader = _Reader(tokens, variables)
        tree = reader.sum(0)
        return tree if reader.at == len(tokens) else None
    except (UnreadableError, IndexError):
        return None


def names(tree: Tree) -> set[str]:
    """Variables and functions that occur in a tree; pi, e and i are none."""
    if tree[0] in ("name", "apply"):
        own = set() if tree[0] == "name" and tree[1] in ("pi", "e", "i") else {tree[1]}
        return own.union(*(names(part) for part in tree[2:]))
    return set() if tree[0] == "number" else set().union(*(names(part) for part in tree[1:]))


class _Reader:
    """Recursive descent over tokens; `depth` bounds the recursion."""

    def __init__(self, tokens: list[str], variables: frozenset[str]) -> None:
        self.tokens = tokens
        self.variables = variables
        self.at = 0
        self.bars = 0  # open |…|: within them a bar closes

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.tokens[self.at]
        if expected and token != expected:
            raise UnreadableError(token)
        self.at += 1
        return token

    def starts_atom(self) -> bool:
        token = self.peek()
        if not token or token in (r"\rfloor", r"\rceil"):
            return False
        return token[0].isalnum() or token[0] in "({[\\" or (token[0] == "." and len(token) > 1) or self.opens_bar()

    def opens_bar(self) -> bool:
        return self.peek() == "|" and not self.bars

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
            if token == "*":
                left = (self.take(), left, self.signed(depth))
            elif token == "/":
                left = self.quotient(left, depth)
            elif self.starts_atom():
                left = self.adjacent(left, depth)
            else:
                return left

    def quotient(self, left: Tree, depth: int) -> Tree:
        """`a/b`; `a/bc` has two readings, unless `a` and `b` are plain numbers (`1/2 x`)."""
        self.take("/")
        right = self.signed(depth)
        if self.starts_atom() and not (left[0] == right[0] == "number"):
            raise UnreadableError("a/bc")
        return ("/", left, right)

    def adjacent(self, left: Tree, depth: int) -> Tree:
        """Juxtaposition: a product, or a mixed number (`3\\frac{1}{2}`)."""
        if self.peek()[0].isdigit() or self.peek()[0] == ".":
            raise UnreadableError("two numbers side by side")
        is_fraction = self.peek() in (r"\frac", "frac")
        right = self.power(depth)
        plain = left[0] == "number" and is_fraction and right[0] == "/" and all(p[0] == "number" for p in right[1:])
        return ("+" if plain else "*", left, right)

    def signed(self, depth: int) -> Tree:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        value = self.power(depth)
        return ("-", ("number", "0"), value) if sign < 0 else value

    def power(self, depth: int) -> Tree:
        base = self.atom(depth)
        if self.peek() in ("!", DEGREE):
            base = (self.take(), base)
        if self.peek() in ("!", DEGREE, "_"):  # a double factorial, a number's base
            raise UnreadableError(self.peek())
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.argument(depth) if self.peek() == "{" else self.signed(depth + 1)
        return ("^", base, exponent)

    def argument(self, depth: int) -> Tree:
        """`{…}`."""
        return self.bracket(depth, "{")

    def bracket(self, depth: int, opening: str) -> Tree:
        self.take(opening)
        bars, self.bars = self.bars, 0
        inside = self.sum(depth + 1)
        self.take(_BRACKETS[opening])
        self.bars = bars
        return inside

    def atom(self, depth: int) -> Tree:
        token = self.peek()
        if token in _BRACKETS:
            inside = self.bracket(depth, token)
            return (_ROUNDINGS[token], inside) if token in _ROUNDINGS else inside
        if self.opens_bar():
            return self.absolute(depth)
        self.take()
        name = token.lstrip("\\")
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return ("number", token.replace(",", ""))
        if name in ("frac", "binom", "sqrt", "log") or name in FUNCTIONS:
            return self.call(name, depth)
        if name == "pi" or (token.startswith("\\") and name in _GREEK) or (len(token) == 1 and token.isalpha()):
            return self.variable(name, depth)
        raise UnreadableError(token)

    def absolute(self, depth: int) -> Tree:
        self.take("|")
        self.bars += 1
        inside = self.sum(depth + 1)
        self.bars -= 1
        self.take("|")
        return ("abs", inside)

    def variable(self, name: str, depth: int) -> Tree:
        applied = name in FUNCTION_LETTERS and name not in self.variables
        if self.peek() == "_":
            self.take()
            name += "_" + (self.subscript() if self.peek() == "{" else self.take())
        while self.peek() == "'":
            name, applied = name + self.take(), True
        return self.application(name, depth) if applied and self.peek() == "(" else ("name", name)

    def application(self, name: str, depth: int) -> Tree:
        self.take("(")
        bars, self.bars = self.bars, 0
        arguments = [self.sum(depth + 1)]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum(depth + 1))
        self.take(")")
        self.bars = bars
        return ("apply", name, *arguments)

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
            return self.bracket(depth + 1, self.peek())
        value = self.power(depth + 1)
        while self.starts_atom() and self.peek() not in ("(", "[", "{"):
            if self.peek().lstrip("\\") in (*FUNCTIONS, "log"):
                break
            value = self.adjacent(value, depth + 1)
        return value

    def root(self, depth: int) -> Tree:
        degree: Tree = ("number", "2")
        if self.peek() == "[":
            degree = self.bracket(depth, "[")
        inside = self.atom(depth)
        return ("^", inside, ("/", ("number", "1"), degree))

    def logarithm(self, depth: int) -> Tree:
        """`\\log_b x`; without a base it may mean e or 10, which `values` tries both."""
        if self.peek() != "_":
            return ("log", self.operand(depth))
        self.take("_")
        base = self.argument(depth) if self.peek() == "{" else self.atom(depth)
        return ("/", ("ln", self.operand(depth)), ("ln", base))
