"""Any set with a column of problems and a column of answers: AIME, AMC, MATH-500 as they are published, or your own.

The problem's column may hold a text, or a chat that is used as it is, without a template. A text that the public recipe's
template was put around is freed of it, as `data.template` says what is put around a problem.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.chat import asked
from nemo_dapo.data.formats import FILES
from nemo_dapo.data.problem import Problem
from nemo_dapo.data.readers import read_rows
from nemo_dapo.data.rows import Row, plain
from nemo_dapo.data.template import without_recipe

OPTIONS = FILES | {"columns"}
DEFAULT = {"problem": "problem", "answer": "answer"}


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """Every row of the set through its column map; an answer or problem that is missing in a row comes out empty."""
    columns = config.columns or DEFAULT
    absent = DEFAULT.keys() - columns.keys()
    if absent:
        raise ValueError(
            f"columns of {config.path!r} must name {' and '.join(sorted(absent))}, got {', '.join(sorted(columns))}: "
            "write columns: {problem: <column>, answer: <column>}"
        )
    for row in read_rows(config):
        yield to_problem(row, columns)


def to_problem(row: Row, columns: dict[str, str]) -> Problem:
    """`columns` maps problem, answer and source to columns; its other keys become metadata."""
    text, messages = asked(row, columns["problem"])
    return Problem(
        problem=text if messages else without_recipe(text),
        answer=row.text(columns["answer"]),
        source=row.text(columns["source"]) if "source" in columns else "",
        messages=messages,
        metadata={
            role: plain(row.value(column))
            for role, column in columns.items()
            if role not in ("problem", "answer", "source")
        },
    )
