"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def set_aside(*paths: Path) -> int | None:
    """Rename those of `paths` that exist to `<name>.previous<n>`, with the first n that is free for all of them.

    Returns n, None where none of them exists.
    """
    there = [path for path in paths if path.exists()]
    if not there:
        return None
    n = next(n for n in itertools.count(1) if not any(_previous(path, n).exists() for path in paths))
    for path in there:
        os.replace(path, _previous(path, n))
    return n


def _previous(path: Path, n: int) -> Path:
    return path.with_name(f"{path.name}.previous{n}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block ends without an error; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)
