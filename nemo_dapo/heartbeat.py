"""Which rank is silent, and where the others are: what no collective can say, since all it knows is that somebody is late.

A thread of each rank writes what the rank is at, every few seconds and whenever that changes, to torch.distributed's store,
on a connection of its own. It beats also while the main thread waits in a collective, which releases the interpreter's
lock; a rank that is stopped, or whose host is gone, does not. Rank 0 reads all beats, the others that of rank 0. Whoever
finds one silent for too long says so once for the job; then every rank that can writes its stacks to `errors/rank_N.stacks`
and the job ends.

A rank that hangs in a kernel is not silent: it beats, while the others wait in a collective, which PyTorch ends at its time
limit; between GPUs it ends the process too. Shortly before, whoever waits there says where all ranks are, and they write
their stacks. Nothing is ended for it.

The store lives in torchrun. Where it does not answer, nothing is concluded of anybody.
"""

from __future__ import annotations

import datetime
import faulthandler
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from nemo_dapo import flight_recorder
from nemo_dapo.flight_recorder import Unfinished
from nemo_dapo.phase import Phase, clock

log = logging.getLogger(__name__)

SECONDS_BETWEEN_BEATS = 5.0
BEATS_UNTIL_SUSPECT = 3  # missed by a rank that is named once a collective has failed already
STORE_SECONDS = 20.0  # for one call of the store
STACKS_SECONDS = 10.0  # for the other ranks to write theirs before the first one to exit ends them all
NAMED = 8  # ranks in one message
VERDICT, WRITTEN, ENDED, ASKED = "verdict", "stacks written", "ended", "asked for stacks"


@dataclass(frozen=True)
class Beat:
    """A rank's last word; `count` tells a new one from an old one without comparing the clocks of two hosts."""

    count: int
    host: str
    phase: str
    step: int
    since: float  # of the phase, by the rank's own clock
    waits: str = ""  # for which collective, in a phase that lasts long

    def __str__(self) -> str:
        place = f"{self.phase} of step {self.step} on {self.host} since {clock(self.since)}"
        return place + (self.waits and f", in {self.waits}")


class Heartbeat:
    """Of one rank, from `start` to `stop`; `timeout` seconds of silence end the job, `collective_timeout` are those that
    PyTorch gives a collective.

    `end(message, speaks)` must end this process: by the message where `speaks`, in silence otherwise.
    """

    def __init__(
        self,
        phase: Phase,
        timeout: float,
        collective_timeout: float,
        errors: Path,
        end: Callable[[str, bool], object],
        store: dist.Store | None = None,
    ) -> None:
        self.phase, self.timeout, self.collective_timeout = phase, timeout, collective_timeout
        self.errors, self.end = errors, end
        self.store = store or connect()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.interval = min(SECONDS_BETWEEN_BEATS, timeout / 6)
        self.watched = [r for r in (range(self.world) if self.rank == 0 else (0,)) if r != self.rank]
        self.beats: dict[int, Beat] = {}
        self.heard: dict[int, float] = {}  # when a beat last changed, by this rank's monotonic clock
        self.count = 0
        self.open: list[Unfinished] = []  # of this rank's collectives; looked for where a phase lasts long
        self.stacks_given = 0  # to those who asked
        self.has_judged = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self, group: dist.ProcessGroup | None) -> None:
        """Begin; collective over `group`, so that every rank has said its first word when another one listens."""
        self._beat()
        dist.barrier(group=group)
        self.thread.start()

    def stop(self) -> None:
        """This rank is done: nobody waits for its beat any more."""
        self.ended.set()
        self.phase.changed.set()
        self.thread.join(timeout=STORE_SECONDS)
        self._try(lambda: self.store.set(str(self.rank), ENDED))

    def first_to_say(self, message: str) -> bool:
        """Whether no other rank has said `message`: what all find alike is said once. True where the store is gone."""
        key = hashlib.sha256(message.encode()).hexdigest()
        said: list[int] = []
        self._try(lambda: said.append(self.store.add(key, 1)))
        return said in ([], [1])

    @staticmethod
    def can_explain(error: BaseException) -> bool:
        """Whether `error`, or what caused it, is a failed collective: its text names this rank, not the one at fault."""
        causes: list[BaseException | None] = [error]
        while (last := causes[-1]) is not None:
            causes.append(last.__cause__)
        return any(isinstance(one, dist.DistError) or "gloo" in str(one) for one in causes)

    def accuse(self, problem: str) -> None:
        """After a collective of this rank failed: see who has fallen silent and where the others are, and end the job."""
        before = self._read(range(self.world))
        time.sleep(BEATS_UNTIL_SUSPECT * self.interval)
        after = self._read(range(self.world))
        silent = [rank for rank in after if after[rank] == before.get(rank) and rank != self.rank]
        self._pronounce(f"{problem}; {survey(after, silent)}", silent)

    def _run(self) -> None:
        looked = time.monotonic()
        while not self.ended.is_set():
            self.phase.changed.wait(self.interval)
            self.phase.changed.clear()
            answered = self._try(self._beat) and self._try(self._look) and self._try(self._warn)
            if not answered or time.monotonic() - looked > self.timeout / 2:
                # The store was away, or this process: a suspended job wakes up rank by rank.
                self.heard = dict.fromkeys(self.heard, time.monotonic())
            looked = time.monotonic()
            if silent := [rank for rank, when in self.heard.items() if looked - when > self.timeout]:
                seconds = looked - min(self.heard[rank] for rank in silent)
                self._pronounce(
                    f"no sign of life for {seconds:.0f} s (parallel.heartbeat_timeout={self.timeout:g}): "
                    + survey({rank: self.beats[rank] for rank in silent}, silent),
                    silent,
                )

    def _beat(self) -> None:
        self.count += 1
        at, waits = self.phase, self._look_for_open_ones()
        word = [self.count, socket.gethostname(), at.name, at.step, at.since, waits]
        self.store.set(str(self.rank), json.dumps(word))

    def _look_for_open_ones(self) -> str:
        """What this rank waits in, in words; empty early in a phase, where no CUDA event may be asked: another thread may
        be capturing a graph."""
        self.open = []
        if time.time() - self.phase.since < self.collective_timeout / 2:
            return ""
        self.open = flight_recorder.unfinished(self.phase.since)
        return str(self.open[0]) if self.open else "no collective"

    def _look(self) -> None:
        if not self.has_judged and self.store.check([VERDICT]):
            self._end(self.store.get(VERDICT).decode(), speaks=False)
        if (asked := self.store.add(ASKED, 0)) > self.stacks_given:
            self._give_stacks(asked)
        now = time.monotonic()
        found = self._read(self.watched)
        for rank, beat in found.items():
            if beat != self.beats.get(rank):
                self.heard[rank] = now
        self.beats = found
        self.heard = {rank: when for rank, when in self.heard.items() if rank in found}

    def _warn(self) -> None:
        """Before PyTorch ends a collective of this rank: say once a phase who waits where, and have all write stacks."""
        if not (self.open and self.open[0].is_about_to_end()):
            return
        if not self.first_to_say(f"waits long in {self.phase.name} of step {self.phase.step}"):
            return
        late = self.open[0]
        self._give_stacks(self.store.add(ASKED, 1))
        log.error(
            f"rank {self.rank} waits since {clock(late.since)} in {late}, which PyTorch ends after {late.timeout:.0f} s "
            f"(parallel.timeout_minutes): {survey(self._read(range(self.world)), [])}; "
            f"the stacks of all ranks are in {self.errors}"
        )

    def _read(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """The beats of those of `ranks` that have not ended."""
        texts = self.store.multi_get([str(rank) for rank in ranks])
        return {r: Beat(*json.loads(text)) for r, text in zip(ranks, texts, strict=True) if text != ENDED.encode()}

    def _pronounce(self, message: str, silent: Sequence[int]) -> None:
        """Say it for the whole job, unless another rank was first; end this rank."""
        self.has_judged = True  # beside the main thread, which may be the one that judges, the heartbeat goes on
        speaks = self.first_to_say(VERDICT)
        if speaks:
            self._try(lambda: self.store.set(VERDICT, message))
        self._end(message, speaks=speaks, expected=self.world - len(silent))

    def _end(self, message: str, *, speaks: bool, expected: int = 0) -> None:
        self._write_stacks(message)
        written = [0]
        self._try(lambda: written.append(self.store.add(WRITTEN, 1)))
        deadline = time.monotonic() + STACKS_SECONDS
        while speaks and written[-1] < expected and time.monotonic() < deadline:
            time.sleep(0.1)
            self._try(lambda: written.append(self.store.add(WRITTEN, 0)))
        self.end(f"{message}; stacks of those that could write them are in {self.errors}", speaks)

    def _give_stacks(self, asked: int) -> None:
        self.stacks_given = asked
        self._write_stacks("asked for by a rank that waits")

    def _write_stacks(self, message: str) -> None:
        self.errors.mkdir(parents=True, exist_ok=True)
        with (self.errors / f"rank_{self.rank}.stacks").open("a") as file:
            at = f"{self.phase.name} of step {self.phase.step}"
            file.write(f"{time.strftime('%F %T')} rank {self.rank}, {at}: {message}\n")
            file.writelines(f"not ended, since {clock(one.since)}: {one}\n" for one in self.open)
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")

    def _try(self, call: Callable[[], object]) -> bool:
        """Whether the store answered; the job may be at its end, or torchrun stopped or gone."""
        try:
            call()
            return True
        except (dist.DistError, RuntimeError) as problem:
            log.debug("the store of the heartbeat does not answer: %s", problem)
            return False


def connect() -> dist.Store:
    """A connection of its own to the store of torch.distributed: the process group's is busy while a group is made."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=STORE_SECONDS),
    )
    return dist.PrefixStore(f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def survey(beats: dict[int, Beat], silent: Sequence[int]) -> str:
    """Each silent rank by name, the others by phase: `rank 1 is silent, last in update of step 3 on …; ranks 0, 2: …`."""
    parts = [f"rank {rank} is silent, last in {beats[rank]}" for rank in silent[:NAMED]]
    if len(silent) > NAMED:
        parts.append(f"so are {len(silent) - NAMED} more")
    places: dict[tuple[str, int, str], list[int]] = {}
    for rank, beat in beats.items():
        if rank not in silent:
            places.setdefault((beat.phase, beat.step, beat.waits), []).append(rank)
    for ranks in sorted(places.values(), key=len)[:NAMED]:  # the odd ones first
        parts.append(f"{ranks_in_words(ranks)} in {beats[ranks[0]]}")
    return "; ".join(parts)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 4, 5`, or how many where that would be long."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) <= NAMED:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} ranks ({ranks[0]} to {ranks[-1]})"


def hosts_in_words(hosts: Sequence[str]) -> str:
    """`node1 0 to 7, node2 8 to 15` of each rank's host: torchrun numbers those of a host in a row."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return ", ".join(f"{host} {its[0]}" + (f" to {its[-1]}" if len(its) > 1 else "") for host, its in ranks.items())
