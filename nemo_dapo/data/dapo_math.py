"""The schema of DAPO-Math-17k (BytedTsinghua-SIA/DAPO-Math-17k) and of the AIME-2024 file beside it.

Columns: data_source, prompt (chat messages), ability, reward_model {ground_truth, style}, extra_info {index}. The published
file repeats every problem about 100 times, the AIME file 32 times: `filters.select` removes the repeats by content.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_dapo.config import DataSetConfig
from nemo_dapo.config.prompts import DAPO
from nemo_dapo.data.columns import to_problem
from nemo_dapo.data.problem import Problem
from nemo_dapo.data.rows import read_rows

COLUMNS = {
    "problem": "prompt",
    "answer": "reward_model.ground_truth",
    "source": "data_source",
    "index": "extra_info.index",
}
_BEFORE, _AFTER = DAPO.split("{problem}")


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """Every row, repeats included."""
    for row in read_rows(config):
        yield untemplated(to_problem(row, COLUMNS, config.path))


def untemplated(problem: Problem) -> Problem:
    """`problem` freed of the public recipe's template, so that `data.template` decides, and is never put around it twice.

    A chat that was not made by that template, or has more turns than one, is kept as it is.
    """
    text = problem.problem
    if len(problem.messages) != 1 or not (text.startswith(_BEFORE) and text.endswith(_AFTER)):
        return problem
    bare = text[len(_BEFORE) : len(text) - len(_AFTER)]
    return Problem(bare, problem.answer, problem.source, metadata=problem.metadata)
