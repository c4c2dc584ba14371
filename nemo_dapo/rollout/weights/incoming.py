"""A server worker's end of the carriers that put weights straight into its device."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_dapo.rollout.weights.assemble import Assembler
from nemo_dapo.rollout.weights.cuda_ipc import Handle, open_handle
from nemo_dapo.rollout.weights.nccl import NCCL, Communicator
from nemo_dapo.rollout.weights.table import Entry

log = logging.getLogger(__name__)


class Incoming:
    """`device` is the worker's own; `worker` its number among all of its server's."""

    def __init__(
        self,
        device: torch.device,
        worker: int,
        make_nccl: Callable[[], NCCL] = NCCL,
        open_buffer: Callable[[Handle, int], Tensor] = open_handle,
    ) -> None:
        self.device, self.worker = device, worker
        self.make_nccl, self.open_buffer = make_nccl, open_buffer
        self._group: Communicator | None = None
        self._assembler: Assembler | None = None
        self._opened: dict[Handle, Tensor] = {}
        self._inbox = torch.empty(0, dtype=torch.uint8)

    def join(self, group: Mapping[str, Any]) -> None:
        """Join the sender's group. Where others do not, this worker is not to blame: it answers, and is asked again."""
        self.leave()
        deadline = time.monotonic() + group["seconds"]
        unique_id, rank = base64.b64decode(group["unique_id"], validate=True), group["first_rank"] + self.worker
        try:
            self._group = Communicator(
                self.make_nccl(), unique_id, group["world_size"], rank, deadline, device=self.device
            )
        except TimeoutError as late:
            log.error("worker %d: %s", self.worker, late)

    def leave(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def begin(self) -> None:
        """Forget an update that did not come to its end."""
        self._assembler = None
        self._opened.clear()

    def receive(self, version: int, piece: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are whole with this piece; none where its broadcast was broken off, which then comes again.

        Raises ValueError for a piece that is not the next one of `version`, or a tensor that is not as it was sent.
        """
        assembler = self._of(version)
        data = self._shared(piece) if "handles" in piece else self._broadcast(piece)
        if data is not None:
            entries = [Entry(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in piece["entries"]]
            yield from assembler.add(piece["offset"], entries, data)

    def finish(self, version: int, digest: str) -> None:
        """Raises ValueError unless all of `version` has come, as it was sent."""
        self._of(version).finish(digest)
        self._opened.clear()  # the trainer's memory is its own again

    def _of(self, version: int) -> Assembler:
        if self._assembler is None:
            self._assembler = Assembler(version, self.device)
        if self._assembler.version != version:
            raise ValueError(f"a piece of version {version} came in the middle of version {self._assembler.version}")
        return self._assembler

    def _shared(self, piece: Mapping[str, Any]) -> Tensor:
        handle = Handle(**piece["handles"][self.worker])
        if handle not in self._opened:
            self._opened[handle] = self.open_buffer(handle, self.device.index)
        return self._opened[handle][: piece["nbytes"]]

    def _broadcast(self, piece: Mapping[str, Any]) -> Tensor | None:
        if self._group is None:
            raise ValueError("a piece is to be broadcast, but this worker is in no group")
        if len(self._inbox) < piece["nbytes"]:
            self._inbox = torch.empty(piece["nbytes"], dtype=torch.uint8, device=self.device)
        data = self._inbox[: piece["nbytes"]]
        try:
            self._group.broadcast(data, time.monotonic() + piece["seconds"])
        except TimeoutError as late:
            log.error("worker %d, byte %d: %s", self.worker, piece["offset"], late)
            self._group = None
            return None
        return data
