"""One key for the cheap spellings of one answer: for counting votes, where the verifier would cost too much."""

from __future__ import annotations

from nemo_dapo.rewards.math.extract import MAX_ANSWER
from nemo_dapo.rewards.math.normalize import key, normalize
from nemo_dapo.rewards.math.quantity import parse_quantity


def canonical(answer: str) -> str:
    """A key that cheap spellings of one answer share: `\\dfrac12`, `1/2` and `0.5`; `025` and `25`; `5\\text{ cm}` and `5`.

    Numbers become exact fractions without their unit, layout and blanks go, words are folded, single letters keep their
    case. Two answers of one key need not be equal for the verifier (`5 cm`, `5 m`), two of different keys may be. Never
    raises; an answer of more than `MAX_ANSWER` characters is its own key.
    """
    text = str(answer)
    if len(text) > MAX_ANSWER:
        return text
    text = normalize(text)
    number = parse_quantity(text)
    if number:
        return f"{number.value}%" if number.percent else str(number.value)
    return key(text)
