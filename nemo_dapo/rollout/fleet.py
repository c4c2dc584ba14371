"""The servers as their requests see them: who has room, who is sick, and what is done about it.

A server is sick when its process is dead, when nothing comes of its requests for `progress_timeout` seconds (the usual end
of a GPU), when an answer is late, or when it fails a few times in a row. It is then restarted while its requests go
elsewhere. One that stays sick through several restarts is given up. One whose node is lost waits for that node, or for a
spare one, however long it takes. The run ends when fewer than `rollout.min_servers` are left, or have had a node of late.

Everything here runs in the run's event loop, but for `restart`, which blocks in a thread.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nemo_dapo.rollout.admission import Admission, Reading, Seen
from nemo_dapo.rollout.member import Life, Member, Servers

log = logging.getLogger(__name__)

MAX_FAULTS = 3  # of one server in a row, without a sample in between
FAULT_SECONDS = 1.0  # what fails within them fails of one cause, and counts once
MAX_RESTARTS = 3  # of one server in a row, without a sample in between
LOOK_SECONDS = 1.0  # between two looks at a server with open requests


class SickError(RuntimeError):
    """Too few servers are left that could serve; names each one's last fault and log."""


class LostServerError(ConnectionError):
    """The server that had the request is being restarted."""


class HopelessError(RuntimeError):
    """A restart failed in a way that another one would not mend."""


class Fleet:
    """Admits samples to servers within the limit of each (`admission`), and has sick servers restarted.

    `restart(index)` blocks until the server serves the newest weights again, and raises when it does not. Fewer than
    `least` servers that are not given up end the run, as do fewer that have a node and weights, after `patience` seconds.
    """

    def __init__(
        self,
        size: int,
        ceiling: int,
        servers: Servers,
        restart: Callable[[int, str], None],
        *,
        cache_target: float = 1.0,
        least: int = 1,
        patience: float = 900.0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.servers, self.restart, self.describe = servers, restart, servers.describe
        self.least, self.patience = least, patience
        self.too_few: asyncio.Future[str] = (
            self.loop.create_future()
        )  # resolves with who is left and why that is the end
        self.members = [Member(i, self._new_life(), Admission(ceiling, cache_target)) for i in range(size)]
        self.waiters: deque[tuple[int, asyncio.Future[Member]]] = deque()  # samples and their place, first come first
        self.repairs: set[asyncio.Task[None]] = set()

    def _new_life(self) -> Life:
        return Life(self.loop.create_future())

    # ---------------------------------------------------------------- admission

    async def take(self, n: int, *, is_retry: bool = False) -> Member:
        """Wait until a server has room for `n` more samples and take them there: the least loaded one that serves.

        Whoever came first is served first, but for samples that are asked for again, which are of earlier ones. More
        samples than the limit run alone on a server. Raises SickError when too few servers are left.
        """
        place: asyncio.Future[Member] = self.loop.create_future()
        (self.waiters.appendleft if is_retry else self.waiters.append)((n, place))
        self._serve()
        try:
            return await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._serve()  # whoever waits behind it
            elif place.exception() is None:
                self.give(place.result(), n)
            raise

    def give(self, member: Member, n: int = 1) -> None:
        """Not a coroutine: a request that is being cancelled must give its place back without waiting for anything."""
        member.load -= n
        self._serve()

    def _serve(self) -> None:
        """Give places to those who wait, in their order, while there is room for the first."""
        while self.waiters and not self.too_few.done():
            n, place = self.waiters[0]
            if not place.done():  # else it was cancelled
                if (member := self._pick(n)) is None:
                    break
                if not member.load:
                    self.progressed(member)  # the clock starts with the first of its open requests
                member.load += n
                place.set_result(member)
            self.waiters.popleft()
        if self.too_few.done():
            for _, place in self.waiters:
                if not place.done():
                    place.set_exception(SickError(self.too_few.result()))
            self.waiters.clear()

    def _pick(self, n: int) -> Member | None:
        serving = [m for m in self.members if not m.given_up and not m.is_stale and m.has_room(n)]
        up = [m for m in serving if not m.is_down]
        # A server that is being restarted gets requests only where it is the only one: they wait for it.
        if not up and any(self.can_serve(m) and not m.is_down for m in self.members):
            return None
        return min(up or serving, key=lambda m: (m.life.faults, m.admission.pressure(m.load), m.load), default=None)

    # ---------------------------------------------------------------- health

    async def ready(self, member: Member) -> Life:
        """Wait while the server is being restarted (it is the only one then) and return its life since.

        Raises LostServerError when it was given up or has no weights to serve, SickError when too few servers are left.
        """
        if member.is_down:
            repaired = asyncio.ensure_future(self.settled(member))
            either: set[asyncio.Future[Any]] = {repaired, self.too_few}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                repaired.cancel()
            if self.too_few.done():
                raise SickError(self.too_few.result())
        if member.given_up:
            raise LostServerError(member.given_up)
        if member.is_stale:
            raise LostServerError("it has old weights until the next update")
        return member.life

    async def settled(self, member: Member) -> None:
        """Returns when whatever is done about the server at this moment is done."""
        async with member.repair:
            pass

    def outdate(self, member: Member, why: str) -> None:
        """It has old weights, and no others until the next update: what it has open is to be asked for elsewhere."""
        member.is_stale = True
        if not member.life.lost.done():
            member.life.lost.set_result(why)
            member.life = self._new_life()

    def renew(self, member: Member, version: int) -> None:
        """It has the newest weights, those of `version`."""
        member.version, member.is_stale = version, False
        self._serve()

    def served(self, member: Member) -> None:
        """A good answer: whatever the server failed at before is forgiven."""
        member.life.faults = member.restarts = 0
        member.finished += 1
        self.progressed(member)

    def progressed(self, member: Member) -> None:
        member.life.progress_at = time.monotonic()

    async def report(self, member: Member, life: Life, fault: str, *, is_fatal: bool = False) -> None:
        """As `attend`, but returns as soon as it is known that the server is restarted: its requests may go elsewhere.

        The restart belongs to nobody's request, so that one which is cancelled does not cancel it.
        """
        repair = asyncio.ensure_future(self.attend(member, life, fault, is_fatal=is_fatal))
        self.leave_to_itself(member, repair)
        either: set[asyncio.Future[Any]] = {repair, life.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def leave_to_itself(self, member: Member, repair: asyncio.Task[None]) -> None:
        """Nobody waits for `repair` to its end; what it raises is logged, or said to whoever asks for a server."""
        self.repairs.add(repair)
        repair.add_done_callback(functools.partial(self._repaired, member))

    def _repaired(self, member: Member, repair: asyncio.Task[None]) -> None:
        self.repairs.discard(repair)
        if repair.cancelled() or (error := repair.exception()) is None or isinstance(error, SickError):
            return  # whoever takes a server next hears of a SickError
        log.error("the restart of %s failed", self.describe(member.index), exc_info=error)

    async def attend(self, member: Member, life: Life, fault: str, *, is_fatal: bool = False) -> None:
        """Note that a request failed in `life` of a server; restart the server where that is called for.

        Returns when the server can be asked again, or was given up. Raises SickError when it was the last one.
        """
        async with member.repair:
            if member.life is not life or member.given_up:  # somebody else saw to it
                return
            now, ended = time.monotonic(), self._ended(member)
            if member.is_stale and not (ended or is_fatal):
                return  # that is no fault of its own
            if now - life.fault_at >= FAULT_SECONDS:
                life.faults, life.fault_at = life.faults + 1, now
            if ended or is_fatal or life.faults >= MAX_FAULTS:
                await self._restart(member, ended or fault)

    async def _restart(self, member: Member, fault: str) -> None:
        member.is_down = True
        member.life.lost.set_result(fault)
        past = member.past()
        try:
            while member.restarts < MAX_RESTARTS:
                if self.servers.is_away(member.index):
                    log.error("%s; it is restarted when a node takes its place", fault)
                    await self.servers.node_back(member.index)
                began = time.monotonic()
                try:
                    await self._start_anew(member, past, fault)
                    return
                except HopelessError as problem:
                    fault = str(problem)
                    break
                except (RuntimeError, OSError, TimeoutError, asyncio.TimeoutError) as problem:
                    fault, past = str(problem), f"the start before failed after {time.monotonic() - began:.0f} s"
                    member.restarts -= self.servers.is_away(member.index)  # that was not the server's fault
            self._give_up(member, fault)
        finally:
            member.life = self._new_life()
            member.is_down = False
            self._serve()

    async def _start_anew(self, member: Member, past: str, fault: str) -> None:
        """One try; raises what `restart` does."""
        member.restarts += 1
        member.all_restarts += 1
        who, tries = self.describe(member.index), f"try {member.restarts} of {MAX_RESTARTS} before it is given up"
        log.error("restarting %s, %s (%s): %s", who, tries, past, fault.removeprefix(f"{who}: "))
        await asyncio.to_thread(self.restart, member.index, fault)

    def _give_up(self, member: Member, fault: str) -> None:
        member.given_up = (
            f"{self.describe(member.index)} is sick after {member.restarts} restart(s) in a row, of {MAX_RESTARTS} at most "
            f"without a sample in between: {fault}"
        )
        left = sum(not one.given_up for one in self.members)
        if left < self.least:
            self._end_run("")
            raise SickError(member.given_up if not left else self.too_few.result())
        log.error(
            "%s; it is given up, the run goes on with %d other(s), rollout.min_servers=%d; a resume starts it again",
            *(member.given_up, left, self.least),
        )

    def _ended(self, member: Member) -> str | None:
        """How the server's process ended, None while it lives."""
        return None if self.servers.alive(member.index) else self.servers.describe_exit(member.index)

    def can_serve(self, member: Member) -> bool:
        """Whether it serves, or will once it has started, without a node or weights that it does not have."""
        return not (member.given_up or member.is_stale or self.servers.is_away(member.index))

    def _end_run(self, why: str) -> None:
        """Tell everyone who waits for a server, now or later, that too few are left."""
        if self.too_few.done():
            return
        if all(one.given_up for one in self.members):
            message = "no vLLM server is left: " + "; ".join(one.given_up for one in self.members)
        else:
            left = [one for one in self.members if self.can_serve(one)]
            message = (
                f"{len(left)} of {len(self.members)} vLLM servers are left, rollout.min_servers={self.least} must be{why}: "
                + "; ".join(self._condition(one) for one in self.members)
            )
        self.too_few.set_result(message)
        self._serve()

    def _condition(self, member: Member) -> str:
        """Its state, with the reason where it is no good one."""
        if member.given_up or not self.servers.is_away(member.index):
            return member.given_up or f"{self.describe(member.index)} {self.state(member)}"
        return self.servers.describe_exit(member.index)

    def state(self, member: Member) -> str:
        """In a word, for messages: serving, suspect, starting, stale, lost or given up."""
        if member.given_up:
            return "given up"
        if self.servers.is_away(member.index):
            return "lost"
        if member.is_down:
            return "starting"
        if member.is_stale:
            return "stale"
        return "suspect" if member.life.faults else "serving"

    def _say_changes(self, states: list[str]) -> None:
        """One line on the console for all servers whose state is not the one in `states`, which is brought up to date."""
        changed = []
        for member in self.members:
            last, state = states[member.index], self.state(member)
            if last != state and "suspect" not in (last, state):  # a fault or two is no news
                changed.append(f"{self.describe(member.index)} {last} -> {state}")
                states[member.index] = state
        if changed:
            print(f"{'; '.join(changed)}; {states.count('serving')} of {len(states)} serve", flush=True)

    async def _watch_number(self, paused: Sequence[str]) -> None:
        """End the run when fewer than `least` servers can serve for longer than `patience`; say what changes meanwhile."""
        enough_at = time.monotonic()
        states = ["serving"] * len(self.members)  # as the start, a pause, leaves them
        while not self.too_few.done():
            await asyncio.sleep(min(LOOK_SECONDS, self.patience / 4))
            if paused:
                enough_at = time.monotonic()
                continue
            self._say_changes(states)
            left = [one for one in self.members if self.can_serve(one)]
            if len(left) >= self.least:
                enough_at = time.monotonic()
            elif time.monotonic() - enough_at > self.patience:
                self._end_run(
                    f" and no other came back within rollout.start_timeout={self.patience:.0f} s (bring nodes back, or "
                    "lower rollout.min_servers, and resume)"
                )

    async def watch(
        self, read: Callable[[int], Awaitable[Reading | None]], timeout: float, paused: Sequence[str]
    ) -> None:
        """For ever, look at each server with `read(index)`: what it says sets how much it is sent, and one that ended, or
        has open requests while its count of tokens stands still, is restarted.

        Nothing is held against a server while `paused` is not empty: an update stops generation, and while servers sleep
        there is no room for a new one.
        """
        watches = (self._watch(member, read, timeout, paused) for member in self.members)
        await asyncio.gather(self._watch_number(paused), *watches)

    async def _watch(
        self, member: Member, read: Callable[[int], Awaitable[Reading | None]], timeout: float, paused: Sequence[str]
    ) -> None:
        seen: float | None = None
        looked, finished = time.monotonic(), member.finished
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, timeout / 4))
            life = member.life
            if paused or member.is_down or member.given_up:
                self.progressed(member)
                looked, finished = time.monotonic(), member.finished
                continue
            if not member.load:
                member.admission.rest()
            elif (reading := await read(member.index)) is not None and member.life is life:
                if reading.tokens is not None and reading.tokens != seen:
                    member.tokens += reading.tokens - (seen if seen is not None and seen < reading.tokens else 0)
                    seen = reading.tokens
                    self.progressed(member)
                self._admit(member, reading, member.finished - finished, time.monotonic() - looked)
            looked, finished = time.monotonic(), member.finished
            silence = time.monotonic() - life.progress_at
            hangs = bool(member.load) and silence > timeout and member.life is life and not paused
            fault = (
                f"no token of its {member.load} open samples for {silence:.0f} s, expected within "
                f"rollout.progress_timeout={timeout:g} s"
            )
            if hangs or not self.servers.alive(member.index):
                repair = asyncio.ensure_future(self.attend(member, life, fault, is_fatal=hangs))
                self.leave_to_itself(member, repair)  # whatever it raises, the server is looked at again
                await asyncio.wait({repair})

    def _admit(self, member: Member, reading: Reading, finished: int, seconds: float) -> None:
        is_wanted = any(not place.done() for _, place in self.waiters)
        member.admission.observe(reading, load=member.load, finished=finished, seconds=seconds, is_wanted=is_wanted)
        self._serve()

    def take_seen(self) -> Seen:
        """What the looks at all servers have shown since the last call."""
        seen = Seen()
        for member in self.members:
            seen = seen.joined(member.admission.take_seen())
        return seen
