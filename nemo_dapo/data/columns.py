"""Any set with a column of problems and a column of answers: AIME, AMC, MATH-500 as they are published, or your own.

The problem's column may hold a text, or a list of chat messages that is used as it is, without a template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.problem import Message, Problem
from nemo_dapo.data.rows import Row, as_text, lookup, read_rows

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
        yield to_problem(row, columns, config.path)


def to_problem(row: Row, columns: dict[str, str], path: str) -> Problem:
    """`columns` maps problem, answer and source to columns; its other keys become metadata."""
    found = {role: lookup(row, column, path) for role, column in columns.items()}
    messages = as_messages(found["problem"], columns["problem"], path)
    return Problem(
        problem=last_user_turn(messages) if messages else as_text(found["problem"], columns["problem"], path),
        answer=as_text(found["answer"], columns["answer"], path),
        source=as_text(found.get("source"), columns.get("source", ""), path),
        messages=messages,
        metadata={role: value for role, value in found.items() if role not in ("problem", "answer", "source")},
    )


def as_messages(value: Any, column: str, path: str) -> tuple[Message, ...]:
    """A list of {"role", "content"} as messages, anything else as none. Raises ValueError for a list of other things."""
    if not isinstance(value, list):
        return ()
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f'column {column!r} of {path!r} must hold a text or a list of {{"role", "content"}}, got an item '
                f"{str(message)[:80]!r}: name another column"
            )
    return tuple({"role": str(message["role"]), "content": str(message["content"])} for message in value)


def last_user_turn(messages: tuple[Message, ...]) -> str:
    """The content of the last message whose role is user; "" without one."""
    turns = [message["content"] for message in messages if message["role"] == "user"]
    return turns[-1].strip() if turns else ""
