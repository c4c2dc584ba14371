"""What is in flight in a RewardPool: units of work, the queue that deals them to workers, the gate that bounds them.

A unit is one call of the reward function; a job the units of one group.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from nemo_dapo.detokenizer import Ids
from nemo_dapo.types import Verdict

MAX_UNITS = 32  # in one message
MAX_BYTES = 1 << 21  # in one message


@dataclass
class Job:
    """One group being scored."""

    uid: str
    verdicts: list[Verdict | None]
    remaining: int
    units: int
    future: Future[list[Verdict]] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Unit:
    """One call of the reward function: the samples of `job` from `first` on, as texts or token ids; `prompt` is JSON."""

    job: Job
    first: int
    prompt: str
    responses: Sequence[str | Ids]
    losses: int = 0  # workers that were lost while this was their first unanswered unit

    @property
    def size(self) -> int:
        return len(self.responses)

    @property
    def nbytes(self) -> int:
        return len(self.prompt) + sum(len(r) if isinstance(r, str) else r.nbytes for r in self.responses)


def message(units: Collection[Unit]) -> bytes:
    """A line of JSON, then the token ids that it counts; made on a lane's thread, where copying holds nobody up."""
    calls = [[r if isinstance(r, str) else len(r) for r in unit.responses] for unit in units]
    line = ",".join(f"[{unit.prompt},{json.dumps(call)}]" for unit, call in zip(units, calls, strict=True))
    ids = (r.data for unit in units for r in unit.responses if not isinstance(r, str))
    return b"".join([f"[{line}]\n".encode(), *ids])


class Queue:
    """Units in submission order, handed out in shares that keep all `workers` busy."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.closed = False
        self._units: deque[Unit] = deque()
        self._changed = threading.Condition()

    def put(self, units: Sequence[Unit]) -> None:
        with self._changed:
            if self.closed:
                raise RuntimeError("the reward pool is closed; build a new RewardPool")
            self._units.extend(units)
            self._changed.notify(len(units))

    def put_back(self, units: deque[Unit]) -> None:
        """Return units to the front, whatever the state: `drain` finds them after the end."""
        with self._changed:
            self._units.extendleft(reversed(units))
            self._changed.notify(len(units))

    def take(self) -> list[Unit] | None:
        """The next share, None once closed."""
        with self._changed:
            while not self._units and not self.closed:
                self._changed.wait(1.0)
            if self.closed:
                return None
            count = min(MAX_UNITS, math.ceil(len(self._units) / self.workers))
            share = [self._units.popleft()]
            size = share[0].nbytes
            while len(share) < count and (size := size + self._units[0].nbytes) < MAX_BYTES:
                share.append(self._units.popleft())
            return share

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def drain(self) -> list[Unit]:
        with self._changed:
            units = list(self._units)
            self._units.clear()
            return units


class Gate:
    """Admits at most `capacity` units at a time, first come, first served; a larger group enters alone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._inside = 0
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._lock = threading.Lock()

    def enter(self, units: int) -> Future[None]:
        """A future that resolves when `units` are admitted; see `give_up`."""
        ticket: Future[None] = Future()
        with self._lock:
            self._waiting.append((units, ticket))
        self._admit()
        return ticket

    def give_up(self, ticket: Future[None], units: int) -> None:
        """Stop waiting for `ticket`, or leave where its units are admitted, or are about to be by another thread."""
        if not ticket.cancel():
            ticket.add_done_callback(lambda _: self.leave(units))

    def leave(self, units: int) -> None:
        with self._lock:
            self._inside -= units
        self._admit()

    def _admit(self) -> None:
        admitted = []
        with self._lock:
            while self._waiting and (self._inside == 0 or self._inside + self._waiting[0][0] <= self.capacity):
                units, ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    self._inside += units
                    admitted.append(ticket)
        for ticket in admitted:  # outside the lock: callbacks run here
            ticket.set_result(None)
