"""Another process that says how much memory it finds free: what a vLLM server on the same GPU would see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

import psutil
import torch

ROOT = Path(__file__).parents[2]


class Watcher:
    """A context: the process runs inside. `free()` is bytes of the GPU's memory, or of the host's less this process's."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.watcher", device]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def free(self) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __enter__(self) -> Watcher:
        self.free()  # its own CUDA context is there from now on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    watched = psutil.Process().parent()
    assert watched
    return psutil.virtual_memory().total - watched.memory_info().rss


if __name__ == "__main__":
    for _ in sys.stdin:
        print(free_bytes(sys.argv[1]), flush=True)
