"""Whether two answer texts mean the same: text, then numbers, then structure, then value, then symbolic mathematics.

Cheap rules come first and are final wherever they apply; only what none of them decides reaches `symbolic`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from nemo_dapo.rewards import closed_form, symbolic
from nemo_dapo.rewards.normalize import key, normalize
from nemo_dapo.rewards.quantity import is_decimal_of, parse_quantity, same_quantity
from nemo_dapo.rewards.units import strip_unit

MAX_ITEMS = 50  # of a set or a matrix
MAX_NESTING = 4

_CHOICE = re.compile(r"[\[({]?\s*([A-J])\s*[\])}]?\.?")
_CHOSEN = re.compile(
    r"(?:(?:the )?(?:option|choice|answer) )?[\[({]?\s*([A-Ja-j])\s*(?:[\])}]?|[\])}.:][\])}.:]?\s(.*))"
)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])|\b(?:not|or)\b")
_ABOUT = re.compile(
    r"^(?:\\approx|\\simeq|≈|~|approximately|about|roughly|=|:|is equal to|equals|is)\s*", re.IGNORECASE
)
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_(?:\w|\{[^{}]*\}))?'*(?:\([^()=]*\))?|[A-Za-z][A-Za-z' ]*")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_CONJUNCTION = re.compile(r",?\s+(?:and|or)\s+|\\(?:and|or|lor|land|vee|wedge)(?![A-Za-z])", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\{([bp]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_INFINITE = ("\\infty", "-\\infty")
_IS_NUMERIC = re.compile(r"[0-9]")


@dataclass(frozen=True)
class Collection:
    """Items with their brackets: `set`, `list` (bare commas), `union`, `(…)`, `[…]`, `(…]`, `[…)` or `matrix RxC`."""

    kind: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind[0] in "([m"


def equal(answer: str, truth: str) -> bool:
    """Whether `answer` means `truth`.

    Raises whatever the symbolic comparison raises on failure: a failure is not a wrong answer.
    """
    a, t = normalize(answer), normalize(truth)
    return bool(a and t) and _same(a, t, 0)


def _same(a: str, t: str, nesting: int) -> bool:
    if key(a) == key(t):
        return True
    if not a or not t or nesting > MAX_NESTING:
        return False
    if a in _INFINITE or t in _INFINITE:
        return False
    a = _ABOUT.sub("", a)
    numbers = parse_quantity(a), parse_quantity(t)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    if _CHOICE.fullmatch(t):
        return _chosen(a) == key(t).strip("[](){}.")
    return _same_structure(strip_unit(a), strip_unit(t), nesting)


def _chosen(a: str) -> str | None:
    """The letter that `(B)`, `B.` or `B) five apples` chooses; None where the rest names another."""
    match = _CHOSEN.fullmatch(a)
    if match is None or _OTHER_CHOICE.search(match[2] or ""):
        return None
    return match[1].lower()


def _same_structure(a: str, t: str, nesting: int) -> bool:
    collections = read_collection(a), read_collection(t)
    if collections[0] and collections[1]:
        return _same_collection(collections[0], collections[1], nesting)
    for alone, other, text in ((collections[0], t, a), (collections[1], a, t)):
        if alone and alone.kind == "set" and len(alone.items) == 1 and not read_collection(other):
            one = alone.items[0]
            return _same(one, other, nesting + 1) if text is a else _same(other, one, nesting + 1)
    if collections[0] and (parse_quantity(t) or collections[0].kind == "list"):
        return False
    if _EQUALS.search(a) or _EQUALS.search(t):
        return _same_equation(a, t, nesting)
    return False if collections[1] and parse_quantity(a) else _same_value(a, t)


def _same_equation(a: str, t: str, nesting: int) -> bool:
    """`x = 5` is 5; of two equations with the same left side, the right sides decide."""
    left, right = _EQUALS.split(a), _EQUALS.split(t)
    if len(left) > 1 and len(right) > 1:
        if key(left[0].strip()) == key(right[0].strip()) and _is_variable(left[0]):
            return _same(left[-1].strip(), right[-1].strip(), nesting + 1)
        verdict = _same_relation(left, right)
        return _symbolic(a, t) if verdict is None else verdict
    sides, other = (left, t) if len(left) > 1 else (right, a)
    if parse_quantity(sides[0].strip()) or not sides[-1].strip():  # `4 = 5` states no value
        return False
    if sides is right and not _is_variable(right[0]):
        return _symbolic(a, t)
    value = sides[-1].strip()
    return _same(value, other, nesting + 1) if sides is left else _same(other, value, nesting + 1)


def _is_variable(text: str) -> bool:
    return _VARIABLE.fullmatch(text.strip()) is not None


def _same_relation(left: list[str], right: list[str]) -> bool | None:
    """Whether `f = g` and `p = q` have f - g proportional to p - q; None when they are no closed forms."""
    if len(left) != 2 or len(right) != 2:
        return None
    trees = [closed_form.parse(f"({sides[0]})-({sides[1]})") for sides in (left, right)]
    return closed_form.proportional(trees[0], trees[1]) if trees[0] and trees[1] else None


def _same_value(a: str, t: str) -> bool:
    if not _is_mathematics(a) or not _is_mathematics(t):
        return False
    trees = closed_form.parse(a), closed_form.parse(t)
    if trees[0] is None or trees[1] is None:
        return _symbolic(a, t)
    verdict = closed_form.same_value(trees[0], trees[1])
    if verdict is None:
        return _symbolic(a, t)
    return verdict or _is_decimal(a, trees[1])


def _is_decimal(a: str, truth: closed_form.Tree) -> bool:
    """Whether `a` is a decimal of the irrational truth (1.4142 for \\sqrt{2})."""
    number = parse_quantity(a)
    value = closed_form.constant(truth) if number and number.decimals else None
    return bool(number and value is not None and is_decimal_of(number, value))


def _is_mathematics(text: str) -> bool:
    """Not a mere word: `Tuesday` is compared as text alone."""
    return _IS_NUMERIC.search(text) is not None or any(c in text for c in "\\^+*/()<>|") or len(text) <= 3


def _symbolic(a: str, t: str) -> bool:
    return symbolic.allowed(a) and symbolic.allowed(t) and symbolic.equal(a, t)


def _same_collection(a: Collection, t: Collection, nesting: int) -> bool:
    if len(a.items) != len(t.items) or len(t.items) > MAX_ITEMS or not _comparable(a.kind, t.kind):
        return False
    if a.kind == t.kind == "list" and any("=" in item for item in t.items) != any("=" in item for item in a.items):
        return all(_same(x, y, nesting + 1) for x, y in zip(a.items, t.items, strict=True))
    if a.ordered or t.ordered:
        return all(_same(x, y, nesting + 1) for x, y in zip(a.items, t.items, strict=True))
    rest = list(a.items)
    for item in t.items:
        match = next((x for x in rest if _same(x, item, nesting + 1)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _comparable(a: str, t: str) -> bool:
    """A bare list may stand for a set or a tuple; brackets, where both sides have them, must agree."""
    return a == t or {a, t} in ({"list", "set"}, {"list", "()"})


@lru_cache(maxsize=4096)
def read_collection(text: str) -> Collection | None:
    """The set, tuple, interval, union, matrix or list that a normalised `text` writes; None for anything else."""
    if not any(c in text for c in ",;&") and "\\" not in text and " or " not in text and " and " not in text:
        return None
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _read_matrix(matrix[2])
    union = _split(text, ("\\cup",))
    if len(union) > 1:
        return Collection("union", union)
    if "\\pm" in text:
        return _read_plus_minus(text)
    return _read_bracketed(text) or _read_list(text)


def _read_matrix(body: str) -> Collection:
    rows = [row.split("&") for row in body.strip().removesuffix("\\\\").split("\\\\")]
    return Collection(f"matrix {[len(row) for row in rows]}", tuple(cell.strip() for row in rows for cell in row))


def _read_plus_minus(text: str) -> Collection | None:
    """`a \\pm b` is the two values a + b and a - b."""
    before, _, after = text.partition("\\pm")
    if "\\pm" in after or "," in text or "=" in after:
        return None
    before = before.rpartition("=")[2]
    return Collection("list", tuple(f"{before}{sign}{after.strip()}".strip() for sign in "+-"))


def _read_bracketed(text: str) -> Collection | None:
    for opening, closing, kind in (("\\{", "\\}", "set"), ("{", "}", "set")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and _balanced(inside) and "|" not in inside:
            return Collection(kind, _split(inside, (",", ";")))
    inside = text[1:-1]
    if text[0] not in "([" or text[-1] not in ")]" or not _balanced(inside):
        return None
    items = _split(inside, (",", ";"))
    return Collection(text[0] + text[-1], items) if len(items) > 1 else None


def _read_list(text: str) -> Collection | None:
    if parse_quantity(text):
        return None
    items = _split(_CONJUNCTION.sub(", ", text), (",", ";"))
    return Collection("list", items) if len(items) > 1 else None


def _balanced(text: str) -> bool:
    level = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        if level < 0:
            return False
    return level == 0


def _split(text: str, separators: tuple[str, ...]) -> tuple[str, ...]:
    """Parts of `text` between top-level separators; `(1,000, 2,000)`, with spaces, has two items."""
    if "," in separators and ", " in text and _thousands_inside(text):
        separators = (", ", ";")
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


def _thousands_inside(text: str) -> bool:
    return re.search(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])", text) is not None
