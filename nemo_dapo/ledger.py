"""Device memory before each stage: what is free, what the stage needs, and who holds the rest when that is not enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nemo_dapo.telemetry.memory import GIB
from nemo_dapo.types import Stage

TRANSFER_BYTES = 2 * GIB  # on the device while weights are sent: two buckets, or one exported tensor and its copy

REMEDY = (
    "lower rollout.vllm.gpu_memory_utilization or trainer.tokens_per_microbatch, spread the model over more GPUs "
    "(parallel.*), or give the servers GPUs of their own (rollout.visible_devices)"
)


class MemoryShortError(RuntimeError):
    """A stage needs more device memory than is free."""


@dataclass(frozen=True)
class Reading:
    """Bytes of this rank's device: free and in all, and of this process those in tensors and those of torch's allocator."""

    free: int
    total: int
    allocated: int
    reserved: int


@dataclass(frozen=True)
class ServerMemory:
    """Bytes that servers take on this rank's device when they wake; none where no server is on it."""

    weights: int = 0
    cache: int = 0

    @classmethod
    def released(cls, awake: Reading | None, asleep: Reading | None, weights: int) -> ServerMemory:
        """Of servers that gave back memory between the two readings; `weights` of it, at most, were the model's."""
        if awake is None or asleep is None:
            return cls()
        given = max(0, asleep.free - awake.free)
        return cls(min(weights, given), max(0, given - weights))

    def needs(self, stage: Stage) -> dict[str, int]:
        """What waking them takes once `stage` is entered, by name."""
        if stage is Stage.sync and self.weights:
            return {"the servers' weights": self.weights, "weights in transfer": TRANSFER_BYTES}
        if stage is Stage.generate and self.cache:
            return {"the servers' key-value cache": self.cache}
        return {}


Read = Callable[[], Reading | None]


def read_device() -> Reading | None:
    """The present device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return Reading(free, total, torch.cuda.memory_allocated(), torch.cuda.memory_reserved())


def shortage(stage: Stage, reading: Reading, needs: Mapping[str, int], held: Mapping[str, int]) -> str:
    """What to say when `needs` do not fit, with everyone that holds memory; empty where they do.

    `held` is what the trainer knows that it holds on the device. What torch's allocator keeps for tensors to come is not
    free: callers have given it back, and what is left of it cannot be.
    """
    needed = sum(needs.values())
    if needed <= reading.free:
        return ""
    holders = dict(held)
    holders["other tensors of the trainer"] = max(0, reading.allocated - sum(held.values()))
    holders["torch's unused cache"] = reading.reserved - reading.allocated
    holders["other processes, NCCL and CUDA itself"] = reading.total - reading.free - reading.reserved
    return (
        f"stage {stage.value} needs {_gib(needed)} of device memory ({_list(needs)}) and {_gib(reading.free)} of "
        f"{_gib(reading.total)} are free; held by: {_list(holders)}; {REMEDY}"
    )


def _list(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
