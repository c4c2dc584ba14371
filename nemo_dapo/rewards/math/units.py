"""What may stand behind a number without changing which number it is: units, currencies, counted things.

A single letter is a unit only behind a space (`5 m`); attached (`5m`) it is a variable.
"""

from __future__ import annotations

import re

# Units with their other spellings; two different ones never agree (5 cm is not 5 m).
_SPELLINGS = {
    "dollar": "usd us$ $ bucks buck", "cent": "¢", "euro": "eur €", "pound": "lb lbs gbp £",
    "rupee": "rs rs. inr ₹", "yen": "¥",
    "yuan": "",
    "metre": "m meter", "centimetre": "cm centimeter", "millimetre": "mm millimeter", "kilometre": "km kilometer kms",
    "inch": "in inches", "foot": "ft feet", "yard": "yd yds", "mile": "mi",
    "gram": "g gm gms grammes gramme", "kilogram": "kg kgs kilo", "milligram": "mg", "ounce": "oz", "ton": "tonne",
    "litre": "l liter", "millilitre": "ml milliliter", "gallon": "gal", "quart": "qt", "pint": "pt", "cup": "",
    "second": "s sec secs", "minute": "min mins", "hour": "h hr hrs", "day": "", "week": "wk",
    "month": "", "year": "yr yrs",
    "degree": "° deg", "radian": "rad", "celsius": "", "fahrenheit": "", "percent": "", "am": "", "pm": "",
    "joule": "", "newton": "", "watt": "", "kw": "", "hz": "",
}  # fmt: skip
_CANONICAL = {s: unit for unit, spellings in _SPELLINGS.items() for s in (unit, unit + "s", *spellings.split())}
_CANONICAL |= {s + "s": unit for s, unit in _CANONICAL.items() if len(s) > 3 and not s.endswith("s")}
_COMPOUNDS = {"mph": "mile/hour", "kmh": "kilometre/hour", "kph": "kilometre/hour", "kmph": "kilometre/hour"}
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
tens hundreds thousands millions billions dozens lakh lakhs crore crores quadrillion quintillion sextillion septillion mille
myriad score gross googol below above under negative less more zero least most pairs actually wait correction unless until
delta theta lambda sigma omega infinity pi i e x y z"""
_REFUSED = frozenset(_OTHER.split())
_PERCENT = re.compile(r"%|per ?cent(?:age)?\b|pct\b", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z'’°€£¥₹¢]+(?:\^[{(]?-?[123][)}]?)?")
_MAX_WORDS = 8
# Behind an expression: blank, then plain words.
_TRAILING_WORDS = re.compile(r"(?:(?<=[^A-Za-z\\ ])|(?<=\\pi)) ((?:[A-Za-z.]+(?:\^[{(]?-?[123][)}]?)?(?: ?/ ?| |$))+)$")
_NOT_TRAILING = frozenset(["union", "in", "if", "or", "and"])


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


def split_unit(text: str) -> tuple[str, str]:
    """An expression and the unit or counted thing behind it (`\\frac{\\pi}{4} radians`); lone letters may be variables."""
    match = _TRAILING_WORDS.search(text)
    if match is None or not match.start() or any(word.lower() in _NOT_TRAILING for word in match[1].split()):
        return text, ""
    words = re.split(r"[\s/]+", match[1])
    long_enough = all(len(w.partition("^")[0]) > 1 and (len(w) > 2 or w.lower() in _CANONICAL) for w in words)
    if not long_enough or not _is_noun_phrase(words):
        return text, ""
    return text[: match.start()].rstrip(), _known(words, match[1])


def currency_unit(mark: str) -> str:
    """The unit that `$`, `US$`, `€` or `Rs.` in front of a number names."""
    return _CANONICAL.get(mark.strip().lower().replace(" ", ""), mark)


def agree(ours: str, theirs: str) -> bool:
    """Whether two units may be one: equal, or not named on one side."""
    return not ours or not theirs or ours == theirs


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
    return len(bare) >= 4 or bare in _CANONICAL or bare in _COMPOUNDS or bare in _SHORT_NOUNS


def _known(words: list[str], rest: str) -> str:
    """Canonical spelling of a measure (`kilometre/hour`, `centimetre^2`); empty for counted things."""
    if "/" in rest or "per" in words:
        return "/".join(_measure(part.split()) or part.strip().lower() for part in re.split(r"/|\bper\b", rest))
    return (
        _COMPOUNDS.get(words[0].lower(), "") if len(words) == 1 and words[0].lower() in _COMPOUNDS else _measure(words)
    )


def _measure(words: list[str]) -> str:
    if not words:
        return ""
    name, _, power = words[-1].strip(".,()").partition("^")
    unit = _CANONICAL.get(name.lower(), "")
    square = {"square": "2", "sq": "2", "sq.": "2", "cubic": "3", "cu": "3"}.get(words[0].lower(), power.strip("{}()"))
    return unit + (f"^{square}" if square else "") if unit and len(words) <= 2 else ""
