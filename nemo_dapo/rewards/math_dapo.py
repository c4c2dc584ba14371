"""The public DAPO recipe's strict rule, for exact reproduction: verl's `utils/reward_score/math_dapo.py`, default mode.

The version is the one of the paper, unchanged until 2026-08-13 (commit 00a10a8ef, for one). Since commit bf48903d9 of
2026-08-14 verl falls back to a box in the last 100 characters where no `Answer:` is found; here, such a reply is wrong.

The last 300 characters, the last `Answer: …` line, both texts through one normalisation, equality of strings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_dapo.types import Verdict

MAX_TAIL = 300  # characters at the end of a response that are read
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_INVALID = "[INVALID]"

# In this order: later replacements see what earlier ones left.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue",
    "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges",
    "students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2",
    "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"',
    "\\dots",
)  # fmt: skip
_BETWEEN_DOLLARS = re.compile(r"(.*?)(\$(.*?)\$)(.*)")  # line by line, as there
_UNWRAPPED = tuple(re.compile(rf"\\{name}\{{(.*)\}}" if name == "boxed" else rf"\\{name}\{{(.*?)\}}")
                   for name in ("text", "textbf", "overline", "boxed"))  # fmt: skip
_SHORT_FRACTION = re.compile(r"(frac)([^{])(.)")
_SHORT_ROOT = re.compile(r"(sqrt)([^{])")


def verify(response: str, ground_truth: str, *, answer_patterns: Sequence[str] = ()) -> Verdict:
    """Judge by the strict rule; `answer_patterns` is refused, because with others the rule would not be the recipe's."""
    if answer_patterns:
        raise ValueError("reward.style=dapo reads `Answer:` alone; use reward.style=math for answer_patterns")
    found = _ANSWER.findall(response[-MAX_TAIL:])
    extracted = found[-1] if found else _INVALID
    answer = normalize(extracted)
    return Verdict(correct=answer == normalize(str(ground_truth)), extracted=answer if found else None)


def normalize(text: str) -> str:
    """The recipe's normalisation, step by step."""
    text = text.split("=")[-1]
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for piece in _REMOVED:
        text = text.replace(piece, "")
    text = _BETWEEN_DOLLARS.sub(r"$\3$", text)
    for pattern in _UNWRAPPED:
        text = pattern.sub(r"\1", text)
    text = _SHORT_FRACTION.sub(r"frac{\2}{\3}", text)
    text = _SHORT_ROOT.sub(r"sqrt{\2}", text).replace("$", "")
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return text.strip()
