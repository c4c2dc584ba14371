"""GSM8K's schema (openai/gsm8k): `question`, and `answer`, a worked solution with the final answer after `####`."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.formats import FILES
from nemo_dapo.data.problem import Problem
from nemo_dapo.data.readers import read_rows

OPTIONS = FILES


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """Every row; a solution without `####` has an empty answer."""
    for row in read_rows(config):
        yield Problem(row.text("question"), final_answer(row.text("answer")), source="gsm8k")


def final_answer(solution: str) -> str:
    """What follows the last `####`, without thousands separators; "" without one."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") if mark else ""
