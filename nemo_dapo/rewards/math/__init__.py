"""The permissive math verifier: any usual way to state an answer, any usual way to write it.

    extract (where is it?) -> normalize (one spelling) -> compare: quantity (numbers) | structure (items, relations)
                                                                   | reader, values (expressions)

What it never does: evaluate a model's text, call an answer correct because it contains the truth, forgive a digit. A text
that no rule can read is equal to nothing but itself: paying a wrong answer is worse than refusing a right one.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_dapo.rewards.math.canonical import canonical
from nemo_dapo.rewards.math.compare import equal
from nemo_dapo.rewards.math.extract import MAX_ANSWER, find_answer
from nemo_dapo.types import Verdict

__all__ = ["canonical", "verify"]

_SHOWN = 200  # characters of an answer that a verdict keeps


def verify(response: str, ground_truth: str, *, answer_patterns: Sequence[str] = ()) -> Verdict:
    """Judge the last answer that `response` states (see `extract.find_answer`) against `ground_truth`.

    No answer, or one of more than `MAX_ANSWER` characters, is incorrect. A failure of the verifier itself is `error`.
    """
    answer = find_answer(response, answer_patterns)
    if not answer:
        return Verdict(correct=False)
    if len(answer) > MAX_ANSWER:
        return Verdict(correct=False, extracted=answer[:_SHOWN])
    try:
        return Verdict(correct=equal(answer, str(ground_truth)), extracted=answer[:_SHOWN])
    except Exception as error:  # the boundary of the verifier: a failure must not look like a wrong answer
        kinds = {TimeoutError: "timeout", MemoryError: "memory"}
        named = f"{kinds.get(type(error), 'exception')}: {type(error).__name__}: {error}"
        return Verdict(correct=False, extracted=answer[:_SHOWN], error=named)
