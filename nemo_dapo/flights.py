"""The groups in flight, each a task of the event loop; they may outlive the call that started them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from nemo_dapo.types import Group, Prompt

# A cancelled request must end within this many seconds: it only has to close a connection.
CANCEL_TIMEOUT = 60.0

GroupTask = asyncio.Task[Group]


@dataclass
class Occupancy:
    """How many groups were in flight between `since` and `until`, in seconds of the event loop's clock."""

    since: float
    until: float
    peak: int = 0
    group_seconds: float = 0.0
    idle_seconds: float = 0.0  # in which none was

    @property
    def seconds(self) -> float:
        return self.until - self.since

    @property
    def mean(self) -> float:
        return self.group_seconds / max(self.seconds, 1e-9)

    def pass_to(self, now: float, in_flight: int) -> None:
        """`in_flight` groups were, until `now`."""
        seconds, self.until = now - self.until, now
        self.group_seconds += seconds * in_flight
        self.idle_seconds += seconds * (in_flight == 0)


class Flights:
    """Runs one task a group; `on_end(index, task)` is called in the event loop for each that we did not cancel."""

    def __init__(self, on_end: Callable[[int, GroupTask], None]) -> None:
        self.running: dict[int, GroupTask] = {}
        self._on_end = on_end
        self._prompts: dict[GroupTask, Prompt] = {}
        self._cancelled: dict[GroupTask, int] = {}
        self._occupancy = Occupancy(0.0, 0.0)

    def start(self, index: int, prompt: Prompt, work: Coroutine[Any, Any, Group]) -> None:
        self._note()
        task = asyncio.create_task(work, name=f"group {prompt.uid}")
        self.running[index], self._prompts[task] = task, prompt
        self._occupancy.peak = max(self._occupancy.peak, len(self.running))
        task.add_done_callback(functools.partial(self._ended, index))

    def _ended(self, index: int, task: GroupTask) -> None:
        if task in self._cancelled:
            return
        self._note()
        del self.running[index], self._prompts[task]
        self._on_end(index, task)

    def cancel(self, indices: Iterable[int]) -> None:
        """End those of the groups that have not ended by themselves."""
        for index in indices:
            if not self.running[index].done():
                self._cancel(index)

    def _cancel(self, index: int) -> None:
        self._note()
        task = self.running.pop(index)
        self._cancelled[task] = index
        task.cancel()

    async def stop(self) -> None:
        """End everything still running and wait until it has ended. Raises TimeoutError when something does not."""
        for index in list(self.running):
            self._cancel(index)
        if not self._cancelled:
            return
        _, stuck = await asyncio.wait(self._cancelled, timeout=CANCEL_TIMEOUT)
        if stuck:
            names = self._names({self._cancelled[task]: task for task in stuck})
            raise TimeoutError(f"cancelled groups did not end within {CANCEL_TIMEOUT:g} s: {names}")
        for task in self._cancelled:
            del self._prompts[task]
        self._cancelled.clear()

    def waited_for(self) -> str:
        """The prompts in flight, for messages."""
        return self._names(self.running)

    def take_occupancy(self) -> Occupancy:
        """What `Occupancy` says of the time since the last call; the next one counts from now."""
        self._note()
        taken = self._occupancy
        self._occupancy = Occupancy(taken.until, taken.until, len(self.running))
        return taken

    def _note(self) -> None:
        """The number in flight is about to change."""
        self._occupancy.pass_to(asyncio.get_running_loop().time(), len(self.running))

    def _names(self, tasks: dict[int, GroupTask]) -> str:
        uids = [self._prompts[task].uid for _, task in sorted(tasks.items())]
        return f"{len(uids)} prompts: {', '.join(uids[:8])}" + (", ..." if len(uids) > 8 else "")
