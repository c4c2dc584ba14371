"""Whether two answer texts mean the same: text, then numbers, then structure, then value. In doubt they do not.

Cheap rules come first and are final wherever they apply. What no rule can read equals nothing but its own text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from nemo_dapo.rewards.math import reader, values
from nemo_dapo.rewards.math.normalize import key, normalize
from nemo_dapo.rewards.math.quantity import is_decimal_of, is_rounded, parse_quantity, same_quantity
from nemo_dapo.rewards.math.structure import (
    Collection,
    Relation,
    as_set,
    is_application,
    is_name,
    read_collection,
    read_relation,
)
from nemo_dapo.rewards.math.units import agree, split_unit

MAX_ITEMS = 50  # of a set or a matrix
MAX_NESTING = 4

_CHOICE = re.compile(r"[\[({]?\s*([A-J])\s*[\])}]?\.?")
_CHOSEN = re.compile(
    r"(?:(?:(?:[Tt]he )?(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? )[\[({]?\s*([A-Ja-j])|[\[({]\s*([A-Ja-j])|([A-J]))\s*"
    r"(?:[\])}]?|[\])}.:][\])}.:]?\s(.*))"
)
_OTHER_CHOICE = re.compile(
    r"(?<![A-Za-z])[A-J](?![A-Za-z])|[\[(][a-j][\])]|\b(?:not|or|actually|wait|no|instead|wrong|rather)\b",
    re.IGNORECASE,
)
_ABOUT = re.compile(r"^(?:~|approximately|about|roughly|=|:|is equal to|equals|is)\s*", re.IGNORECASE)
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])|≈")
_BASED = re.compile(r"([0-9A-Z]*[0-9][0-9A-Z]*) ?_ ?\{? ?\(? ?([0-9]{1,2}|[a-z]+) ?\)? ?\}?")
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
}
_INFINITE = ("\\infty", "-\\infty")
_HAS_MATHEMATICS = re.compile(r"[0-9\\^+*/()<>|√-]")


def equal(answer: str, truth: str) -> bool:
    """Whether `answer` means `truth`."""
    a, t = normalize(answer), normalize(truth)
    return bool(a and t) and _same(a, t, 0)


def _same(a: str, t: str, nesting: int) -> bool:
    if key(a) == key(t):
        return True
    if not a or not t or nesting > MAX_NESTING or a in _INFINITE or t in _INFINITE:
        return False
    if _APPROXIMATELY.search(a) or _APPROXIMATELY.search(t):
        return _same_about(a, t, nesting)
    a = _ABOUT.sub("", a)
    numbers = parse_quantity(a), parse_quantity(t)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    if _CHOICE.fullmatch(t):
        return _chosen(a) == key(t).strip("[](){}.")
    if _BASED.fullmatch(a) or _BASED.fullmatch(t):
        return _in_base(a) is not None and _in_base(a) == _in_base(t)
    return _same_structure(a, t, nesting)


def _chosen(a: str) -> str | None:
    """The letter that `(B)`, `B.` or `B) five apples` chooses; None where the rest names another."""
    match = _CHOSEN.fullmatch(a)
    if match is None or _OTHER_CHOICE.search(match[4] or ""):
        return None
    return (match[1] or match[2] or match[3]).upper()


def _in_base(text: str) -> int | None:
    """The value of a number with its base, or of a plain one, which is in base ten; None for anything else."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    base = int(match[2]) if match[2].isdigit() else _BASES.get(match[2], 0)
    try:
        return int(match[1], base) if 2 <= base <= 36 else None
    except ValueError:  # a digit that the base does not have
        return None


def _same_about(a: str, t: str, nesting: int) -> bool:
    """`e^2 \\approx 7.39` is `e^2`, and 7.39 where the truth is no more exact; false when its own sides disagree."""
    ours, theirs = _exact_and_about(a), _exact_and_about(t)
    if ours is None or theirs is None:
        return False
    if all(ours) and all(theirs) and not _same(ours[1], theirs[1], nesting + 1):
        return False
    best = ours[0] or ours[1]
    return any(_same(best, side, nesting + 1) for side in theirs if side)


def _exact_and_about(text: str) -> tuple[str, str] | None:
    """What stands before and after `≈`; the name of a quantity counts as nothing. None when the sides disagree."""
    sides = [side.strip() for side in _APPROXIMATELY.split(text)]
    if len(sides) == 1:
        return text, ""
    if len(sides) > 2 or not sides[1]:
        return None
    exact, about = sides
    if not exact or is_name(exact):
        return "", about
    value, near = (_constant(side.rpartition("=")[2].strip()) for side in (exact, about))
    if value is None or near is None or abs(value - near) > abs(value) / 100:
        return None
    return exact, about


def _constant(text: str) -> Fraction | None:
    number = parse_quantity(text)
    if number:
        return number.value
    tree = reader.parse(text)
    return values.constant(tree) if tree else None


def _same_structure(a: str, t: str, nesting: int) -> bool:
    sets = as_set(a), as_set(t)
    if sets != (a, t):
        relations = read_relation(a), read_relation(t)
        if relations[0] and relations[1] and _same_relation(relations[0], relations[1], nesting):
            return True
        both = sets[0] != a and sets[1] != t
        if both and relations[0] and relations[1] and _variables(a) != _variables(t):
            return False
        return _same(*sets, nesting + 1)
    collections = read_collection(a), read_collection(t)
    if collections[0] and collections[1]:
        return _same_collection(collections[0], collections[1], nesting)
    if collections[0] or collections[1]:
        return _same_single(a, t, collections, nesting)
    relations = read_relation(a), read_relation(t)
    if relations[0] and relations[1]:
        return _same_relation(relations[0], relations[1], nesting)
    if relations[0] or relations[1]:
        return _same_stated(a, t, relations, nesting)
    return _same_value(a, t)


def _variables(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def _same_single(a: str, t: str, collections: tuple[Collection | None, Collection | None], nesting: int) -> bool:
    """A set of one member is that member; an equation may state a whole collection (`(x,y) = (1,2)`)."""
    for alone, text, other in ((collections[0], a, t), (collections[1], t, a)):
        if alone is None:
            continue
        if alone.kind == "set" and len(alone.items) == 1:
            one = alone.items[0]
            return _same(one, other, nesting + 1) if text is a else _same(other, one, nesting + 1)
        stated = read_relation(other)
        if stated and stated.is_equation and len(stated.sides) == 2 and is_name(stated.sides[0]):
            value = stated.sides[1]
            return _same(text, value, nesting + 1) if text is a else _same(value, text, nesting + 1)
    return False


def _same_stated(a: str, t: str, relations: tuple[Relation | None, Relation | None], nesting: int) -> bool:
    """An equation against a bare value: `x = 5` is 5, and a name or an unknown may be left out; `2x = 5` is not 5."""
    relation, other = (relations[0], t) if relations[0] else (relations[1], a)
    assert relation is not None
    if not relation.is_equation:
        return False
    stated = _stated_value(relation, is_truth=relations[0] is None)
    if stated is None:
        return False
    return _same(stated, other, nesting + 1) if relations[0] else _same(other, stated, nesting + 1)


def _stated_value(relation: Relation, is_truth: bool) -> str | None:
    """The value of the quantity on the left of an equation; None where it states none, or states what is false.

    What is asked for may be a sum of unknowns in an answer (`a+b = 5`), not one unknown in disguise (`2x = 10`).
    """
    first, last = relation.sides[0], relation.sides[-1]
    between = relation.sides[1:-1]
    if is_name(first):
        return last if all(is_name(side) or _may_equal(side, last) for side in between) else None
    if is_truth or not all(_same_value(side, last) for side in between):
        return None
    if is_application(first):
        return last
    tree = reader.parse(first)
    if tree is None:
        return None
    if values.names(tree):
        return last if len(values.names(tree)) > 1 else None
    return last if _same_value(first, last) else None


def _may_equal(step: str, last: str) -> bool:
    """Whether a step of `A = \\pi r^2 = 4\\pi` may be right: one with unknowns of its own cannot be told."""
    tree, end = reader.parse(step), reader.parse(last)
    if tree and end and values.names(tree) - values.names(end):
        return True
    return _same_value(step, last)


def _same_relation(a: Relation, t: Relation, nesting: int) -> bool:
    """Whether two relations are one: the same name with the same value, or sides that differ by a factor."""
    if a.is_equation and t.is_equation and is_name(a.sides[0]) and is_name(t.sides[0]):
        if {key(s) for s in a.sides if is_name(s)} != {key(s) for s in t.sides if is_name(s)}:
            return _proportional(a, t)
        ours, theirs = _stated_value(a, is_truth=False), _stated_value(t, is_truth=True)
        if ours is not None and theirs is not None and _same(ours, theirs, nesting + 1):
            return True
        return _proportional(a, t)
    if len(a.sides) != len(t.sides):
        return False
    if len(a.sides) > 2:
        return any(
            r.operators == t.operators and all(_same(x, y, nesting + 1) for x, y in zip(r.sides, t.sides, strict=True))
            for r in (a, a.mirrored())
        )
    return _same_constants(a, t) or _proportional(a, t)


def _same_constants(a: Relation, t: Relation) -> bool:
    """Relations without variables: true both, of the same sides. A false one is equal to nothing but its own text."""
    sides = [_constant(side) for side in (*a.sides, *t.sides)]
    if any(side is None for side in sides) or a.operators != t.operators or not a.is_equation:
        return False
    return key(a.sides[0]) == key(t.sides[0]) and len(set(sides)) == 1


def _proportional(a: Relation, t: Relation) -> bool:
    if len(a.sides) != 2 or len(t.sides) != 2:
        return False
    letters = reader.bare_letters(" ".join(t.sides))
    trees = [_difference(relation, letters) for relation in (a, t)]
    if trees[0] is None or trees[1] is None:
        return False
    sign = values.proportional(trees[0], trees[1])
    if a.operators[0] in ("=", r"\ne"):
        return sign != 0 and a.operators == t.operators
    return (a if sign > 0 else a.mirrored()).operators == t.operators if sign else False


def _difference(relation: Relation, letters: frozenset[str]) -> reader.Tree | None:
    left, right = (reader.parse(side, letters) for side in relation.sides)
    return ("-", left, right) if left and right else None


def _same_value(a: str, t: str) -> bool:
    (a, unit), (t, other) = split_unit(a), split_unit(t)
    if not agree(unit, other):
        return False
    if key(a) == key(t):
        return True
    numbers = parse_quantity(a), parse_quantity(t)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    if not _HAS_MATHEMATICS.search(a + t) and max(len(a), len(t)) > 2:
        return False
    letters = reader.bare_letters(t)
    trees = reader.parse(a, letters), reader.parse(t, letters)
    if trees[0] is None or trees[1] is None:
        return False
    return values.same_value(trees[0], trees[1]) or _is_decimal(numbers, trees[0], trees[1])


def _is_decimal(numbers: tuple[object, object], answer: reader.Tree, truth: reader.Tree) -> bool:
    """Whether one is a decimal of the other, irrational one (1.4142 for \\sqrt{2}, \\sqrt{17} for 4.123105625617661)."""
    ours, theirs = numbers
    if bool(ours) == bool(theirs):
        return False
    value = values.constant(truth if ours else answer)
    if value is None:
        return False
    return is_decimal_of(ours, value) if ours else is_rounded(theirs, value)  # type: ignore[arg-type]


def _same_collection(a: Collection, t: Collection, nesting: int) -> bool:
    if len(a.items) != len(t.items) or len(t.items) > MAX_ITEMS or not _comparable(a.kind, t.kind):
        return False
    if a.kind == "matrix [1]" == t.kind:
        return _same(a.items[0], t.items[0], nesting + 1)
    ours, theirs = _named(a), _named(t)
    if bool(ours) != bool(theirs) and (ours or theirs):
        return _same_named(a, t, ours or theirs, bool(ours), nesting)
    if a.ordered or t.ordered:
        return all(_same(x, y, nesting + 1) for x, y in zip(a.items, t.items, strict=True))
    rest = list(a.items)
    for item in t.items:
        match = next((x for x in rest if _same(x, item, nesting + 1)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _named(collection: Collection) -> list[tuple[str, str]]:
    """(name, value) of every item, when the first states a name and all the others do, or none: `a = 4, -8, -10`."""
    if collection.kind != "list":
        return []
    pairs: list[tuple[str, str]] = []
    for item in collection.items:
        relation = read_relation(item)
        if relation is None and pairs:
            pairs.append((pairs[0][0], item))
        elif relation and relation.is_equation and len(relation.sides) == 2 and is_name(relation.sides[0]):
            pairs.append((key(relation.sides[0]), relation.sides[1]))
        else:
            return []
    return pairs


def _same_named(a: Collection, t: Collection, pairs: list[tuple[str, str]], ours: bool, nesting: int) -> bool:
    """Named values against bare ones: a set when one name has them all, else in the order of their names."""
    one_name = len({name for name, _ in pairs}) == 1
    stated = Collection(
        "list" if one_name else "()", tuple(value for _, value in (pairs if one_name else sorted(pairs)))
    )
    bare = t if ours else a
    if (one_name and bare.ordered) or (
        not one_name and (bare.kind == "set" or len({n for n, _ in pairs}) < len(pairs))
    ):
        return False
    both = (stated, bare) if ours else (bare, stated)
    if one_name:
        return _same_collection(*both, nesting + 1) if nesting < MAX_NESTING else False
    return all(_same(x, y, nesting + 1) for x, y in zip(both[0].items, both[1].items, strict=True))


def _comparable(a: str, t: str) -> bool:
    """A bare list may stand for a set or a tuple; brackets, where both sides have them, must agree."""
    return a == t or {a, t} in ({"list", "set"}, {"list", "()"})
