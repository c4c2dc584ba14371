"""NCCL broadcasts between processes that share no torch process group, with a way out where a peer hangs.

torch's own bindings cannot abort such a communicator. The calls are those of nccl.h; both ends use this file. A thread's
current device and stream are its own: what is called here makes the communicator's device current, and a stream that
nobody else waits for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

UNIQUE_ID_BYTES = 128
UINT8, FLOAT32, SUM = 1, 7, 0  # of nccl.h
POLL_SECONDS = 0.002
REMEDY = "start the servers with VLLM_NCCL_SO_PATH=<the trainer's libnccl.so.2>, or set rollout.transport=host"


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class Work(Protocol):
    """What the device was given to do; torch.cuda.Event is one."""

    def query(self) -> bool: ...


class NCCL:
    """The library, by `VLLM_NCCL_SO_PATH` or the one that torch has loaded. Raises OSError where there is none."""

    def __init__(self) -> None:
        path = os.environ.get("VLLM_NCCL_SO_PATH") or "libnccl.so.2"
        try:
            self.library = ctypes.CDLL(path)
        except OSError as problem:
            raise OSError(
                f"rollout.transport=device needs NCCL, and {path} cannot be loaded ({problem}): name the library in "
                "VLLM_NCCL_SO_PATH, or set rollout.transport=host"
            ) from problem
        self.library.ncclGetErrorString.restype = ctypes.c_char_p

    def version(self) -> int:
        """As NCCL counts: 22803 is 2.28.3."""
        number = ctypes.c_int()
        self._call("ncclGetVersion", ctypes.byref(number))
        return number.value

    def unique_id(self) -> bytes:
        made = UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)

    def join(self, world_size: int, unique_id: bytes, rank: int) -> Any:
        """A communicator; blocks until all `world_size` ranks join."""
        communicator = ctypes.c_void_p()
        made = UniqueId.from_buffer_copy(unique_id)
        self._call("ncclCommInitRank", ctypes.byref(communicator), ctypes.c_int(world_size), made, ctypes.c_int(rank))
        return communicator

    def all_reduce(self, data: Tensor, communicator: Any) -> Work:
        """Of float32 in place, on the current stream."""
        memory, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.numel())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        kind, operation = ctypes.c_int(FLOAT32), ctypes.c_int(SUM)
        self._call("ncclAllReduce", memory, memory, count, kind, operation, communicator, stream)
        return self._recorded()

    def broadcast(self, data: Tensor, root: int, communicator: Any) -> Work:
        """Of bytes [n] in place, on the current stream."""
        memory, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.numel())
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call(
            "ncclBroadcast", memory, memory, count, ctypes.c_int(UINT8), ctypes.c_int(root), communicator, stream
        )
        return self._recorded()

    def abort(self, communicator: Any) -> None:
        self._call("ncclCommAbort", communicator)

    def _recorded(self) -> Work:
        event = torch.cuda.Event()
        event.record()
        return event

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name} failed: {self.library.ncclGetErrorString(code).decode()}")


class Communicator:
    """Rank `rank` of a group of its own; one that hangs is aborted at the deadline of the call."""

    def __init__(
        self,
        nccl: NCCL,
        unique_id: bytes,
        world_size: int,
        rank: int,
        deadline: float,
        device: torch.device | str = "cuda",
    ) -> None:
        """Raises TimeoutError where not everybody has joined by `deadline`, of time.monotonic()."""
        self.nccl, self.device = nccl, torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._communicator = self._join(unique_id, world_size, rank, deadline)
        # vLLM's own communicators begin with one: the first collective sets the connections up.
        with self._current():
            work = nccl.all_reduce(torch.zeros(1, device=self.device), self._communicator)
        self._finish(work, deadline)

    def broadcast(self, data: Tensor, deadline: float) -> None:
        """From rank 0 into `data` [n] uint8 of the others; returns when it is there. Raises TimeoutError, all over.

        Whatever was to be done with `data` before is done.
        """
        with self._current():
            work = self.nccl.broadcast(data, 0, self._communicator)
        self._finish(work, deadline)

    def _current(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def abort(self) -> None:
        """End it without a word to the others; safe to call twice."""
        if self._communicator is not None:
            communicator, self._communicator = self._communicator, None
            self.nccl.abort(communicator)

    def _join(self, unique_id: bytes, world_size: int, rank: int, deadline: float) -> Any:
        """In a thread, since NCCL waits for the others as long as it takes; one that is left behind waits on."""
        joined: list[Any] = []

        def join() -> None:
            try:
                with self._current():
                    joined.append(self.nccl.join(world_size, unique_id, rank))
            except RuntimeError as problem:
                joined.append(problem)

        thread, seconds = threading.Thread(target=join, name="NCCL", daemon=True), max(0.0, deadline - time.monotonic())
        thread.start()
        thread.join(seconds)
        if not joined:
            raise TimeoutError(f"not all of {world_size} ranks joined the NCCL group within {seconds:.0f} s")
        if isinstance(joined[0], Exception):
            raise joined[0]
        return joined[0]

    def _finish(self, work: Work, deadline: float) -> None:
        seconds = deadline - time.monotonic()
        while not work.query():
            if time.monotonic() > deadline:
                self.abort()
                raise TimeoutError(f"an NCCL call did not return within {seconds:.0f} s: a peer hangs or is gone")
            time.sleep(POLL_SECONDS)


def first_ranks(workers: Sequence[int]) -> list[int]:
    """The rank of each server's first worker, given each one's number (data x pipeline x tensor); 0 is the sender."""
    return [1 + sum(workers[:k]) for k in range(len(workers))]


def require_same_version(mine: int, theirs: Mapping[str, str]) -> None:
    """Raise ValueError where somebody's NCCL is another than this process's: NCCL would refuse it, without a name."""
    other = [f"{name} has {version or 'none'}" for name, version in theirs.items() if version != spelled(mine)]
    if other:
        raise ValueError(
            f"NCCL must be of one version to send weights, the trainer has {spelled(mine)}: {', '.join(other)}; {REMEDY}"
        )


def spelled(version: int) -> str:
    """22803 -> 2.28.3, and 2708, of before 2.9, -> 2.7.8."""
    major, rest = divmod(version, 10_000) if version >= 10_000 else divmod(version, 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"
