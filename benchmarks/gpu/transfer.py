"""Weights to another process on the same GPU by CUDA IPC: two buffers shared once, filled and emptied in turn.

What the carrier of `nemo_dapo/rollout/weights/` rests on, without vLLM: a handle made here, opened there from plain
text, and released. On a CPU the buffers are shared host memory, by the same calls of torch's storages.
"""

from __future__ import annotations

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

ROOT = Path(__file__).parents[2]
BUFFER = {"cpu": 1 << 20, "cuda": 1 << 30}  # bytes
PIECES = {"cpu": 4, "cuda": 16}


def measure(device: str) -> Iterator[Line]:
    size = BUFFER[device]
    buffers = [shareable(size, device) for _ in range(2)]
    generator = torch.Generator(device).manual_seed(2)
    source = torch.randint(0, 255, (PIECES[device], size // 8), device=device, generator=generator)
    expected = [checksum(piece) for piece in source]
    with Receiver(device) as receiver:
        started = time.perf_counter()
        receiver.ask({"open": [handle(buffer) for buffer in buffers]})
        yield Line("handles made and opened", 1e3 * (time.perf_counter() - started), "ms")
        started = time.perf_counter()
        waiting = 0
        for index, piece in enumerate(source):
            if waiting == len(buffers):  # the oldest buffer must have been read before it is filled anew
                receiver.answer()
                waiting -= 1
            buffers[index % 2].view(torch.int64).copy_(piece)
            synchronize(device)
            receiver.say({"take": index % 2})
            waiting += 1
        for _ in range(waiting):
            receiver.answer()
        took = time.perf_counter() - started
        found = receiver.ask({"checksums": True})
        receiver.ask({"close": True})
    right = sum(mine == theirs for mine, theirs in zip(expected, found, strict=True))
    yield Line("pieces that arrived whole", right / len(expected), "", least=1.0)
    yield Line("sent", PIECES[device] * size / GIB, "GiB")
    yield Line("rate", PIECES[device] * size / took / 1e9, "GB/s", least=20 if device == "cuda" else None)
    source[0, 0] += 1
    yield Line("a changed bit changes the checksum", float(checksum(source[0]) != expected[0]), "", least=1.0)


def shareable(size: int, device: str) -> Tensor:
    """[size] uint8; on a GPU of memory that is its own (not expandable segments, whose handles containers refuse)."""
    if device == "cpu":
        storage = torch.UntypedStorage._new_using_filename_cpu(size)
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    return torch.empty(size, dtype=torch.uint8, device=device)


def handle(buffer: Tensor) -> list[Any]:
    """What another process needs to open it, as JSON takes it: bytes as hexadecimal text."""
    storage = buffer.untyped_storage()
    parts = storage._share_filename_cpu_() if buffer.device.type == "cpu" else storage._share_cuda_()
    return [part.hex() if isinstance(part, bytes) else part for part in parts]


def opened(parts: list[Any], device: str) -> Tensor:
    numbers = [bytes.fromhex(part) if isinstance(part, str) else part for part in parts]
    if device == "cpu":
        storage = torch.UntypedStorage._new_shared_filename_cpu(*numbers)
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(*numbers)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def checksum(words: Tensor) -> int:
    """Of int64 words, modulo 2^64; odd weights name each one's place, so that an exchange shows as well."""
    places = torch.arange(len(words), device=words.device, dtype=torch.int64)
    return int((words * (2 * places + 1)).sum())


class Receiver:
    """A context: the process that takes the pieces runs inside."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.transfer", device]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self, message: dict[str, Any]) -> Any:
        self.say(message)
        return self.answer()

    def __enter__(self) -> Receiver:
        self.ask({"checksums": True})  # it has imported torch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def receive(device: str) -> None:
    """In the receiver: opens the buffers once, then copies and sums up each piece before it says so."""
    buffers: list[Tensor] = []
    found: list[int] = []
    for text in sys.stdin:
        said = json.loads(text)
        answer: Any = None
        if "open" in said:
            buffers = [opened(parts, device) for parts in said["open"]]
        elif "take" in said:
            own = buffers[said["take"]].clone().view(torch.int64)
            found.append(checksum(own))  # waits for the copy
        elif "checksums" in said:
            answer = found
        else:
            buffers.clear()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    receive(sys.argv[1])
