"""GSM8K's schema (openai/gsm8k): `question`, and `answer`, a worked solution with the final answer after `####`."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.problem import Problem
from nemo_dapo.data.rows import as_text, lookup, read_rows


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """Every row; a solution without `####` has an empty answer."""
    for row in read_rows(config):
        question = as_text(lookup(row, "question", config.path), "question", config.path)
        solution = as_text(lookup(row, "answer", config.path), "answer", config.path)
        yield Problem(question, final_answer(solution), source="gsm8k")


def final_answer(solution: str) -> str:
    """What follows the last `####`, without thousands separators; "" without one."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") if mark else ""
