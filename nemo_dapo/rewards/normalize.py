"""Answer text in one spelling: LaTeX layout, Unicode and text wrappers removed, fractions and roots braced."""

from __future__ import annotations

import re
from functools import lru_cache

from nemo_dapo.rewards.extract import unbox

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "⁄": "/",
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
        "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "∈": r"\in ",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "", "′": "'", "％": "%", "，": ",", "º": "°",
        "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
        "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")

_PLAIN = re.compile(r"[A-Za-z0-9 .,/+-]*")  # nothing below would change it
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|mathstrut|hfill|limits|nolimits)(?![A-Za-z])|\\!|\\[()\[\]]"
)
_SPACES = re.compile(r"\\(?:quad|qquad|thinspace|medspace|enspace)(?![A-Za-z])|\\[,;: ]|~")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,\\!|,?\\ |,\\,|\{\\,\})(?=[0-9]{3}(?![0-9]))")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|tt|sf)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|boldsymbol|bm|emph)"
    r"\s*\{([^{}]*)\}"
)
_FONT = re.compile(r"\\(?:rm|bf|it)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])")
_ALIASES = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\[lr]brace(?![A-Za-z])"), lambda m: r"\{" if m.group()[1] == "l" else r"\}"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_BRACED_CHARACTER = re.compile(r"([\^_])\s*\{\s*([0-9A-Za-z])\s*\}")
_INFINITY = re.compile(r"(?<![A-Za-z\\])\+?(?:infinity|inf|oo)(?![A-Za-z])|\+\s*\\infty", re.IGNORECASE)
_BLANKS = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")


@lru_cache(maxsize=8192)
def normalize(text: str) -> str:
    """`text` in its canonical spelling; idempotent in what it means, not necessarily in form.

    `$\\dfrac12$ \\text{ m}` becomes `\\frac{1}{2} m`, `1{,}234` becomes `1,234`. `\\$`, a currency, stays as `$`.
    """
    text = text.strip()
    if _PLAIN.fullmatch(text):
        return _INFINITY.sub(r"\\infty", _BLANKS.sub(" ", text).rstrip(".,"))
    text = _unwrap(_characters(unbox(text)))
    for pattern, replacement in _ALIASES:
        if "\\" in text:
            text = pattern.sub(replacement, text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("**", "^")
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRACTION.sub(_brace_fraction, text))
    text = _BLANKS.sub(" ", _BRACED_CHARACTER.sub(r"\1\2", _INFINITY.sub(r"\\infty", text))).strip()
    return _strip_braces(text.rstrip(" .,;:"))


def key(normalized: str) -> str:
    """What two spellings of the same text share: no spaces (except between two digits), no case."""
    return _LOOSE_SPACE.sub("", normalized).casefold()


def _characters(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    return text.translate(_CHARACTERS)


def _unwrap(text: str) -> str:
    """Remove what only lays the text out: math delimiters, sizes, spaces, fonts, text wrappers."""
    text = _currency(text)
    if "\\" in text or "{" in text or "~" in text:
        text = _THOUSANDS.sub(",", text)
        text = _SPACES.sub(" ", _LAYOUT.sub("", text)).replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
        for _ in range(3):  # wrappers nest, seldom deeper
            if "\\" not in text:
                break
            text = _WRAPPER.sub(r" \1 ", text)
        text = _DEGREES.sub("°", _FONT.sub("", text))
    return text


def _currency(text: str) -> str:
    """Drop the `$` that delimit mathematics; keep one in front as a currency mark (`\\$5`, or an unpaired `$5`)."""
    if "$" not in text:
        return text
    is_currency = r"\$" in text or text.count("$") % 2 == 1
    bare = text.replace(r"\$", "").replace("$", "").strip()
    return "$" + bare if is_currency else bare


def _brace_fraction(match: re.Match[str]) -> str:
    top, short_top, bottom, short_bottom = match.groups()
    return rf"\frac{{{(short_top or top or '').strip()}}}{{{(short_bottom or bottom or '').strip()}}}"


def _strip_braces(text: str) -> str:
    """`{5}` and `(5)`, when the bracket holds a single value, are 5."""
    for _ in range(3):
        inner = text[1:-1]
        if text[:1] + text[-1:] not in ("{}", "()") or any(c in inner for c in "(){}[],;") or not inner.strip():
            return text
        text = inner.strip()
    return text
