"""Answer text in one spelling: LaTeX layout, Unicode and text wrappers removed, fractions and roots braced."""

from __future__ import annotations

import re
from functools import lru_cache

from nemo_dapo.rewards.math.extract import unbox

_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi
omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"""
_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "‑": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "⁄": "/",
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
        "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "∈": r"\in ",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "", "′": "'", "％": "%", "，": ",", "º": "°",
        "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
        "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
        "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "…": "...", "⋯": "...", "∧": r"\land ", "∨": r"\lor ", "∠": r"\angle ",
        "（": "(", "）": ")", "［": "[", "］": "]", "｛": "{", "｝": "}", "＝": "=", "＋": "+", "－": "-", "＜": "<",
        "＞": ">",         "：": ":", "；": ";", "、": ",", "。": ".",
        "“": '"', "”": '"', "‘": "'", "’": "'", "≡": r"\equiv ", "→": r"\to ",
        "⟨": "(", "⟩": ")", "〈": "(", "〉": ")",
        **{letter: f"\\{name} " for letter, name in zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ", _GREEK.split(), strict=True)},
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")

_PLAIN = re.compile(r"[A-Za-z0-9 .,/+-]*")  # nothing below would change it
_LAYOUT = re.compile(
    r"\\(?:[bB]igg?[lr]?|displaystyle|textstyle|mathstrut|hfill|limits|nolimits)(?![A-Za-z])|\\!|\\[()\[\]]"
)
_SPACES = re.compile(r"\\(?:thinspace|medspace|enspace)(?![A-Za-z])|\\[,;: ]|~")
_THOUSANDS = re.compile(r"(?<=[0-9])(?: ?\{, ?\}|,? ?\\[,!;: ]|\{\\,\}) ?(?=[0-9]{3}(?![0-9]))")
# The end of a row, of a matrix or of a system: one private character, so that no rule takes half of `\\\\ ` for a blank.
ROW = "\ue000"
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?(?![A-Za-z]{2})|\\cr(?![A-Za-z])")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")  # `\\frac` out of a JSON text
_GAP = re.compile(r"\\q?quad(?![A-Za-z])|\n")
_LINES = re.compile(r"\\(?:begin|end)\{(?:aligned|align|gathered|split|equation|gather)\*?\}")
_SYSTEM = re.compile(r"\\begin\{cases\}([^&]*)\\end\{cases\}")
_ARRAY = re.compile(r"(\[|\(|)\s*\\begin\{(array|matrix)\}(?:\s*\{[clr\s]*\})?(.*?)\\end\{\2\}\s*(\]|\)|)", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{[a-z]*matrix\}|\\begin\{(?:array|cases)\}")
_RELATION = re.compile(r"=|[<>]|\\(?:le|ge|lt|gt|ne|in)(?![A-Za-z])")
_CLOCK = re.compile(r"(?<=[0-9]) ?([ap])\.? ?m\.?(?![A-Za-z])", re.IGNORECASE)
_NOT_EQUAL = re.compile(r" !=")
_ROOT_SIGN = re.compile(r"\\sqrt(\[[0-9]\])? ?(?:\(([^()]*)\)|([0-9]+|[A-Za-z]|\\[a-z]+))")
_LOOSE_POWER = re.compile(r"(?<=[A-Za-z]) ?\^ ?\{? ?([0-9]) ?\}?$")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|tt|sf)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|boldsymbol|bm|emph)"
    r"\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
_EXPONENT = re.compile(r"(?<=[0-9]) ?\\(?:mathrm|text|rm) ?\{ ?[eE] ?\} ?(?=[-+]?[0-9])")
_FONT = re.compile(r"\\(?:rm|bf|it)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])")
_SCALES = {"C": " celsius", "F": " fahrenheit"}
_TEMPERATURE = re.compile(r"(?<=[0-9])\s*°\s*([CF])(?![A-Za-z])")
_ALIASES = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:dots|ldots|cdots)(?![A-Za-z])"), "..."),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\mid(?![A-Za-z])"), "|"),
    (re.compile(r"\\pmod\s*\{? ?(\w+) ?\}?|\(\\(?:bmod|mod) ?(\w+)\)"), r" (mod \1\2)"),
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
_LAYOUT_PAIRS = re.compile(r"\\(?:left|right)(?![A-Za-z])\.?")
_PHRASE = re.compile(r"[A-Za-z][A-Za-z '-]*")
_LETTERS = re.compile(r"[A-Za-z]+")
_SHORT_WORD_LIST = """yes no odd even one two six ten red blue day mon tue wed thu fri sat sun may all any none true not
both am pm the of is and or it he she they boy girl dog cat cup"""
_SHORT_WORDS = frozenset(_SHORT_WORD_LIST.split())


@lru_cache(maxsize=8192)
def normalize(text: str) -> str:
    """`text` in its canonical spelling; idempotent in what it means, not necessarily in form.

    `$\\dfrac12$ \\text{ m}` becomes `\\frac{1}{2} m`, `1{,}234` becomes `1,234`. `\\$`, a currency, stays as `$`; rows of a
    matrix and lines of a system end in `ROW`.
    """
    text = text.replace(ROW, "").strip()
    if _PLAIN.fullmatch(text):
        return _INFINITY.sub(r"\\infty", _CLOCK.sub(r" \1m", _BLANKS.sub(" ", text)).rstrip(".,"))
    text = _unwrap(_rows(_characters(unbox(text))))
    for pattern, replacement in _ALIASES:
        if "\\" in text:
            text = pattern.sub(replacement, text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("**", "^").replace("¢", " cents")
    text = _NOT_EQUAL.sub(r" \\ne ", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRACTION.sub(_brace_fraction, text))
    text = _BLANKS.sub(" ", _BRACED_CHARACTER.sub(r"\1\2", _INFINITY.sub(r"\\infty", text))).strip()
    text = _LOOSE_POWER.sub(r"^\1", _CLOCK.sub(lambda m: f" {m[1].lower()}m", text))
    return _strip_braces(_bare_end(text))


def key(normalized: str) -> str:
    """What two spellings of the same text share: no blanks (except between two digits); words without their case.

    Letters keep theirs: `R` and `r` are two quantities.
    """
    bare = _LOOSE_SPACE.sub("", normalized)
    return bare.casefold() if is_phrase(normalized) else bare


def is_phrase(text: str) -> bool:
    """Whether `text` is words alone, with at least one that is no product of variables (`Tuesday`, `no solution`)."""
    return _PHRASE.fullmatch(text) is not None and any(_is_word(word) for word in _LETTERS.findall(text))


def _is_word(word: str) -> bool:
    """A known short word, or four letters with a vowel that are not in the order of the alphabet (`abcd`)."""
    lowered = word.lower()
    if len(word) < 4:
        return lowered in _SHORT_WORDS
    return any(vowel in lowered for vowel in "aeiou") and list(lowered) != sorted(lowered)


def _rows(text: str) -> str:
    """Rows and lines end in `ROW`; what only lays them out goes."""
    if "\\" not in text and "\n" not in text:
        return text
    if not _MATRIX.search(text):
        text = _DOUBLED.sub(r"\\", text)
    text = _LAYOUT_PAIRS.sub("", text)
    text = _LINES.sub(" ", text) if "&" not in text or "\\begin{" in text else text
    text = _ARRAY.sub(lambda m: f"\\begin{{pmatrix}}{m[3]}\\end{{pmatrix}}" if m[1] and m[4] else m[0], text)
    text = _ROW_END.sub(ROW, _SYSTEM.sub(r"\1", text))
    if _MATRIX.search(text):
        return _GAP.sub(" ", text)
    return _GAP.sub(ROW if len(_RELATION.findall(text)) > 1 else " ", text).replace("&", "").strip(f" {ROW}")


def _bare_end(text: str) -> str:
    text = text.strip(f" {ROW}")
    while text and text[-1] in ".,;:\\ " and not text.endswith("..."):
        text = text[:-1].rstrip()
    return text


def _characters(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    has_root = any(sign in text for sign in "√∛∜")
    text = text.translate(_CHARACTERS)
    return _ROOT_SIGN.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2] or m[3]}}}", text) if has_root else text


def _unwrap(text: str) -> str:
    """Remove what only lays the text out: math delimiters, sizes, spaces, fonts, text wrappers."""
    text = _currency(text)
    if "\\" in text or "{" in text or "~" in text:
        text = _EXPONENT.sub("e", _THOUSANDS.sub(",", text))
        text = _SPACES.sub(" ", _LAYOUT.sub("", text)).replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
        for _ in range(3):  # wrappers nest, seldom deeper
            if "\\" not in text:
                break
            text = _WRAPPER.sub(r" \1 ", text)
        text = _DEGREES.sub("°", _FONT.sub("", text))
    text = text.replace('"', "") if '"' in text else text
    return _TEMPERATURE.sub(lambda m: _SCALES[m[1]], text) if "°" in text else text


def _currency(text: str) -> str:
    """Drop the `$` that delimit mathematics; keep one in front as a currency mark (`\\$5`, or an unpaired `$5`)."""
    if "$" not in text:
        return text
    text = text.replace("US\\$", "\\$").replace("US$", r"\$")
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
        if text[:1] == "(" and inner.strip().isalpha() and len(inner.strip()) == 1:  # a choice
            return text
        if text[:1] + text[-1:] not in ("{}", "()") or any(c in inner for c in "(){}[],;") or not inner.strip():
            return text
        text = inner.strip()
    return text
