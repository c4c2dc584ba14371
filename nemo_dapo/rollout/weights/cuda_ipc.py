"""Carrier to servers whose workers are on the trainer's own GPUs: they read the pieces where the ranks have them.

Every rank of a node packs the same pieces into two buffers of its own device. When all ranks have a piece, one of them
tells the servers; when those have copied it, the buffers are free again. Handles travel as numbers and base64 in JSON.
Buffers must be plain device memory: handles of PyTorch's expandable segments cannot be opened by another process inside a
container.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_dapo.rollout.weights.deadline import Deadline
from nemo_dapo.rollout.weights.pack import Piece
from nemo_dapo.rollout.weights.plan import Target, named
from nemo_dapo.rollout.weights.servers import ServerCalls, piece_info
from nemo_dapo.rollout.weights.table import Table

PIECE_SECONDS = 60.0  # for servers to copy one piece
MEET_SECONDS = 2 * PIECE_SECONDS  # for all ranks to come, of which one may be waiting for the servers
PLAIN_MEMORY = ord("c")  # second byte of torch's handle of memory that cudaMalloc gave


@dataclass(frozen=True)
class Handle:
    """What `UntypedStorage._share_cuda_` gives, in base64 where it is bytes; the device is the reader's own."""

    memory: str
    size: int
    offset: int
    ref_counter: str
    ref_counter_offset: int
    event: str
    event_sync: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def share(buffer: Tensor) -> Handle:
    """Of a buffer [n] uint8 on a CUDA device, which must live for as long as a reader has it open."""
    return handle_of(buffer.untyped_storage()._share_cuda_())


def handle_of(shared: Sequence[Any]) -> Handle:
    """From torch's tuple; raises ValueError for memory that another process may not be able to open."""
    _, memory, size, offset, ref_counter, ref_counter_offset, event, event_sync = shared
    if len(memory) != 66 or memory[1] != PLAIN_MEMORY:
        raise ValueError(
            "the buffer for weights is not in plain device memory; unset PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )
    encoded = [base64.b64encode(one).decode() for one in (memory, ref_counter, event)]
    return Handle(encoded[0], size, offset, encoded[1], ref_counter_offset, encoded[2], bool(event_sync))


def arguments_of(handle: Handle, version: int, device: int) -> tuple[Any, ...]:
    """What `UntypedStorage._new_shared_cuda` takes; `version` is the first byte of this process's own handles.

    torch refuses the handle of a newer torch, whose plain memory is nevertheless described in the same way.
    """
    memory, ref_counter, event = (base64.b64decode(one) for one in (handle.memory, handle.ref_counter, handle.event))
    if len(memory) != 66 or memory[1] != PLAIN_MEMORY:
        raise ValueError(f"a handle of {len(memory)} bytes does not describe plain device memory")
    memory = bytes([min(memory[0], version)]) + memory[1:]
    return device, memory, handle.size, handle.offset, ref_counter, handle.ref_counter_offset, event, handle.event_sync


def open_handle(handle: Handle, device: int) -> Tensor:
    """The buffer [n] uint8 in this process; close it by letting go of it."""
    own = torch.empty(1, dtype=torch.uint8, device=f"cuda:{device}").untyped_storage()._share_cuda_()[1][0]
    storage = torch.UntypedStorage._new_shared_cuda(*arguments_of(handle, own, device))
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


class CUDAIPCCarrier:
    """One rank's part. `meet` waits for all ranks of the node, so many seconds, and raises where one does not come.

    Only the first of them has `targets`: the node's servers, and `handles`, by GPU, of each buffer of the rank there.
    Servers that fail are named in `dropped`. That all of it came is asked by rank 0, which ends the update (`push.py`).
    """

    def __init__(
        self,
        buffers: Sequence[Tensor],
        meet: Callable[[float], None],
        targets: Sequence[Target] = (),
        handles: Mapping[str, Sequence[Handle]] | None = None,
        calls: ServerCalls | None = None,
    ) -> None:
        """Raises ValueError for a server with a worker on a GPU where no rank is."""
        self.places = [buffer.data_ptr() for buffer in buffers]
        self.meet, self.targets, self.handles, self.calls = meet, list(targets), handles or {}, calls
        self.dropped: dict[str, str] = {}
        self.version, self.deadline = -1, Deadline.after(0.0)
        for target in targets:
            if missing := [gpu for gpu in target.gpus if gpu not in self.handles]:
                raise ValueError(f"{target.name} has workers on {missing}, where no rank of the trainer is")

    def begin(self, version: int, deadline: Deadline) -> None:
        self.version, self.deadline = version, deadline

    def carry(self, piece: Piece) -> None:
        """`piece.data` begins where one of the buffers does, and all work on it is done."""
        buffer = self.places.index(piece.data.data_ptr())
        what = f"the piece of weights {self.version} at byte {piece.offset}"
        self.meet(self.deadline.left(MEET_SECONDS, f"every rank of the host had {what}"))
        info = piece_info(self.version, piece, PIECE_SECONDS)
        self._tell([{**info, "handles": self._handles(target, buffer)} for target in self.targets], what)
        self.meet(self.deadline.left(MEET_SECONDS, f"every server of the host had copied {what}"))

    def commit(self, table: Table) -> None:
        """Nothing is left to carry."""

    def close(self) -> None:
        """The buffers are their owner's."""
        if self.calls is not None:
            self.calls.close()

    def _handles(self, target: Target, buffer: int) -> list[dict[str, Any]]:
        """One a worker, of the rank on its GPU."""
        return [self.handles[gpu][buffer].as_json() for gpu in target.gpus]

    def _tell(self, pieces: Sequence[Any], what: str) -> None:
        """Call /update_weights of each target that is left; one that fails is dropped."""
        if self.calls is None or not self.targets:
            return
        seconds = self.deadline.left(PIECE_SECONDS, f"{named(self.targets)} had copied {what}")
        bodies = [{"update_info": {"version": self.version, "piece": piece}} for piece in pieces]
        faults = self.calls.begin(self.targets, "/update_weights", bodies, seconds).faults()
        self.dropped |= faults
        self.targets = [target for target in self.targets if target.name not in faults]
