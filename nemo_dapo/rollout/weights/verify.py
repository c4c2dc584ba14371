"""A look at the weights in a node's folder before anything loads them: are they, byte for byte, what was sent?

A server is asked for it while it goes on generating. numpy is needed, torch is not.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_dapo.rollout.weights.checksum import checksum
from nemo_dapo.rollout.weights.store import DATA, read_announced, require_there
from nemo_dapo.rollout.weights.table import Entry

ROUTE = "/nemo_dapo/v1/verify_weights"  # of a server: JSON of a push.Held -> 200, or 422 with what is wrong
MAX_THREADS = 8  # as many as saturate a host's memory


def require_whole(folder: Path, version: int, digest: str) -> None:
    """Raise ValueError, which names the first such tensor, unless all of them lie in `folder` as they were sent.

    RuntimeError where the folder holds no weights.
    """
    table = read_announced(folder, version, digest)
    require_there(table, folder)
    data = np.memmap(folder / DATA, np.uint8, "r")

    def check(entry: Entry) -> None:
        require_sent(entry, checksum(part(data, entry)))

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, table.entries):
            pass


def part(data: NDArray[np.uint8], entry: Entry) -> NDArray[np.uint8]:
    return data[entry.offset : entry.offset + entry.nbytes]


def require_sent(entry: Entry, found: int) -> None:
    """Raise ValueError unless `found` is the checksum of what was sent."""
    if found != entry.checksum:
        raise ValueError(f"parameter {entry.name} has other bytes than were sent: its checksum differs")
