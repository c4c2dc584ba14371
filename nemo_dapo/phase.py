"""What a rank is at, for whoever has to say where a run stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


def clock(at: float) -> str:
    """The time of day of a moment of time.time(), on this rank's host."""
    return time.strftime("%T", time.localtime(at))


@dataclass
class Phase:
    """What a rank is at: written by its main thread, read by its heartbeat."""

    name: str = "start"
    step: int = 0
    since: float = field(default_factory=time.time)
    changed: threading.Event = field(default_factory=threading.Event)  # for the heartbeat to say so at once

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Within the block this rank is in `name`; afterwards, unless an error ends it, again where it was."""
        before = self.name
        self._set(name)
        yield
        self._set(before)

    def _set(self, name: str) -> None:
        self.name, self.since = name, time.time()
        self.changed.set()
