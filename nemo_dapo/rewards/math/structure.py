"""What an answer consists of: items in brackets, several values behind `±`, relations, intervals, matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from nemo_dapo.rewards.math.normalize import ROW, is_phrase
from nemo_dapo.rewards.math.quantity import parse_quantity

_CONJUNCTION = re.compile(
    r",?\s+(?:and|or)\s+|(?<=[)\]}])(?:and|or)(?=[(\[{\\])|\\(?:and|or|lor|land|vee|wedge)(?![A-Za-z])", re.IGNORECASE
)
_MATRIX = re.compile(r"\\begin\{([bpB]?|small)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_BUILDER = re.compile(r"\\?\{ ?([A-Za-z]) ?(?:\\in ?\\mathbb\{R\}|\\in R)? ?[|:] ?(.*?)\\?\}")
_MEMBER = re.compile(r"[A-Za-z](?:_\w)? ?\\in(?![A-Za-z]) ?(?=[\[({\\])")
_NAME = (
    r"(?:\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}))?'*(?: ?\^ ?\{?-1\}?)? ?(?:\([^()=<>]*\))?"  # x, x_1, \theta, f(x), f^{-1}(x)
    r"|[A-Za-z][A-Za-z' ]*|\|[A-Za-z]{1,3}\||\\(?:angle|triangle|overline|vec|bar|hat) ?\{?[A-Za-z]+\}?"
    r"|\([A-Za-z](?:, ?[A-Za-z])+\))"
)
_VARIABLE = re.compile(_NAME)
_RATIO = re.compile(rf"{_NAME}(?: ?: ?{_NAME})+")
_APPLIED = re.compile(
    r"\\?(?:sin|cos|tan|cot|sec|csc|log|ln|arcsin|arccos|arctan|gcd|lcm|max|min|det|[A-Z])(?![a-z]).*"
)
_OPERATOR = re.compile(r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|(?<![<>=])=(?!=)|<|>)")
_EQUATIONS_SIDE_BY_SIDE = re.compile(r"(?<=\S) (?=[A-Za-z](?:_\w)? ?=)")
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


@dataclass(frozen=True)
class Collection:
    """Items with their brackets: `set`, `list` (bare commas), `union`, `(…)`, `[…]`, `(…]`, `[…)` or `matrix RxC`."""

    kind: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind[0] in "([m"


@dataclass(frozen=True)
class Relation:
    """A chain of sides and the operators between them: `1 < x \\le 3` has three sides."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]

    @property
    def is_equation(self) -> bool:
        return set(self.operators) == {"="}

    def mirrored(self) -> Relation:
        return Relation(self.sides[::-1], tuple(_MIRRORED[operator] for operator in reversed(self.operators)))


@lru_cache(maxsize=4096)
def read_collection(text: str) -> Collection | None:
    """The set, tuple, interval, union, matrix or list that a normalised `text` writes; None for anything else.

    `±` is written out: `0, \\pm2` is the list of three.
    """
    if not any(c in text for c in ",;&" + ROW) and not any(
        w in text for w in ("\\", " or ", " and ", "=", "or(", "and(")
    ):
        return None
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _read_matrix(matrix[2])
    if text.startswith("\\begin") or "&" in text:
        return None
    union = split(text, ("\\cup",))
    if len(union) > 1:
        return Collection("union", union)
    if text in (r"\emptyset", r"\{\}", "{}", r"\{ \}"):
        return Collection("set", ())
    return _read_bracketed(text) or _read_list(text)


@lru_cache(maxsize=4096)
def read_relation(text: str) -> Relation | None:
    """The equation or inequality, or chain of them, that a text writes; None for anything else."""
    parts = _OPERATOR.split(text)
    sides = tuple(part.strip() for part in parts[::2])
    if len(parts) == 1 or not all(sides) or len(sides) > 8 or not all(_balanced(side) for side in sides):
        return None
    return Relation(sides, tuple(parts[1::2]))


def as_set(text: str) -> str:
    """`x \\in A` as A, and the real numbers that inequalities in one variable describe as intervals."""
    builder = _BUILDER.fullmatch(text)
    if builder and _only_variable(builder[2]) == builder[1]:
        text = builder[2]
    elif builder:
        return text
    member = _MEMBER.match(text)
    if member:
        return text[member.end() :].strip()
    parts = split(_CONJUNCTION.sub(" , ", text), (",",)) if " or " in text or "\\lor" in text else (text,)
    relations = [read_relation(part) for part in parts]
    variables = {_only_variable(part) for part in parts}
    if len(variables) != 1 or None in variables:
        return text
    intervals = [_interval(relation, variable) for relation in relations if relation for variable in variables]
    return " \\cup ".join(i for i in intervals if i) if all(intervals) else text


def is_name(text: str) -> bool:
    """Whether `text` names the quantity asked for (`x`, `f(x)`, `|AB|`, `V_1:V_2`, `the area`)."""
    return _VARIABLE.fullmatch(text.strip()) is not None or _RATIO.fullmatch(text.strip()) is not None


def is_application(text: str) -> bool:
    """Whether `text` is one function of something, as `\\sin\\theta` or `P(A \\cap B)`."""
    return _APPLIED.fullmatch(text) is not None


def split(text: str, separators: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of `text` between top-level separators; `(1,000, 2,000)`, with spaces, has two items."""
    if "," in separators and ", " in text and _thousands_inside(text):
        separators = (", ", *(s for s in separators if s != ","))
    items, level, start, at = [], 0, 0, 0
    while at < len(text):
        level += (text[at] in "([{") - (text[at] in ")]}")
        hit = next((s for s in separators if level == 0 and text.startswith(s, at)), None)
        if hit:
            items.append(text[start:at].strip())
            start = at + len(hit)
        at += len(hit) if hit else 1
    items.append(text[start:].strip())
    return tuple(items)


def _only_variable(text: str) -> str | None:
    """The single letter that is one side of the relation `text`, and occurs in no other side."""
    relation = read_relation(text)
    if relation is None or relation.is_equation or len(relation.sides) > 3:
        return None
    names = [side for side in relation.sides if re.fullmatch(r"[A-Za-z]|\\(?:theta|alpha|beta|lambda)", side)]
    middle = relation.sides[1] if len(relation.sides) == 3 else None
    if len(names) != 1 or (middle is not None and middle != names[0]):
        return None
    others = "".join(side for side in relation.sides if side != names[0])
    return names[0] if names[0] not in re.sub(r"\\[A-Za-z]+", "", others) else None


def _interval(relation: Relation, variable: str | None) -> str | None:
    """The interval, or the two of `x \\ne 3`, that a relation says its variable lies in."""
    low, high = "(-\\infty", "\\infty)"
    for i, operator in enumerate(relation.operators):
        left, right = relation.sides[i], relation.sides[i + 1]
        if left != variable:
            left, right, operator = right, left, _MIRRORED[operator]
        if operator == r"\ne" and len(relation.operators) == 1:
            return f"(-\\infty,{right}) \\cup ({right},\\infty)"
        if operator in ("<", r"\le") and high == "\\infty)":
            high = right + (")" if operator == "<" else "]")
        elif operator in (">", r"\ge") and low == "(-\\infty":
            low = ("(" if operator == ">" else "[") + right
        else:
            return None
    return f"{low},{high}"


def _read_matrix(body: str) -> Collection:
    rows = [row.split("&") for row in body.strip(f" {ROW}").split(ROW)]
    return Collection(f"matrix {[len(row) for row in rows]}", tuple(cell.strip() for row in rows for cell in row))


def _read_bracketed(text: str) -> Collection | None:
    for opening, closing, kind in (("\\{", "\\}", "set"), ("{", "}", "set")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and _balanced(inside) and "|" not in inside:
            return Collection(kind, _written_out(split(inside, (",", ";"))))
    inside = text[1:-1]
    if not text or text[0] not in "([" or text[-1] not in ")]" or not _balanced(inside):
        return None
    items = split(inside, (",", ";"))
    if len(items) < 2:
        return None
    if "\\pm" in text or "\\mp" in text:
        signed = _signs(text)
        return Collection("list", tuple(signed)) if text.count("\\pm") == 1 and signed else None
    return Collection(text[0] + text[-1], items)


def _read_list(text: str) -> Collection | None:
    if parse_quantity(text):
        return None
    if is_phrase(text.replace(",", " ")) and not re.search(r",| and | or ", text):
        return None
    spaced = _EQUATIONS_SIDE_BY_SIDE.sub(" ; ", text) if text.count("=") > 1 and "," not in text else text
    items = _written_out(split(_CONJUNCTION.sub(" , ", spaced), (",", ";", ROW)))
    items = tuple(item for item in items if item)
    return Collection("list", items) if len(items) > 1 else None


def _written_out(items: tuple[str, ...]) -> tuple[str, ...]:
    """Items, those with `±` once for every choice of signs."""
    return tuple(value for item in items for value in (_signs(item) or [item]))


def _signs(text: str) -> list[str]:
    """`a \\pm b` as a + b and a - b; `\\mp` takes the other sign; two `\\pm` are chosen apart. Empty for none."""
    pieces = re.split(r"(\\pm|\\mp)(?![A-Za-z])", text)
    marks = pieces[1::2]
    if not marks or len(marks) > 3 or any("_" in piece and "\\pm" in piece for piece in pieces):
        return []
    together = r"\mp" in marks
    choices = [(sign,) * len(marks) for sign in "+-"] if together else list(product("+-", repeat=len(marks)))
    values = []
    for choice in choices:
        signs = [{"+": "-", "-": "+"}[s] if mark == r"\mp" else s for s, mark in zip(choice, marks, strict=True)]
        written = "".join(part + sign for part, sign in zip(pieces[::2], [*signs, ""], strict=True))
        values.append(written.strip().removeprefix("+").strip())
    return values


def _balanced(text: str) -> bool:
    level = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        if level < 0:
            return False
    return level == 0


def _thousands_inside(text: str) -> bool:
    return re.search(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])", text) is not None
