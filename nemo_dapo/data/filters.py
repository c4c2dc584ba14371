"""Which problems are kept, and why the others are not: every drop is counted under its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from nemo_dapo.data.problem import Problem, content_hash, squeeze
from nemo_dapo.types import Prompt

IN_EVALUATION_SET = "in an evaluation set"


@dataclass
class Tally:
    """Counts of one data set on its way in."""

    rows_read: int = 0
    repeats_removed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def text_key(problem: str) -> str:
    """Equal for two problems with the same text up to white space."""
    return content_hash([squeeze(problem)])


def select(problems: Iterable[Problem], tally: Tally, *, max_problems: int = 0) -> list[Problem]:
    """The first of each problem by content, in order, at most `max_problems` (0 = all); counts go to `tally`.

    A repeat that contradicts the first one's answer is dropped under a reason of its own: one of them is wrong.
    """
    answers: dict[str, str] = {}
    kept: list[Problem] = []
    for problem in problems:
        tally.rows_read += 1
        key = text_key(problem.problem)
        if not problem.problem:
            tally.dropped["empty problem"] += 1
        elif not problem.answer:
            tally.dropped["empty answer"] += 1
        elif key not in answers:
            answers[key] = problem.answer
            kept.append(problem)
        elif answers[key] == problem.answer:
            tally.repeats_removed += 1
        else:
            tally.dropped["repeat with another answer"] += 1
        if len(kept) == max_problems > 0:
            break
    return kept


def drop_long(prompts: Iterable[Prompt], tally: Tally, max_prompt_length: int) -> list[Prompt]:
    """The prompts of at most `max_prompt_length` tokens."""
    kept = []
    for prompt in prompts:
        if len(prompt.token_ids) <= max_prompt_length:
            kept.append(prompt)
        else:
            tally.dropped[f"prompt longer than {max_prompt_length} tokens"] += 1
    return kept


def drop_held_out(prompts: Sequence[Prompt], tally: Tally, held_out: AbstractSet[str]) -> list[Prompt]:
    """The prompts whose problem is not in `held_out`, the `text_key`s of the evaluation sets."""
    kept = [prompt for prompt in prompts if not held_out or text_key(prompt.problem) not in held_out]
    if len(kept) < len(prompts):
        tally.dropped[IN_EVALUATION_SET] += len(prompts) - len(kept)
    return kept
