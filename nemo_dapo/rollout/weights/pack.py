"""Exported tensors into pieces of the run of bytes that `table.py` describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_dapo.rollout.weights.checksum import PAGE, WORD, combine
from nemo_dapo.rollout.weights.table import Entry

if TYPE_CHECKING:  # a server packs nothing, and its environment lacks what a checklist needs
    from nemo_dapo.rollout.weights.checklist import Checklist


@dataclass
class Piece:
    """`data` [n] uint8 are the bytes from `offset` on; `entries` are of the tensors that begin among them."""

    offset: int
    data: Tensor
    entries: list[Entry] = field(default_factory=list)


class Packer:
    """Fills buffers [size] uint8, all of one size, a multiple of the alignment, which `free_buffer` gives one at a time."""

    def __init__(self, free_buffer: Callable[[], Tensor]) -> None:
        self.free_buffer = free_buffer
        self.end = self.filled = 0  # bytes so far, and those of them in `piece`
        self.piece: Piece | None = None

    def begin(self, entry: Entry) -> None:
        self._open().entries.append(entry)

    def put(self, data: Tensor) -> Iterator[Piece]:
        while len(data):
            piece = self._open()
            fits = data[: len(piece.data) - self.filled]
            piece.data[self.filled : self.filled + len(fits)].copy_(fits)
            self.filled, self.end, data = self.filled + len(fits), self.end + len(fits), data[len(fits) :]
            if self.filled == len(piece.data):
                self.piece = None
                yield piece

    def rest(self) -> Iterator[Piece]:
        if self.piece is not None:
            yield Piece(self.piece.offset, self.piece.data[: self.filled], self.piece.entries)

    def _open(self) -> Piece:
        if self.piece is None:
            self.piece, self.filled = Piece(self.end, self.free_buffer()), 0
        return self.piece


def pack(
    weights: Iterable[tuple[str, Tensor]], checklist: Checklist, free_buffer: Callable[[], Tensor]
) -> Iterator[Piece]:
    """The pieces of all `weights`, in order; a tensor may span several.

    Copies, because an exporter may use its memory again. Raises ValueError unless what came is what `checklist` expects.
    """
    packer = Packer(free_buffer)
    for name, tensor in weights:
        data, shape = as_bytes(tensor), tuple(tensor.shape)
        dtype = dtype_name(tensor)
        checklist.add(name, shape, dtype)
        entry = Entry(name, dtype, shape, packer.end, len(data), tensor_checksum(data))
        packer.begin(entry)
        yield from packer.put(data)
        yield from packer.put(torch.zeros(entry.end - packer.end, dtype=torch.uint8))
    checklist.finish()
    yield from packer.rest()


def dtype_name(tensor: Tensor) -> str:
    """As a table has it."""
    return str(tensor.dtype).removeprefix("torch.")


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory: [n] uint8, on its device; a copy where that is not one run of bytes that begins at a word."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return data.clone() if data.storage_offset() % WORD else data


def tensor_checksum(data: Tensor) -> int:
    """`checksum.checksum` of bytes [n] wherever they are: a device sums its own."""
    words = data[: len(data) // WORD * WORD].view(torch.int64)
    pages = len(words) // PAGE
    sums = words[: pages * PAGE].view(pages, PAGE).sum(1)
    rest = words[pages * PAGE :].sum()
    return combine(sums.cpu().numpy(), int(rest), bytes(data[len(words) * WORD :].cpu().tolist()))
