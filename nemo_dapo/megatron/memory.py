"""What of the policy lies on the device, stage by stage, and where the rest of it is meanwhile.

Parameters and gradients leave by Megatron's own buffer functions. Optimizer states and the reference model leave by ours:
their storages are emptied, so that every tensor and view stays what it was, and one pinned block of the host, allocated
once, holds the bytes. Megatron's own for the optimizer copies through pageable memory and tears float32 parameters
out of the buffer that they are views of.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_dapo import ledger
from nemo_dapo.collectives import gather_json
from nemo_dapo.coordination import found_alike
from nemo_dapo.ledger import MemoryShortError, ServerMemory
from nemo_dapo.megatron.caches import TemporaryTensors
from nemo_dapo.stages import check_order
from nemo_dapo.telemetry.memory import GIB
from nemo_dapo.telemetry.metrics import Max, Metric, Min
from nemo_dapo.types import Stage

log = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes; of each storage in its block, enough for every type
CUDA_HOST_REGISTER_PORTABLE = 1


class Holder(Protocol):
    """A part of the policy that can leave the device."""

    is_here: bool

    def size(self) -> int:
        """Bytes on the device when it is there."""
        ...

    def leave(self) -> None: ...

    def come_back(self) -> None: ...

    def resting(self) -> dict[int, Tensor]:
        """Host bytes of each storage that is away."""
        ...


class Parked:
    """Tensors, by `tensors()`, whose storages leave for one pinned block of the host and come back to the same objects."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.tensors = tensors
        self.is_here = True
        self.block = torch.empty(0, dtype=torch.uint8)
        self.away: list[tuple[Tensor, Tensor]] = []  # the bytes of each storage, and the place in the block

    def size(self) -> int:
        return sum(device.numel() for device, _ in self.away) or sum(one.numel() for one in _storages(self.tensors()))

    def leave(self) -> None:
        storages = _storages(self.tensors())
        ends = list(itertools.accumulate(-(-one.numel() // ALIGNMENT) * ALIGNMENT for one in storages))
        if ends and ends[-1] > self.block.numel():  # moments exist from the first update on
            unpin(self.block)
            self.block = pinned(ends[-1])
        self.away = [
            (one, self.block[start : start + one.numel()]) for one, start in zip(storages, [0, *ends], strict=False)
        ]
        for device, host in self.away:
            host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()
        for device, _ in self.away:
            device.untyped_storage().resize_(0)
        self.is_here = False

    def come_back(self) -> None:
        for device, host in self.away:
            device.untyped_storage().resize_(device.numel())
            device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        self.away = []
        self.is_here = True

    def resting(self) -> dict[int, Tensor]:
        return {_storage(device): host for device, host in self.away}


class BufferParameters:
    """The parameters of chunks in DistributedDataParallel: views of its flat buffers."""

    def __init__(self, model: list[Any]) -> None:
        self.buffers = _buffers(model)
        self.is_here = True

    def size(self) -> int:
        return sum(_bytes(buffer.param_data) for buffer in self.buffers)

    def leave(self) -> None:
        for buffer in self.buffers:
            if buffer.param_data_cpu is None:  # Megatron would make a pageable copy first: twice the memory
                data = buffer.param_data
                buffer.param_data_cpu = pinned(_bytes(data)).view(data.dtype).view(data.shape)
            buffer.offload_to_cpu(move_params=True, move_grads=False)
        torch.cuda.synchronize()
        self.is_here = False

    def come_back(self) -> None:
        for buffer in self.buffers:
            buffer.reload_from_cpu(move_params=True, move_grads=False)
        torch.cuda.synchronize()
        self.is_here = True

    def resting(self) -> dict[int, Tensor]:
        away = [] if self.is_here else self.buffers
        return {_storage(one.param_data): one.param_data_cpu.view(torch.uint8) for one in away}


class Gradients:
    """The gradient buffers: what is in them is lost, and they come back as zeros."""

    def __init__(self, model: list[Any], optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.is_here = True

    def size(self) -> int:
        return sum(_bytes(buffer.grad_data) for buffer in _buffers(self.model))

    def leave(self) -> None:
        self.optimizer.zero_grad()  # the shards' `.grad` are views of the buffers
        for chunk in self.model:
            chunk.offload_grad_buffers(empty_cache=False)
        self.is_here = False

    def come_back(self) -> None:
        for chunk in self.model:
            chunk.restore_grad_buffers()
        self.is_here = True

    def resting(self) -> dict[int, Tensor]:
        return {}


# What must be on the device in each stage.
HERE: dict[Stage, tuple[str, ...]] = {
    Stage.score: ("parameters", "frozen parameters"),
    Stage.train: ("parameters", "frozen parameters", "gradients", "optimizer states"),
    Stage.sync: ("parameters", "frozen parameters"),
    Stage.generate: (),
}


class PolicyMemory:
    """Moves a policy's memory when its stage changes; with `moves` false it keeps the order only.

    The policy begins with all that it has on the device: in stage train, or score where it has no optimizer.
    """

    def __init__(
        self,
        model: list[Any],
        optimizer: Any | None = None,
        reference: list[Any] | None = None,
        *,
        moves: bool = False,
        servers: ServerMemory | None = None,
        read: ledger.Read = ledger.read_device,
    ) -> None:
        self.model, self.optimizer, self.moves = model, optimizer, moves
        self.servers, self.read = servers or ServerMemory(), read
        self.stage = Stage.score if optimizer is None else Stage.train
        self.holders: dict[str, Holder] = self._make_holders()
        self.reference = Parked(lambda: [p for chunk in reference or () for p in chunk.parameters()])
        self.temporary = TemporaryTensors([*model, *(reference or [])])
        self.seconds = 0.0
        self.metrics: dict[str, Metric] = {}
        if moves:
            self.reference.leave()

    def _make_holders(self) -> dict[str, Holder]:
        if self.optimizer is None:
            return {"parameters": Parked(lambda: [p for chunk in self.model for p in chunk.parameters()])}
        frozen = [p for chunk in self.model for p in chunk.parameters() if not p.requires_grad]  # under adapters
        return {
            "parameters": BufferParameters(self.model),
            **({"frozen parameters": Parked(lambda: frozen)} if frozen else {}),
            "gradients": Gradients(self.model, self.optimizer),
            "optimizer states": Parked(self._states),
        }

    def _states(self) -> list[Tensor]:
        """Master weights and moments. float32 master weights are the parameters themselves, and not among them."""
        storages = {_storage(buffer.param_data) for buffer in _buffers(self.model)}
        where = self.model[0].buffers[0].param_data.device
        found = _optimizer_tensors(self.optimizer)
        return [t for t in found if t.device == where and t.ndim and _storage(t) not in storages]

    def enter(self, stage: Stage) -> None:
        """Go to `stage`; nothing where it is entered already. Collective.

        Raises RuntimeError for an order that cannot be, MemoryShortError, on every rank, when memory for the stage is
        missing on one of them.
        """
        if stage is self.stage:
            return
        check_order(self.stage, stage)
        if self.moves:
            start = time.monotonic()
            self._move(stage)
            self.seconds += time.monotonic() - start
        self.stage = stage

    def _move(self, stage: Stage) -> None:
        wanted = [self.holders[name] for name in HERE[stage] if name in self.holders]
        for holder in self.holders.values():
            if holder.is_here and holder not in wanted:
                holder.leave()
        self.temporary.free()
        coming = {name: one.size() for name, one in self.holders.items() if one in wanted and not one.is_here}
        if stage is Stage.score and self.reference.away:
            coming["reference model"] = self.reference.size()
        self._check(stage, coming | self.servers.needs(stage))
        for holder in wanted:
            if not holder.is_here:
                holder.come_back()

    def _check(self, stage: Stage, needs: Mapping[str, int]) -> None:
        """Once every rank has given back what it does not need: whether what the stage takes is there."""
        gather_json(stage.value)
        reading = self.read()
        said = ""
        if reading is not None:
            held = {name: one.size() for name, one in self.holders.items() if one.is_here}
            said = ledger.shortage(stage, reading, needs, held)
            self.metrics[f"memory/{stage.value}_free_gib"] = Min(reading.free / GIB)
            self.metrics[f"memory/{stage.value}_needed_gib"] = Max(sum(needs.values()) / GIB)
        short = [f"rank {rank}: {one}" for rank, one in enumerate(gather_json(said)) if one]
        if short:
            raise found_alike(MemoryShortError(short[0]))

    def require(self, *stages: Stage) -> None:
        """Raises RuntimeError in any other stage."""
        if self.stage not in stages:
            names = " or ".join(stage.value for stage in stages)
            raise RuntimeError(f"this needs stage {names}, and the policy is in {self.stage.value}: enter it before")

    @contextmanager
    def reference_here(self) -> Iterator[None]:
        """Inside, the reference model is on the device."""
        is_away = not self.reference.is_here
        if is_away:
            self.reference.come_back()
        try:
            yield
        finally:
            if is_away:
                self.reference.leave()

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Inside, parameters and optimizer states that are away are their copies on the host: a checkpoint can be written
        from any stage without device memory."""
        resting = {key: host for holder in self.holders.values() for key, host in holder.resting().items()}
        parameters = [p for chunk in self.model for p in chunk.parameters()]
        kept = []
        for tensor in itertools.chain(parameters, _optimizer_tensors(self.optimizer)):
            if (host := resting.get(_storage(tensor))) is not None:
                kept.append((tensor, tensor.data))
                tensor.data = _like(tensor, host)
        try:
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data

    def take_metrics(self) -> dict[str, Metric]:
        """What the stages since the last call measured, of this rank."""
        if not self.moves:
            return {}
        taken = self.metrics | {"memory/moving_seconds": Max(self.seconds)}
        self.metrics, self.seconds = {}, 0.0
        return taken


def pinned(size: int) -> Tensor:
    """[size] bytes of host memory that the device copies from and to at full speed.

    Not torch's pinned memory, whose size is rounded up to a power of two.
    """
    block = torch.empty(size, dtype=torch.uint8)
    if size and torch.cuda.is_available():
        error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, CUDA_HOST_REGISTER_PORTABLE))
        if error:
            log.warning("%.1f GB of host memory cannot be pinned (CUDA error %d): copies are slower", size / 1e9, error)
    return block


def unpin(block: Tensor) -> None:
    if block.numel() and torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


def _buffers(model: list[Any]) -> list[Any]:
    return [buffer for chunk in model for buffer in chunk.buffers + chunk.expert_parallel_buffers]


def _optimizer_tensors(optimizer: Any | None) -> list[Tensor]:
    """Of every torch optimizer in Megatron's: what it updates, and its state."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [one.optimizer for one in chained if getattr(one, "optimizer", None) is not None]
    found: list[Any] = []
    for one in inner:
        found += [p for group in one.param_groups for p in group["params"]]
        found += [value for state in one.state.values() for value in state.values()]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor is a view of, also where that is empty and has no address."""
    return int(tensor.untyped_storage()._cdata)


def _storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """[bytes] uint8 views of the storages of `tensors`, each once."""
    by_storage = {_storage(tensor): tensor for tensor in tensors}
    return [
        torch.empty(0, dtype=torch.uint8, device=one.device).set_(one.untyped_storage()) for one in by_storage.values()
    ]


def _bytes(flat: Tensor) -> int:
    return flat.numel() * flat.element_size()


def _like(tensor: Tensor, host: Tensor) -> Tensor:
    """The view of the bytes `host` of a storage that `tensor` is of that storage."""
    typed = host.view(tensor.dtype)
    return typed.as_strided(tensor.size(), tensor.stride(), typed.storage_offset() + tensor.storage_offset())
