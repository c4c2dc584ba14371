"""One line of the table, and how the rows measure time and memory on either device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """A number that was measured; with `most` or `least`, what it has to keep to for the proof to hold."""

    what: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None

    @property
    def holds(self) -> bool:
        """Not where the value is not a number."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    @property
    def expected(self) -> str:
        bounds = [f"{sign} {bound:.4g}" for sign, bound in (("≤", self.most), ("≥", self.least)) if bound is not None]
        return ", ".join(bounds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, *, repeats: int = 1, warm_up: int = 0) -> float:
    """Mean wall-clock seconds of `work`, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """How far memory rises above what is held before `work`: of tensors on a GPU, of this process on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest value begins anew (man 5 proc)
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
