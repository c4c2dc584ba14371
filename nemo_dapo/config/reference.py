"""The reference of every option, written from schema.py: `python -m nemo_dapo.config.reference`, a page of docs/.

The meaning of an option is the comment beside or right above it, so that the schema is read and documented in one place.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from nemo_dapo.config import schema
from nemo_dapo.config.ranges import LARGEST_COUNT, RANGE

INTRODUCTION = """# All options

Every option of a run, generated from `nemo_dapo/config/schema.py`. On a command line write `option=value` with the full
name; in YAML, nest the names; `<name>` is a name of your choice. What is misspelt, of another type or out of its range is
refused before anything starts. Numbers are finite, whole ones at most 2,147,483,647. `--cfg job` prints what a command line
sets.
"""
KINDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}


@dataclass(frozen=True)
class Option:
    """One option, as a reader sees it."""

    name: str  # full, with dots
    kind: str
    default: str  # as YAML
    values: str  # its range or its choices; empty = any
    meaning: str


def options(owner: type = schema.RunConfig, prefix: str = "") -> Iterator[Option]:
    """Every option of the schema in its order, those of nested classes under their full names."""
    types, meanings = typing.get_type_hints(owner), comments(owner)
    for declared in fields(owner):
        kind, name = types[declared.name], f"{prefix}{declared.name}"
        inner = kind if is_dataclass(kind) else _dataclass_in_dict(kind)
        if not is_dataclass(kind):
            meaning = meanings.get(declared.name, "")
            yield Option(name, _kind(kind), _default(declared), _values(declared, kind), meaning)
        if inner is not None:
            yield from options(typing.cast(type, inner), f"{name}." if inner is kind else f"{name}.<name>.")


def comments(owner: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, after those on lines of their own right above it."""
    source = textwrap.dedent(inspect.getsource(owner))
    found: dict[str, list[str]] = {}
    above: list[str] = []
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            stands_alone = token.line.lstrip().startswith("#")
            (above if stands_alone else found[name]).append(token.string.lstrip("# "))
        elif token.type == tokenize.NAME and token.line[: token.start[1]] == "    ":  # a statement of the class's body
            name = token.string
            found[name], above = above, []
    return {name: " ".join(parts) for name, parts in found.items()}


def markdown() -> str:
    """The reference as one Markdown page: a table for each group of options."""
    groups: dict[str, list[Option]] = {}
    for option in options():
        groups.setdefault(option.name.rpartition(".")[0], []).append(option)
    lines = [INTRODUCTION]
    for group, members in groups.items():
        lines += [f"## {f'`{group}`' if group else 'The run'}", "", "| option | kind | default | values | meaning |"]
        lines += ["|---|---|---|---|---|", *(_row(option) for option in members), ""]
    return "\n".join(lines)


def _row(option: Option) -> str:
    cells = [f"`{option.name}`", option.kind, f"`{option.default}`", option.values, option.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _dataclass_in_dict(kind: Any) -> type | None:
    last = (typing.get_args(kind) or (None,))[-1]
    return last if is_dataclass(last) else None  # type: ignore[return-value]


def _kind(kind: Any) -> str:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "choice"
    if typing.get_origin(kind) is dict:
        return "names with options" if _dataclass_in_dict(kind) else "keys with values"
    if typing.get_origin(kind) is list:
        return "list of texts"
    return " or ".join(KINDS.get(part.__name__, "null") for part in typing.get_args(kind) or (kind,))


def _default(declared: Field[Any]) -> str:
    if declared.default_factory is not dataclasses.MISSING:
        return str(declared.default_factory())  # an empty list or dict
    value = declared.default
    if value == MISSING:
        return "must be given"
    if isinstance(value, Enum):
        return str(value.value)
    return {"None": "null", "True": "true", "False": "false", "": "''"}.get(str(value), str(value))


def _values(declared: Field[Any], kind: Any) -> str:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return ", ".join(str(member.value) for member in kind)
    text = str(declared.metadata.get(RANGE, ""))
    return text.replace(f" and at most {LARGEST_COUNT}", "").replace("a finite number", "any")


if __name__ == "__main__":
    sys.stdout.write(markdown())
