"""Weights to another process on the same GPU by CUDA IPC: both ends are the product's, of `nemo_dapo/rollout/weights/`.

Here they are packed into two device buffers in turn; there `Incoming` opens each once, copies, checks every tensor's
checksum and the table's digest, as in a server's worker. No vLLM: pieces are announced over a pipe, not over HTTP. On a CPU
the buffers are shared host memory.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.line import GIB, Line, synchronize
from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout.weights.checklist import Checklist
from nemo_dapo.rollout.weights.cuda_ipc import Handle, open_handle, share
from nemo_dapo.rollout.weights.incoming import Incoming
from nemo_dapo.rollout.weights.pack import pack
from nemo_dapo.rollout.weights.servers import piece_info
from nemo_dapo.rollout.weights.table import Table

ROOT = Path(__file__).parents[2]
BUFFER = {"cpu": 1 << 20, "cuda": 1 << 30}  # bytes
TENSORS, ELEMENTS = {"cpu": 5, "cuda": 24}, {"cpu": 300_001, "cuda": 180_000_001}  # some lie in two pieces
PIECE_SECONDS = 60.0


def measure(device: str) -> Iterator[Line]:
    weights = {f"layer.{i}": random_weight(i, device) for i in range(TENSORS[device])}
    size = sum(weight.nbytes for weight in weights.values())
    with Receiver(device) as receiver:
        sender = Sender(receiver, device)
        started = time.perf_counter()
        answer = sender.send(weights, version=1)
        first = time.perf_counter() - started
        yield Line("tensors that arrived whole", answer["tensors"] / len(weights), "", least=1.0)
        started = time.perf_counter()
        sender.send(weights, version=2)
        took = time.perf_counter() - started
        yield Line("sent", size / GIB, "GiB")
        yield Line("first time", first, "s")
        # With checksums on both sides, which read the bytes once more each.
        yield Line("rate after that", size / took / 1e9, "GB/s", least=20 if device == "cuda" else None)
        refused = sender.send(weights, version=3, flips_a_bit=True).get("refused", "")
        yield Line("a flipped bit is refused", float("has other bytes than were sent" in refused), "", least=1.0)


def random_weight(seed: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(ELEMENTS[device], device=device, dtype=torch.bfloat16, generator=generator)


class Sender:
    """Two buffers and their handles, shared once."""

    def __init__(self, receiver: Receiver, device: str) -> None:
        self.receiver, self.device = receiver, device
        self.buffers = [shareable(BUFFER[device], device) for _ in range(2)]
        make = share if device == "cuda" else share_on_host
        self.handles = [make(buffer).as_json() for buffer in self.buffers]
        self.turn = self.waiting = 0

    def send(self, weights: dict[str, Tensor], version: int, *, flips_a_bit: bool = False) -> dict[str, Any]:
        """What the receiver says of the whole version."""
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        checklist = Checklist(ExpectedWeights(shapes, dtypes=dict.fromkeys(shapes, "bfloat16")), "bfloat16")
        entries = []
        for piece in pack(weights.items(), checklist, self.free_buffer):
            if flips_a_bit and not entries:
                piece.data[7] ^= 1
            entries += piece.entries
            synchronize(self.device)
            info = {**piece_info(version, piece, PIECE_SECONDS), "handle": self.handles[self.turn]}
            self.receiver.say({"version": version, "piece": info})
            self.waiting += 1
        while self.waiting:
            self.answered()
        return self.receiver.ask({"version": version, "digest": Table(version, tuple(entries)).digest})

    def free_buffer(self) -> Tensor:
        """The one that is not being read; waits for it."""
        while self.waiting == len(self.buffers):
            self.answered()
        self.turn = 1 - self.turn
        return self.buffers[self.turn]

    def answered(self) -> None:
        self.receiver.answer()
        self.waiting -= 1


def shareable(size: int, device: str) -> Tensor:
    """[size] uint8."""
    if device == "cuda":
        return torch.empty(size, dtype=torch.uint8, device=device)
    storage = torch.UntypedStorage._new_using_filename_cpu(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def share_on_host(buffer: Tensor) -> Handle:
    """As `cuda_ipc.share`, of shared host memory: its manager and its name stand where a GPU's handles do."""
    manager, name, size = buffer.untyped_storage()._share_filename_cpu_()
    return Handle(base64.b64encode(name).decode(), size, 0, base64.b64encode(manager).decode(), 0, "", False)


def open_on_host(handle: Handle, device: int) -> Tensor:
    manager, name = base64.b64decode(handle.ref_counter), base64.b64decode(handle.memory)
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager, name, handle.size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Receiver:
    """A context: the process that takes the pieces runs inside."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.transfer", device]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.say(message)
        return self.answer()

    def __enter__(self) -> Receiver:
        self.ask({})  # it has imported torch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def receive(device: str) -> None:
    """In the receiver: an answer a message."""
    incoming = Incoming(torch.device(device, 0), 0, open_buffer=open_handle if device == "cuda" else open_on_host)
    tensors, refused = 0, ""
    for text in sys.stdin:
        said = json.loads(text)
        try:
            if "piece" in said and not refused:
                tensors += sum(1 for _ in incoming.receive(said["version"], said["piece"]))
            elif "digest" in said and not refused:
                incoming.finish(said["version"], said["digest"])
        except ValueError as problem:
            refused = str(problem)
        synchronize(device)  # the buffer is the sender's again
        print(json.dumps({"tensors": tensors} | ({"refused": refused} if refused else {})), flush=True)
        if "digest" in said:
            tensors, refused = 0, ""
            incoming.begin()


if __name__ == "__main__":
    receive(sys.argv[1])
