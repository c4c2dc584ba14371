"""Chats that stand in a data set, made into the messages a chat template takes."""

from __future__ import annotations

import json
from typing import Any

from nemo_dapo.data.problem import Message
from nemo_dapo.data.rows import Row, as_text

# What data sets call the speakers, as chat templates call them.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
FORM = 'a list of {"role", "content"} whose last turn is the user\'s'


def asked(row: Row, column: str) -> tuple[str, tuple[Message, ...]]:
    """The text of `column`, or of its chat's last turn, and the chat where there is one."""
    chat = chat_of(row, column)
    return (row.text(column), ()) if chat is None else (chat[-1]["content"].strip(), tuple(chat))


def chat_of(row: Row, column: str) -> list[Message] | None:
    """The chat in `column` of `row`, up to the user's last turn; None where the column holds a text.

    A chat may be a list or its JSON text, its turns {"role", "content"} or ShareGPT's {"from", "value"}, their contents
    texts or lists of text parts. The assistant's turns at its end are the solution, and left out. Raises ValueError, with
    the row's place, for what is no such chat.
    """
    turns = _turns(row.value(column))
    if turns is None:
        return None
    where = f"column {column!r} of {row.place}"
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where} must hold {FORM}, got the roles {_roles(turns)}")
    return messages


def _turns(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            turns = json.loads(value)
        except ValueError:
            return None  # a text that begins like one
        return turns if all(isinstance(turn, dict) and _get(turn, "role", "from") for turn in turns) else None
    return None


def _message(turn: Any, where: str) -> Message:
    role, content = (
        (_get(turn, "role", "from"), _get(turn, "content", "value")) if isinstance(turn, dict) else ("", None)
    )
    if role not in ROLES:
        raise ValueError(
            f'{where} must be {{"role", "content"}} with a role of {", ".join(ROLES)}, got {str(turn)[:80]!r}: mend it, or '
            "name a column of texts"
        )
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise ValueError(f"{where} must hold a text, got {str(content)[:80]!r}")
    try:
        as_text(content)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    return {"role": ROLES[role], "content": content}


def _joined(parts: list[Any], where: str) -> str:
    """The texts of {"type": "text", "text": …}, one after another. Images and the like are no text."""
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    for part, text in zip(parts, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{where} must hold text parts alone, got {str(part)[:80]!r}")
    return "".join(map(str, texts))


def _get(turn: dict[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _roles(turns: list[Any]) -> str:
    return ", ".join(str(_get(turn, "role", "from")) for turn in turns) or "of no turn"
