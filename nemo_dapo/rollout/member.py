"""One server of the fleet: what is open on it, what it has had of late, each of its lives, and what it runs on."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import Protocol

from nemo_dapo.rollout.admission import Admission
from nemo_dapo.telemetry.kinds import Kinds


class Servers(Protocol):
    """What a fleet asks of what its servers run on; `nodes.ServingNodes` is one."""

    def alive(self, index: int) -> bool: ...

    def describe(self, index: int) -> str:
        """Names the server and its log."""
        ...

    def describe_exit(self, index: int) -> str:
        """How a server that is not alive ended."""
        ...

    def is_away(self, index: int) -> bool:
        """Whether the server's node is lost, so that it cannot be restarted for now."""
        ...

    async def node_back(self, index: int) -> None:
        """Returns once it can."""
        ...


@dataclass
class Life:
    """One start of a server, until it is restarted. `lost` resolves with the reason when this life ends."""

    lost: asyncio.Future[str]
    began_at: float = field(default_factory=time.monotonic)
    faults: int = 0
    fault_at: float = -math.inf
    progress_at: float = field(default_factory=time.monotonic)
    said: Kinds = field(default_factory=Kinds)  # of what went wrong with samples


@dataclass
class Member:
    """One server in the fleet; `load` counts the samples in flight on it, `restarts` those without a sample since."""

    index: int
    life: Life
    admission: Admission
    load: int = 0
    finished: int = 0  # good samples so far
    restarts: int = 0
    all_restarts: int = 0
    tokens: float = 0.0  # read and written so far, over all its lives
    version: int = 0  # of the weights it was given last
    is_down: bool = False
    is_stale: bool = False  # has old weights, and no others to take until the next update
    given_up: str = ""  # why
    repair: asyncio.Lock = field(default_factory=asyncio.Lock)

    def has_room(self, n: int) -> bool:
        return self.load == 0 or self.load + n <= self.admission.limit

    def past(self) -> str:
        """What a message says of its present life."""
        seconds = time.monotonic() - self.life.began_at
        return f"up for {seconds:.0f} s, {self.load} samples open, {self.finished} finished in this run"
