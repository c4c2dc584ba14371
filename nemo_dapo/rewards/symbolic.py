"""The last resort: LaTeX read and compared by `math-verify` (sympy), behind limits that keep bombs out.

Only its grammar-based LaTeX reader is used: its reader of plain expressions goes through sympy's `parse_expr`, which
evaluates Python. Its alarm works on the main thread of a process alone, as in a reward worker.
"""

from __future__ import annotations

import re
from typing import Any

MAX_LENGTH = 300
MAX_DEPTH = 12
MAX_POWERS = 16
TIMEOUT = 3  # seconds for reading, and again for comparing; whole, as `alarm` wants it

_COMMAND_NAMES = """frac sqrt pi theta alpha beta gamma delta epsilon lambda mu nu phi psi rho sigma tau omega Omega Delta
sin cos tan cot sec csc  arcsin arccos arctan sinh cosh tanh ln log exp pm mp infty cup cap in notin le
ge lt gt ne begin end binom circ mid vert emptyset  mathbb setminus overline lfloor rfloor lceil rceil {
} \\ left right i hat vec to approx equiv mod pmod gcd max min"""
_COMMANDS = frozenset(_COMMAND_NAMES.split())
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_WORD = re.compile(r"(?<!\\)(?<![A-Za-z])[A-Za-z]{3,}")
_WORD_LIST = """sqrt frac sin cos tan cot sec csc log exp gcd max min mod matrix pmatrix bmatrix vmatrix sinh cosh tanh
arcsin arccos arctan asin acos atan pmod binom infty"""
_WORDS = frozenset(_WORD_LIST.split())
_BOMBS = re.compile(
    r"[0-9]{40}"  # integers that only waste time
    r"|\^\s*\{?\s*[-+]?[0-9]{4}"  # large powers
    r"|[)}\]]\s*\^\s*[{(]?\s*[-+]?[0-9]{3}"  # powers of powers
    r"|\^[^=,;]*[0-9)}]\s*\^[^=,;]*[0-9)}]\s*\^"  # towers
    r"|\^\s*[{(][^{}()]*[0-9)}]\s*\^"
    r"|[0-9]{3,}\s*!|[)}\]!]\s*!"  # factorials of large or computed numbers
    r"|\^\s*\{[^{}]*\^\s*\{[^{}]*\^"
    r"|binom.*(?:\^|[0-9]{4})"
    r"|:"  # read as a division, which a ratio or a time of day is not
)
_PLAIN_FUNCTION = re.compile(r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|ln|log|exp|pi|theta)(?![a-z])")
# 12 digits: its default of 6 would forgive 5.0000001 for 5; `x < 5` may stand for the interval.
_STRICT: dict[str, Any] = {
    "float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": TIMEOUT, "raise_on_error": True,
}  # fmt: skip
_PLAIN_ROOT = re.compile(r"\\sqrt\s*\(([^()]*)\)")


def allowed(text: str) -> bool:
    """Whether `text` may be mathematics and is small enough to be read: what is not, is no answer that could be equal."""
    if len(text) > MAX_LENGTH or not text.isascii() or not text.isprintable() or text.count("^") > MAX_POWERS:
        return False
    if any(match[1] not in _COMMANDS for match in _COMMAND.finditer(text)) or _BOMBS.search(text):
        return False
    return _depth(text) <= MAX_DEPTH and all(word.lower() in _WORDS for word in _WORD.findall(text))


def _depth(text: str) -> int:
    level = deepest = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        deepest = max(deepest, level)
    return deepest


def equal(answer: str, truth: str) -> bool:
    """Whether math-verify finds the two equal; an answer outside its grammar is not.

    Raises RuntimeError naming what failed, TimeoutError after `TIMEOUT` seconds, ValueError off the main thread.
    """
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        gold = _read(truth)
        prediction = None if gold is None else _read(answer)
        if gold is None or prediction is None:
            return False
        return bool(verify(gold, prediction, **_STRICT))
    except TimeoutException:
        raise TimeoutError(f"symbolic comparison took longer than {TIMEOUT} s") from None


def _read(text: str) -> Any:
    """A sympy object, or None where the grammar refuses the text."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex
    from math_verify.utils import timeout

    # Its unit rules would read `2t` as 2.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    latex = normalize_latex(_latex(text), rules)
    try:
        return timeout(TIMEOUT)(latex2sympy)(
            latex, is_real=not should_treat_as_complex(latex), normalization_config=None
        )
    except Exception as error:
        if _is_refusal(error):
            return None
        raise RuntimeError(f"reading {text[:80]!r}: {type(error).__name__}: {str(error)[:120]}") from error


def _is_refusal(error: Exception) -> bool:
    """Its grammar raises a bare Exception; where a half-read tree lacks a node, attribute and type errors follow."""
    return type(error) in (Exception, AttributeError, TypeError, IndexError, ZeroDivisionError)


def _latex(text: str) -> str:
    """Plain function names as LaTeX commands."""
    return _PLAIN_ROOT.sub(r"\\sqrt{\1}", _PLAIN_FUNCTION.sub(r"\\\1 ", text))
