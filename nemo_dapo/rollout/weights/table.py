"""One version of the weights as every carrier moves it: a run of bytes, and the table of which tensor is where in it.

Tensors lie one after the other at aligned offsets, so that a reader uses them in place. Only the standard library is
imported: the nodes that receive weights need no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

ALIGNMENT = 64
ITEM_BYTES: Mapping[str, int] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Entry:
    """One tensor: `nbytes` from `offset` on, whose `checksum` is that of checksum.py."""

    name: str
    dtype: str  # torch's name of it
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + aligned(self.nbytes)


@dataclass(frozen=True)
class Table:
    """All tensors of one version, in the order of their offsets."""

    version: int
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return self.entries[-1].end if self.entries else 0

    def render(self) -> str:
        return json.dumps({"version": self.version, "tensors": [astuple(entry) for entry in self.entries]})

    @property
    def digest(self) -> str:
        """Of names, places and checksums: two tables with one digest describe the same bytes."""
        return hashlib.sha256(self.render().encode()).hexdigest()


def parse(text: str, digest: str = "") -> Table:
    """Raises ValueError unless `text` is a whole table, with that `digest` where one is named."""
    if digest and hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError("the table of the weights is not the one that was announced")
    try:
        said = json.loads(text)
        rows = [Entry(name, dtype, tuple(shape), *numbers) for name, dtype, shape, *numbers in said["tensors"]]
        table = Table(int(said["version"]), tuple(rows))
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise ValueError(f"{text[:80]!r} is no table of weights") from problem
    check_places(table.entries)
    return table


def check_places(entries: Iterable[Entry]) -> None:
    """Raise ValueError, which names the tensor, unless all come once, one after the other, in the size of their shape."""
    names: set[str] = set()
    end = 0
    for entry in entries:
        where = f"parameter {entry.name} of the table of weights"
        if entry.name in names:
            raise ValueError(f"{where} comes twice")
        names.add(entry.name)
        if (size := ITEM_BYTES.get(entry.dtype)) is None:
            raise ValueError(f"{where} has dtype {entry.dtype!r}; known are {', '.join(ITEM_BYTES)}")
        if min(entry.shape, default=0) < 0 or entry.nbytes != math.prod(entry.shape) * size:
            raise ValueError(f"{where} has {entry.nbytes} bytes, which are not those of {entry.shape} {entry.dtype}")
        if entry.offset != end:
            raise ValueError(f"{where} begins at byte {entry.offset}, expected {end}")
        end = entry.end
