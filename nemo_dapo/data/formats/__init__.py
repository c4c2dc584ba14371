"""Schemas of data sets, one module each, chosen by name: `format: gsm8k` is the module `gsm8k` beside this file.

A schema of your own is one new module, here, in the folder a run is started in, or anywhere Python finds it
(`format: my_module`, `format: my_package.my_module`), with

    def problems(config: DataSetConfig) -> Iterator[Problem]: ...     # every row, repeats included

and, so that misplaced options are refused, `OPTIONS`, the names of `DataSetConfig`'s fields that it reads; without it all
are taken. What it needs beyond them it finds in `config.options`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.problem import Problem
from nemo_dapo.user_code import user_module

COMMON = frozenset({"format", "weight", "max_problems", "samples"})  # read by whoever loads a set, whatever its schema
FILES = frozenset({"path", "hub", "subset", "split", "streaming"})  # read by readers.read_rows


def find(name: str) -> ModuleType:
    """The module of a format. Raises ValueError for a name that is none, and for a module without `problems`."""
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f"format={name!r} is none of {', '.join(names())}{hint}"
    try:
        module = user_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise  # of a module that this one imports
        raise ValueError(
            f"{known}, and Python finds no module {error.name!r}: a schema of your own is a module in the current folder "
            "or on PYTHONPATH"
        ) from error
    if not callable(getattr(module, "problems", None)):
        raise ValueError(f"{known}, and the module {name} has no function problems(config) -> Iterator[Problem]")
    return module


def names() -> list[str]:
    """The formats that are here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """Every row of the set, through its format."""
    found: Iterator[Problem] = find(config.format).problems(config)
    return found
