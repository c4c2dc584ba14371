"""The schema of DAPO-Math-17k (BytedTsinghua-SIA/DAPO-Math-17k) and of the AIME-2024 file beside it.

Columns: prompt (a chat, or its text) and reward_model.ground_truth; data_source and extra_info.index where there are such.
The published file repeats every problem about 100 times, the AIME file 32 times: `filters.select` removes the repeats by
content.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.chat import asked
from nemo_dapo.data.formats import FILES
from nemo_dapo.data.problem import Problem
from nemo_dapo.data.readers import read_rows
from nemo_dapo.data.rows import Row
from nemo_dapo.data.template import without_recipe

OPTIONS = FILES


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """Every row, repeats included."""
    for row in read_rows(config):
        yield to_problem(row)


def to_problem(row: Row) -> Problem:
    """One row, freed of the public recipe's template, so that `data.template` decides and is never put around it twice.

    A chat that was not made by that template, or has more turns than one, is kept as it is.
    """
    text, messages = asked(row, "prompt")
    bare = without_recipe(text) if len(messages) <= 1 else text
    index = row.optional_text("extra_info.index")
    return Problem(
        problem=bare,
        answer=row.text("reward_model.ground_truth"),
        source=row.optional_text("data_source"),
        messages=messages if bare == text else (),
        metadata={"index": index} if index else {},
    )
