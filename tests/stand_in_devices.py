"""Host memory and gloo in the places of a GPU and NCCL, and a server whose workers have such devices: for tests.

Nothing but the seams is replaced: `direct.Device`, the library behind `nccl.Communicator`, and `cuda_ipc.open_handle`.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu import transfer
from benchmarks.gpu.transfer import open_on_host
from nemo_dapo.rollout.weights import nccl
from nemo_dapo.rollout.weights.incoming import Incoming
from nemo_dapo.rollout.weights.nccl import Communicator
from nemo_dapo.rollout.weights.pack import as_bytes, tensor_checksum
from tests.stand_in_server import Handler, say
from tests.stand_in_vllm import Server

VERSION = 22803
JOIN_SECONDS = 20.0


class Work:
    """One that has failed is never done: NCCL does not notice that a peer is gone."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def query(self) -> bool:
        return bool(self.work.is_completed()) and self.work.exception() is None


class GlooNCCL(nccl.NCCL):
    """As `nccl.NCCL`, between processes of one machine; the unique id is the path of a file where they meet."""

    kept: ClassVar[list[Any]] = []  # gloo waits, where a group is let go of, until its last call has failed

    def __init__(self) -> None:
        """Loads no library."""

    def version(self) -> int:
        return VERSION

    def unique_id(self) -> bytes:
        return tempfile.mktemp(prefix="gloo_nccl_").encode().ljust(nccl.UNIQUE_ID_BYTES, b"\0")

    def join(self, world_size: int, unique_id: bytes, rank: int) -> Any:
        store = dist.FileStore(unique_id.rstrip(b"\0").decode(), world_size)
        self.kept.append(dist.ProcessGroupGloo(store, rank, world_size, datetime.timedelta(seconds=JOIN_SECONDS)))
        return self.kept[-1]

    def all_reduce(self, data: Tensor, communicator: Any) -> Work:
        return Work(communicator.allreduce([data]))

    def broadcast(self, data: Tensor, root: int, communicator: Any) -> Work:
        options = dist.BroadcastOptions()
        options.rootRank = root
        return Work(communicator.broadcast([data], options))

    def abort(self, communicator: Any) -> None:
        assert communicator in self.kept


class HostMemory(transfer.HostMemory):
    """As `direct.GPU`."""

    def nccl(self) -> Any:
        return GlooNCCL()

    def communicator(self, library: Any, unique_id: bytes, world_size: int, rank: int, deadline: float) -> Communicator:
        return Communicator(library, unique_id, world_size, rank, deadline, device="cpu")


class Neighbours:
    """As `direct.Neighbours`, of ranks that are threads of this process."""

    def __init__(self, host: str, ranks: int) -> None:
        self.host, self.barrier, self.said = host, threading.Barrier(ranks), list[Any]()
        self.local = threading.local()

    def as_rank(self, rank: int) -> Neighbour:
        return Neighbour(self, rank)


class Neighbour:
    def __init__(self, all_of_them: Neighbours, rank: int) -> None:
        self.all, self.host, self.is_first = all_of_them, all_of_them.host, rank == 0

    def meet(self, seconds: float) -> None:
        self.all.barrier.wait(seconds)

    def gather(self, value: Any) -> list[Any]:
        self.all.said.append(json.loads(json.dumps(value)))
        self.meet(JOIN_SECONDS)
        return self.all.said


class DeviceServer(Server):
    """A server with a worker on each of CUDA_VISIBLE_DEVICES, which takes weights as vLLM and vllm_weights.py do.

    What vLLM would not survive, or not notice, is refused: weights for a server that generates or whose memory is away, an
    update in another's middle, one that ends before all of it came, a server that goes on in the middle of one.
    """

    def __init__(self) -> None:
        workers = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        self.incoming = [Incoming(torch.device("cpu", 0), i, GlooNCCL, open_on_host) for i in range(workers)]
        self.pool = ThreadPoolExecutor(workers)
        self.loaded: list[dict[str, int]] = [{} for _ in range(workers)]  # checksums, of the update under way
        self.is_whole = self.is_begun = self.is_paused = False
        self.asleep: set[str] = set()
        self.joins = 0
        super().__init__()

    def control(self, handler: Handler) -> None:
        route = handler.path.partition("?")[0]
        acts: dict[str, Callable[[Any], None]] = {
            "/sleep": lambda body: self.asleep.update(("weights", "kv_cache")),
            "/wake_up": lambda body: self.asleep.discard(handler.path.partition("tags=")[2]),
            "/pause": lambda body: setattr(self, "is_paused", True),
            "/init_weight_transfer_engine": self._join,
            "/start_weight_update": self._begin,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
            "/resume": self._resume,
        }
        if route == "/loaded":
            say(handler, json.dumps({"loaded": self.loaded, "joins": self.joins}).encode())
            return
        try:
            if route in acts:
                acts[route](handler.body)
        except (ValueError, RuntimeError) as problem:
            say(handler, str(problem).encode(), 500)
            return
        super().control(handler)

    def refuses(self, info: Mapping[str, Any]) -> bool:
        """What is wrong was said before; see `control`."""
        return False

    def _join(self, body: Any) -> None:
        if group := body["init_info"].get("group"):
            self.joins += 1
            list(self.pool.map(lambda one: one.join(group), self.incoming))

    def _begin(self, body: Any) -> None:
        if self.is_begun or not self.is_paused or "weights" in self.asleep:
            raise RuntimeError(f"no update can begin: {self.is_begun=} {self.is_paused=} {self.asleep=}")
        self.is_begun, self.is_whole = True, False
        self.loaded = [{} for _ in self.incoming]
        for one in self.incoming:
            one.begin()

    def _update(self, body: Any) -> None:
        if not self.is_begun:
            raise RuntimeError("start_weight_update must be called before update_weights")
        info = body["update_info"]
        if info.get("piece"):
            list(self.pool.map(lambda one: self._receive(one, info), self.incoming))
            return
        assert not info.get("folder")
        for one in self.incoming:
            one.finish(info["version"], info["digest"])
        self.is_whole = True

    def _receive(self, one: Incoming, info: Any) -> None:
        for name, tensor in one.receive(info["version"], info["piece"]):
            self.loaded[one.worker][name] = tensor_checksum(as_bytes(tensor))

    def _finish(self, body: Any) -> None:
        if not self.is_whole:
            raise RuntimeError("finish_weight_update before all weights had come")
        self.is_begun = False

    def _resume(self, body: Any) -> None:
        if self.is_begun or self.asleep:
            raise RuntimeError(f"resumed too early: {self.is_begun=} {self.asleep=}")
        self.is_paused = False


def checksums(weights: Iterator[tuple[str, Tensor]]) -> dict[str, int]:
    """As a worker of `DeviceServer` has them after an update with `weights`."""
    return {name: tensor_checksum(as_bytes(tensor)) for name, tensor in weights}


if __name__ == "__main__":
    DeviceServer().thread.join()
