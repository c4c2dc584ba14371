"""What may stand behind a number without changing which number it is: units, currencies, counted things.

A single letter is a unit only behind a space (`5 m`); attached (`5m`) it is a variable.
"""

from __future__ import annotations

import re

# Units with their other spellings; two different ones never agree (5 cm is not 5 m).
_SPELLINGS = {
    "dollar": "usd bucks buck", "cent": "", "euro": "eur", "pound": "lb lbs gbp", "rupee": "rs inr", "yen": "", "yuan": "",
    "metre": "m meter", "centimetre": "cm centimeter", "millimetre": "mm millimeter", "kilometre": "km kilometer kms",
    "inch": "in inches", "foot": "ft feet", "yard": "yd yds", "mile": "mi",
    "gram": "g gm gms grammes gramme", "kilogram": "kg kgs kilo", "milligram": "mg", "ounce": "oz", "ton": "tonne",
    "litre": "l liter", "millilitre": "ml milliliter", "gallon": "gal", "quart": "qt", "pint": "pt", "cup": "",
    "second": "s sec secs", "minute": "min mins", "hour": "h hr hrs", "day": "", "week": "wk",
    "month": "", "year": "yr yrs",
    "mph": "", "kmh": "kph", "degree": "° deg", "radian": "rad",
    "joule": "", "newton": "", "watt": "", "kw": "", "hz": "",
}  # fmt: skip
_CANONICAL = {s: unit for unit, spellings in _SPELLINGS.items() for s in (unit, unit + "s", *spellings.split())}
_CANONICAL |= {s + "s": unit for s, unit in _CANONICAL.items() if len(s) > 3 and not s.endswith("s")}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SHORT = """men man egg eggs pie pies dog dogs cat cats cow cows car cars box bag bags pen pens toy toys ball pts sq cu way
ways kid kids boy boys girl per the of in a an for each on at are"""
_SHORT_NOUNS = frozenset(_SHORT.split())
# Words that turn a number into another number, or into no answer at all.
_OTHER = """or and not no is isn't isnt was to but than if nor neither except without minus plus times over divided
multiplied squared cubed half halves third thirds quarter quarters fourth fourths fifth fifths eighth
eighths tenth tenths hundredth hundredths sixth sixths root factorial mod modulo base wrong incorrect
false instead maybe perhaps would could should never cannot can't don't unknown impossible error nope
actually because since hence however rather through point squares sqrt sin cos tan log alpha beta gamma
delta theta lambda sigma omega infinity pi i e x y z"""
_REFUSED = frozenset(_OTHER.split())
_PERCENT = re.compile(r"%|per ?cent(?:age)?\b|pct\b", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z'’°]+(?:\^[{(]?-?[123][)}]?)?")
_MAX_WORDS = 8


def read_unit(rest: str) -> tuple[str, int, bool] | None:
    """(unit, scale, is percent) of what follows a number; None when it is no unit.

    Unit is the canonical name of a known unit (with its power), or empty for counted things (`18 eggs`).
    """
    percent = _PERCENT.match(rest)
    if percent:
        after = rest[percent.end() :].strip()
        return ("", 1, True) if not after or _is_noun_phrase(after.split()) else None
    if rest[0] in "-*":
        return None
    words = re.split(r"[\s/]+|(?<=[a-z])-(?=[a-z])", rest.strip("./"))
    first = words[0].lower() if words else ""
    if first in _SCALES:
        tail = read_unit(" ".join(words[1:])) if len(words) > 1 else ("", 1, False)
        return (tail[0], tail[1] * _SCALES[first], tail[2]) if tail else None
    if not _is_noun_phrase(words):
        return None
    return _known(words, rest), 1, False


def strip_unit(text: str) -> str:
    """`text` without the known unit at its end (`\\frac{\\pi}{4} radians`); a lone letter may be a variable and stays."""
    head, _, last = text.rpartition(" ")
    name = last.partition("^")[0].lower()
    return head.rstrip() if head and len(name) > 1 and (name in _CANONICAL or name in ("unit", "units")) else text


def _is_noun_phrase(words: list[str]) -> bool:
    """At most eight plain words, the last a noun, none of which is a variable, a function or a change of mind."""
    if len(words) > _MAX_WORDS or not all(_is_noun(word) for word in words):
        return False
    last = words[-1].lower()
    return len(last) >= 3 or last.partition("^")[0] in _CANONICAL


def _is_noun(word: str) -> bool:
    match = _WORDS.fullmatch(word.strip(".,()"))
    if match is None:
        return False
    bare = match.group().split("^")[0].lower()
    if bare in _REFUSED:
        return False
    return len(bare) >= 4 or bare in _CANONICAL or bare in _SHORT_NOUNS


def _known(words: list[str], rest: str) -> str:
    """Canonical spelling of a measure such as `km/h` or `cm^2`; empty unless every word of it is known."""
    if "/" in rest or "per" in words:
        return ""
    name, _, power = words[-1].strip(".,()").partition("^")
    unit = _CANONICAL.get(name.lower(), "")
    square = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}.get(words[0].lower(), power.strip("{}()"))
    return unit + (f"^{square}" if square else "") if unit and len(words) <= 2 else ""
