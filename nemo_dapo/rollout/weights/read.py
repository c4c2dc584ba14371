"""Reading a version of the weights in place; used by the servers, so that nothing but torch is needed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nemo_dapo.rollout.weights.pack import tensor_checksum
from nemo_dapo.rollout.weights.store import DATA, read_announced, read_table, require_there
from nemo_dapo.rollout.weights.table import Entry
from nemo_dapo.rollout.weights.verify import require_sent


def read_weights(folder: Path, version: int, digest: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the version that `folder` holds, where it lies, after a look at its bytes.

    Raises ValueError, which names it, for a tensor that is cut off or not as it was sent, and for a version or table that
    was not announced; RuntimeError where the folder holds none.
    """
    table = read_announced(folder, version, digest)
    require_there(table, folder)
    data = mapped(folder / DATA)
    for entry in table.entries:
        yield entry.name, checked(entry, data[entry.offset : entry.offset + entry.nbytes])


def mapped(path: Path) -> Tensor:
    """The bytes of a file in place: [n] uint8. Private: what a model does to them does not reach others who read it."""
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def checked(entry: Entry, data: Tensor) -> Tensor:
    """The tensor in the bytes `data` [n]; raises ValueError where they are not those that were sent."""
    require_sent(entry, tensor_checksum(data))
    return data.view(getattr(torch, entry.dtype)).view(entry.shape)


def require_unchanged(folder: Path, digest: str) -> None:
    """Raise RuntimeError where somebody began to write another version since the table was read."""
    try:
        read_table(folder, digest)
    except (ValueError, RuntimeError) as changed:
        raise RuntimeError(f"{folder} was written to while it was read: {changed}") from changed
