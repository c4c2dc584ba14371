"""Which collectives of this rank have not ended: read in PyTorch's flight recorder, a ring of the newest of all groups.

It is on unless TORCH_FR_BUFFER_SIZE is 0, for gloo and NCCL alike, and knows each group by its name, so that what a rank
waits in can be said while it waits. What was captured in a CUDA graph, and the parts of a batch of sends, never count as
ended there: a group's entries are therefore believed only behind the last one of it that ended, and since a given time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch._C import _distributed_c10d as c10d

log = logging.getLogger(__name__)

READERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # of GPUs; of the CPU's groups. A build may lack either
ABOUT_TO_END = 0.9  # of its time limit; behind it PyTorch ends it, and on a GPU the process, without a word of ours


@dataclass(frozen=True)
class Unfinished:
    """A collective, or a send or receive; `number` is counted alike by all ranks of the group."""

    operation: str
    number: int
    group: str
    since: float  # by this rank's clock
    timeout: float  # seconds

    def __str__(self) -> str:
        return f"{self.operation} {self.number} of {self.group}"

    def is_about_to_end(self) -> bool:
        return time.time() - self.since > ABOUT_TO_END * self.timeout


def unfinished(since: float = 0.0) -> list[Unfinished]:
    """What this rank has begun at `since`, by its clock, or later, and not ended, the oldest first; nothing where the
    recorder is off or has no answer."""
    found = (one for entries in _records() for one in _unfinished_of(entries) if one.since >= since)
    return sorted(found, key=lambda one: one.since)


def _records() -> Iterator[list[dict[str, Any]]]:
    for name in READERS:
        try:
            if read := getattr(c10d, name, None):
                yield json.loads(read(True, False)).get("entries", [])
        except RuntimeError as problem:  # a CUDA event that may not be asked, as after an error of the device
            log.debug("the flight recorder does not answer: %s", problem)


def _unfinished_of(entries: Iterable[dict[str, Any]]) -> list[Unfinished]:
    open_ones: dict[int, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda one: one["record_id"]):
        if entry["retired"]:
            open_ones.pop(entry["pg_id"], None)
        else:
            open_ones.setdefault(entry["pg_id"], []).append(entry)
    return [_described(entry) for of_group in open_ones.values() for entry in of_group]


def _described(entry: dict[str, Any]) -> Unfinished:
    name, description = entry["process_group"]
    return Unfinished(
        operation=entry["profiling_name"],
        number=entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"],
        group=f"group {name}" if description in ("", "undefined") else description,
        since=entry["time_created_ns"] / 1e9,
        timeout=entry["timeout_ms"] / 1e3,
    )
