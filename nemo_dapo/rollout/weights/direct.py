"""One rank's way into the devices of servers: which carriers it has, over which memory, and with whom it meets.

    rank 0              broadcasts to servers that share nobody's GPU
    every rank          of a host whose GPUs servers share holds the pieces for its own; the first there tells the servers

All other ranks take part in the export alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.collectives import Neighbours
from nemo_dapo.rollout.weights.broadcast import BroadcastCarrier
from nemo_dapo.rollout.weights.cuda_ipc import CUDAIPCCarrier, Handle, share
from nemo_dapo.rollout.weights.nccl import NCCL, Communicator
from nemo_dapo.rollout.weights.plan import Seat, Target, UpdatePlan
from nemo_dapo.rollout.weights.servers import ServerCalls

PIECE_BYTES = 256 << 20  # of device memory, twice, for as long as the run lasts
BUFFERS = 2  # one travels while the next is packed


class Device(Protocol):
    """A rank's GPU, as far as the carriers need one; host memory stands in for it where there is none."""

    def buffer(self, size: int) -> Tensor:
        """[size] uint8, which other processes can open."""
        ...

    def share(self, buffer: Tensor) -> Handle: ...

    def settle(self) -> None:
        """Returns when all that was to be done so far is done."""
        ...

    def nccl(self) -> NCCL: ...

    def communicator(self, nccl: NCCL, unique_id: bytes, world_size: int, rank: int, deadline: float) -> Communicator:
        """As the class itself, on this device."""
        ...


class GPU:
    """The present device of torch."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def share(self, buffer: Tensor) -> Handle:
        return share(buffer)

    def settle(self) -> None:
        torch.cuda.current_stream().synchronize()

    def nccl(self) -> NCCL:
        return NCCL()

    def communicator(self, nccl: NCCL, unique_id: bytes, world_size: int, rank: int, deadline: float) -> Communicator:
        return Communicator(nccl, unique_id, world_size, rank, deadline, device=self.device)


def gpu_uuid() -> str:
    """Of the present device, as `nvidia-smi` spells it."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


class Direct:
    """One rank's carriers, kept from one update to the next where that can be; `gpu` is the UUID of its `device`."""

    def __init__(self, device: Device, neighbours: Neighbours, gpu: str, piece_bytes: int = PIECE_BYTES) -> None:
        self.device, self.neighbours, self.gpu, self.piece_bytes = device, neighbours, gpu, piece_bytes
        self._buffers: list[Tensor] = []
        self._handles: dict[str, list[Handle]] = {}  # by GPU of the host, on its first rank
        self._shared: CUDAIPCCarrier | None = None
        self._broadcast: BroadcastCarrier | None = None

    @classmethod
    def on_gpu(cls, seats: Sequence[Seat], seconds: float) -> Direct:
        """On torch's present device, given all ranks' `seats`; collective. `seconds` bound the collectives of one host."""
        return cls(GPU(), Neighbours([seat.host for seat in seats], seconds), seats[dist.get_rank()].gpu)

    @property
    def buffers(self) -> list[Tensor]:
        """Two of them [piece_bytes] on the device, in which pieces must lie."""
        if not self._buffers:
            self._buffers = [self.device.buffer(self.piece_bytes) for _ in range(BUFFERS)]
        return self._buffers

    def carriers(self, plan: UpdatePlan, rank: int) -> list[tuple[CUDAIPCCarrier | BroadcastCarrier, list[Target]]]:
        """This rank's, each with the servers that it is to speak for. Collective among the ranks of the host.

        Raises ValueError for memory that cannot be shared and for a server whose NCCL is another.
        """
        found: list[tuple[CUDAIPCCarrier | BroadcastCarrier, list[Target]]] = []
        if targets := plan.on_gpus_of(self.neighbours.host):
            found.append((self._sharing(targets, plan.key), targets if self.neighbours.is_first else []))
        if rank == 0 and (targets := plan.on_gpus_of("")):
            found.append((self._broadcasting(targets, plan.key), targets))
        return found

    def close(self) -> None:
        for carrier in (self._shared, self._broadcast):
            if carrier is not None:
                carrier.close()

    def _sharing(self, targets: Sequence[Target], key: str) -> CUDAIPCCarrier:
        if self._shared is not None:
            self._shared.close()
        if not self._handles:
            mine = [self.device.share(buffer).as_json() for buffer in self.buffers]
            everyone = self.neighbours.gather({"gpu": self.gpu, "handles": mine})
            self._handles = {one["gpu"]: [Handle(**handle) for handle in one["handles"]] for one in everyone}
        told = (targets, self._handles, ServerCalls(key, len(targets))) if self.neighbours.is_first else ()
        self._shared = CUDAIPCCarrier(self.buffers, self.neighbours.meet, *told)
        return self._shared

    def _broadcasting(self, targets: Sequence[Target], key: str) -> BroadcastCarrier:
        """The one of the update before, where its group is still whole."""
        if self._broadcast is None or not self._broadcast.serves(targets):
            if self._broadcast is not None:
                self._broadcast.close()
            calls = ServerCalls(key, len(targets))
            self._broadcast = BroadcastCarrier(targets, calls, self.device.nccl(), self.device.communicator)
        return self._broadcast
