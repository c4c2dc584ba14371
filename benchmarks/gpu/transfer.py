"""Weights to another process on the same GPU by CUDA IPC: both ends are the product's, of `nemo_dapo/rollout/weights/`.

Here the trainer's `Sender` packs them into two device buffers in turn and tells the receiver of each piece by HTTP; there
`Incoming` opens each buffer once, copies, checks every tensor's checksum and the table's digest, as in a server's worker.
There is no vLLM. On a CPU the buffers are shared host memory.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.line import GIB, Line, synchronize
from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout.weights.cuda_ipc import Handle, open_handle
from nemo_dapo.rollout.weights.direct import GPU, PIECE_BYTES, Direct
from nemo_dapo.rollout.weights.incoming import Incoming
from nemo_dapo.rollout.weights.plan import Target, UpdatePlan
from nemo_dapo.rollout.weights.send import Sender

ROOT = Path(__file__).parents[2]
BUFFER = {"cpu": 1 << 20, "cuda": PIECE_BYTES}
TENSORS, ELEMENTS = {"cpu": 5, "cuda": 24}, {"cpu": 300_001, "cuda": 180_000_001}  # some lie in several pieces
UPDATE_SECONDS = 120.0


def measure(device: str) -> Iterator[Line]:
    weights = {f"layer.{i}": random_weight(i, device) for i in range(TENSORS[device])}
    size = sum(weight.nbytes for weight in weights.values())
    with Receiver(device) as receiver:
        rank = Rank(receiver, weights, device)
        started = time.perf_counter()
        answer = rank.send(version=1)
        first = time.perf_counter() - started
        yield Line("tensors that arrived whole", answer.get("tensors", 0) / len(weights), "", least=1.0)
        started = time.perf_counter()
        rank.send(version=2)
        took = time.perf_counter() - started
        yield Line("sent", size / GIB, "GiB")
        yield Line("first time", first, "s")
        # With checksums on both sides, which read the bytes once more each.
        yield Line("rate after that", size / took / 1e9, "GB/s", least=20 if device == "cuda" else None)
        rank.flips_a_bit = True
        refused = rank.send(version=3).get("refused", "")
        yield Line("a flipped bit is refused", float("has other bytes than were sent" in refused), "", least=1.0)


def random_weight(seed: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(ELEMENTS[device], device=device, dtype=torch.bfloat16, generator=generator)


class Rank:
    """The only one of its host, as the carriers see its neighbours and its device."""

    host, is_first, gpu = "here", True, "GPU-0"

    def __init__(self, receiver: Receiver, weights: dict[str, Tensor], device: str) -> None:
        self.receiver, self.weights, self.memory = receiver, weights, GPU() if device == "cuda" else HostMemory()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        expected = ExpectedWeights(shapes, dtypes=dict.fromkeys(shapes, "bfloat16"))
        self.direct = Direct(self, self, self.gpu, BUFFER[device])  # type: ignore[arg-type]
        self.sender = Sender(lambda: expected, direct=self.direct)
        self.flips_a_bit = False

    def send(self, version: int) -> dict[str, Any]:
        """What the receiver says of the whole version."""
        self.receiver.ask("/start_weight_update")
        targets = (Target("receiver", self.receiver.url, (self.gpu,), host=self.host),)
        plan = UpdatePlan(version, "bfloat16", UPDATE_SECONDS, "", (), targets, "key", is_direct=True)
        (outcome,) = self.sender.send(self.weights.items(), plan, 0).outcomes
        if outcome.fault:
            return {"refused": outcome.fault}
        return self.receiver.ask("/update_weights", {"version": version, "digest": outcome.digest})

    def meet(self, seconds: float) -> None:
        """Nobody else is to come."""

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]

    def buffer(self, size: int) -> Tensor:
        return self.memory.buffer(size)

    def share(self, buffer: Tensor) -> Handle:
        return self.memory.share(buffer)

    def settle(self) -> None:
        """Once a piece is packed: on its way a bit may flip."""
        self.memory.settle()
        if self.flips_a_bit:
            for buffer in self.direct.buffers:
                buffer[7] ^= 1
            self.memory.settle()


class HostMemory:
    """In the place of `direct.GPU`, as far as one process shares memory with another."""

    def buffer(self, size: int) -> Tensor:
        storage = torch.UntypedStorage._new_using_filename_cpu(size)
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def share(self, buffer: Tensor) -> Handle:
        """Its manager and its name stand where a GPU's handles do."""
        manager, name, size = buffer.untyped_storage()._share_filename_cpu_()
        return Handle(base64.b64encode(name).decode(), size, 0, base64.b64encode(manager).decode(), 0, "", False)

    def settle(self) -> None:
        """Everything is done at once."""


def open_on_host(handle: Handle, device: int) -> Tensor:
    """As `cuda_ipc.open_handle`, of what `HostMemory` shares."""
    manager, name = base64.b64decode(handle.ref_counter), base64.b64decode(handle.memory)
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager, name, handle.size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Receiver:
    """A context: the process that takes the pieces runs inside."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.transfer", device]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.url = ""

    def ask(self, route: str, info: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}{route}", json.dumps({"update_info": info}).encode(), method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=UPDATE_SECONDS) as response:
            return json.loads(response.read())

    def __enter__(self) -> Receiver:
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()  # it has imported torch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(60)


class Worker(HTTPServer):
    """In the receiver: the weight routes of a server with one worker."""

    def __init__(self, device: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.device, self.tensors = device, 0
        opening = open_handle if device == "cuda" else open_on_host
        self.incoming = Incoming(torch.device(device, 0), 0, open_buffer=opening)

    def begin(self) -> None:
        self.tensors = 0
        self.incoming.begin()

    def take(self, said: dict[str, Any]) -> None:
        if "piece" in said:
            self.tensors += sum(1 for _ in self.incoming.receive(said["version"], said["piece"]))
        else:
            self.incoming.finish(said["version"], said["digest"])
        synchronize(self.device)  # the buffer is the sender's again


class Handler(BaseHTTPRequestHandler):
    server: Worker

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, refused = 200, ""
        try:
            self.server.take(said["update_info"]) if self.path == "/update_weights" else self.server.begin()
        except ValueError as problem:
            status, refused = 500, str(problem)
        body = json.dumps({"tensors": self.server.tensors, "refused": refused}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


if __name__ == "__main__":
    worker = Worker(sys.argv[1])
    print(f"http://127.0.0.1:{worker.server_port}", flush=True)
    worker.serve_forever()
