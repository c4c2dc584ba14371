"""Each trainer rank's part of a weight update: one export, carried to all of the rank's destinations at once.

While the destinations are sent one piece the next one is gathered and packed. A destination that fails, or takes nothing
for a while, is dropped and named; the others complete.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from pathlib import Path
from typing import ParamSpec, Protocol

import torch
from torch import Tensor

from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout.weights.checklist import Checklist
from nemo_dapo.rollout.weights.host import HostCarrier
from nemo_dapo.rollout.weights.pack import Piece, pack
from nemo_dapo.rollout.weights.plan import Outcome, Place, Sent, UpdatePlan
from nemo_dapo.rollout.weights.store import sees
from nemo_dapo.rollout.weights.table import Entry, Table
from nemo_dapo.rollout.weights.tcp import TCPCarrier

P = ParamSpec("P")
PIECE_BYTES = 16 << 20  # few enough to stay in the processor's cache from one copy to the next
BUFFERS = 2  # one travels while the next is packed


class Carrier(Protocol):
    """Brings the pieces of one version after the other to one destination; whatever it raises drops the destination."""

    def begin(self, version: int, deadline: float) -> None:
        """`deadline` is of time.monotonic(): nothing may wait for longer."""
        ...

    def carry(self, piece: Piece) -> None:
        """Pieces come in order; the piece's memory is another's when this returns."""
        ...

    def commit(self, table: Table) -> None: ...

    def close(self) -> None: ...


class Sender:
    """One rank's carriers and buffers, kept from one update to the next."""

    def __init__(self, expected: Callable[[], ExpectedWeights], piece_bytes: int = PIECE_BYTES) -> None:
        """`expected` reads what the served model has; it is called once, where the rank has a destination at all."""
        self.expected = functools.cache(expected)
        self.piece_bytes = piece_bytes
        self._ring: Ring | None = None
        self._carriers: dict[Place, Carrier] = {}

    def send(self, weights: Iterable[tuple[str, Tensor]], plan: UpdatePlan, rank: int) -> Sent:
        """Carry `weights`, in whose export every rank takes part to its end, to the places that `plan` gives this rank."""
        weights, places = iter(weights), plan.for_rank(rank)
        try:
            return self._send(weights, plan, places) if places else Sent()
        finally:
            for _ in weights:  # the export is collective: another rank may still need this one
                pass

    def close(self) -> None:
        for carrier in self._carriers.values():
            carrier.close()
        self._carriers.clear()

    def _send(self, weights: Iterator[tuple[str, Tensor]], plan: UpdatePlan, places: list[Place]) -> Sent:
        self._ring = self._ring or Ring(self.piece_bytes)
        deadline = time.monotonic() + plan.seconds
        for gone in self._carriers.keys() - set(places):  # a node that left, or came back with another folder
            self._carriers.pop(gone).close()
        with contextlib.ExitStack() as stack:
            lanes = [stack.enter_context(Lane(place, self._carrier(place, plan))) for place in places]
            for lane in lanes:
                lane.do(lane.carrier.begin, plan.version, deadline)
            entries: list[Entry] = []
            try:
                for piece in pack(weights, Checklist(self.expected(), plan.dtype), self._ring.free_buffer):
                    entries += piece.entries
                    self._ring.lend([lane.do(lane.carrier.carry, piece) for lane in lanes])
            except ValueError as problem:
                return Sent(refusal=str(problem))
            table = Table(plan.version, tuple(entries))
            for lane in lanes:
                lane.do(lane.carrier.commit, table)
        return Sent(tuple(self._outcome(lane, table.digest) for lane in lanes))

    def _carrier(self, place: Place, plan: UpdatePlan) -> Carrier:
        if place not in self._carriers:
            self._carriers[place] = carrier_to(place, plan)
        return self._carriers[place]

    def _outcome(self, lane: Lane, digest: str) -> Outcome:
        if not lane.fault:
            return Outcome(lane.place.node, digest)
        self._carriers.pop(lane.place).close()  # its connection may be in the middle of something
        return Outcome(lane.place.node, fault=lane.fault)


def carrier_to(place: Place, plan: UpdatePlan) -> Carrier:
    """Whatever the hosts are called: who sees the node's folder writes into it."""
    if sees(Path(place.folder), place.nonce):
        return HostCarrier(Path(place.folder))
    return TCPCarrier(place, plan.token)


class Lane:
    """The carrier to one place, whose calls run in order in a thread of its own; leaving the context waits for all."""

    def __init__(self, place: Place, carrier: Carrier) -> None:
        self.place, self.carrier = place, carrier
        self.fault = ""  # the first; after it nothing is carried
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"weights to {place.node}")

    def do(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> Future[None]:
        return self._pool.submit(self._try, functools.partial(action, *args, **kwargs))

    def _try(self, action: Callable[[], None]) -> None:
        if self.fault:
            return
        try:
            action()
        except (OSError, RuntimeError, ValueError, HTTPException) as problem:
            self.fault = f"{type(problem).__name__}: {problem}"

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


class Ring:
    """BUFFERS buffers in turn; one is given out again when every lane is done with it."""

    def __init__(self, size: int) -> None:
        on_device = torch.cuda.is_available()
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=on_device) for _ in range(BUFFERS)]
        self.loans: list[list[Future[None]]] = [[] for _ in range(BUFFERS)]
        self.turn = 0

    def free_buffer(self) -> Tensor:
        """The next buffer [size] uint8; waits for the slowest lane, whose carrier keeps to its deadline."""
        self.turn = (self.turn + 1) % BUFFERS
        wait(self.loans[self.turn])
        return self.buffers[self.turn]

    def lend(self, loans: list[Future[None]]) -> None:
        """The buffer given out last is in use until all of `loans` are done."""
        self.loans[self.turn] = loans
