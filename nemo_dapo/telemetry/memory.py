"""What this rank's process holds of the machine: a leak shows over steps, and its rank's neighbour is killed for it."""

from __future__ import annotations

import psutil
import torch

from nemo_dapo.telemetry.metrics import Max, Metric

GIB = 2**30


def memory_record() -> dict[str, Metric]:
    """Host memory of this process and, on CUDA, the most that its allocator held since the last call; in GiB."""
    record: dict[str, Metric] = {"memory/host_gib": Max(psutil.Process().memory_info().rss / GIB)}
    if torch.cuda.is_available():
        record["memory/gpu_reserved_gib"] = Max(torch.cuda.max_memory_reserved() / GIB)
        record["memory/gpu_allocated_gib"] = Max(torch.cuda.max_memory_allocated() / GIB)
        torch.cuda.reset_peak_memory_stats()
    return record
