"""Tensors out of pieces that come in order, in the memory of the server's own device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_dapo.rollout.weights.read import checked
from nemo_dapo.rollout.weights.table import Entry, Table


class Assembler:
    """Of one version. Copies, because a piece's memory is the sender's again, while a model may keep what it is given.

    Raises ValueError, which names it, for a tensor that is not as it was sent, or a piece that is not the next.
    """

    def __init__(self, version: int, device: torch.device | str) -> None:
        self.version, self.device = version, device
        self.last = self.end = 0  # where the newest piece begins, and where the next one must
        self.entries: list[Entry] = []
        self._partial: tuple[Entry, Tensor] | None = None  # a tensor that goes on in the next piece

    def add(self, offset: int, entries: Sequence[Entry], data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are whole with the bytes `data` [n] from `offset` on, among which `entries` begin.

        A piece that came already is passed over: its sender could not know that it had arrived.
        """
        if offset == self.last and self.end > 0:
            return
        if offset != self.end:
            raise ValueError(f"a piece for byte {offset} came, expected was byte {self.end}")
        self.last, self.end = offset, offset + len(data)
        self.entries += entries
        begun = [(entry, torch.empty(entry.nbytes, dtype=torch.uint8, device=self.device)) for entry in entries]
        for entry, tensor in ([self._partial] if self._partial else []) + begun:
            begin, end = max(entry.offset, offset), min(entry.offset + entry.nbytes, self.end)
            tensor[begin - entry.offset : end - entry.offset].copy_(data[begin - offset : end - offset])
            self._partial = None
            if end < entry.offset + entry.nbytes:
                self._partial = entry, tensor
            else:
                yield entry.name, checked(entry, tensor)

    def finish(self, digest: str) -> None:
        """Raise ValueError unless everything that was announced has come, and nothing else."""
        table = Table(self.version, tuple(self.entries))
        if self._partial or table.nbytes != self.end or table.digest != digest:
            raise ValueError(
                f"{len(self.entries)} parameters in {self.end} bytes of version {self.version} came, which are not what "
                "was sent"
            )
