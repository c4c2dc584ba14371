"""When Python may look for garbage: not at what stays, and not everywhere while thousands of requests are open."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 1 << 30


def spare_what_is_here() -> None:
    """What the start built stays until the end: no later collection visits it. A stage change collects (megatron.caches),
    and libraries alone are half a million objects."""
    gc.collect()
    gc.freeze()


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Only the young generations are collected meanwhile.

    A full collection visits every object of the process, those of each open request among them: half a second at 8,192
    requests, again and again, in which no request moves. What a rollout leaves in cycles is found after it.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
