"""Each trainer rank's part of a weight update: one export, carried to all of the rank's destinations at once.

While the destinations are sent one piece the next one is gathered and packed. A destination that fails, or takes nothing
for a while, is dropped and named; the others complete. Destinations are nodes or, with `rollout.transport=device`, servers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from pathlib import Path
from typing import ParamSpec, Protocol

import torch
from torch import Tensor

from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout.weights.checklist import Checklist
from nemo_dapo.rollout.weights.deadline import Deadline
from nemo_dapo.rollout.weights.direct import BUFFERS, Direct
from nemo_dapo.rollout.weights.host import HostCarrier
from nemo_dapo.rollout.weights.pack import Piece, dtype_name, pack
from nemo_dapo.rollout.weights.plan import Outcome, Place, Sent, UpdatePlan
from nemo_dapo.rollout.weights.store import sees
from nemo_dapo.rollout.weights.table import Entry, Table
from nemo_dapo.rollout.weights.tcp import TCPCarrier

P = ParamSpec("P")
PIECE_BYTES = 16 << 20  # few enough to stay in the processor's cache from one copy to the next


class Carrier(Protocol):
    """Brings the pieces of one version after the other to one destination or more; whatever it raises drops them all."""

    dropped: dict[str, str]  # of several destinations, those that have failed, and why

    def begin(self, version: int, deadline: Deadline) -> None:
        """Nothing may wait for longer than until `deadline`."""
        ...

    def carry(self, piece: Piece) -> None:
        """Pieces come in order; the piece's memory is another's when this returns."""
        ...

    def commit(self, table: Table) -> None: ...

    def close(self) -> None: ...


class Sender:
    """One rank's carriers and buffers, kept from one update to the next; `direct` are those to servers' devices."""

    def __init__(
        self, expected: Callable[[], ExpectedWeights], piece_bytes: int = PIECE_BYTES, direct: Direct | None = None
    ) -> None:
        """`expected` reads what the served model has; it is called once, where the rank has a destination at all."""
        self.expected = functools.cache(expected)
        self.piece_bytes, self.direct = piece_bytes, direct
        self.has_looked = False
        self._ring: Ring | None = None
        self._carriers: dict[Place, Carrier] = {}

    def look(self, weights: Iterable[tuple[str, Tensor]], dtype: str) -> None:
        """Compare a whole export with the served model, which nobody is sent yet: bytes on a device have replaced others.

        Every export is like the first, and checked again while it is sent. Raises ValueError, on every rank.
        """
        checklist, weights = Checklist(self.expected(), dtype), iter(weights)
        try:
            for name, tensor in weights:
                checklist.add(name, tuple(tensor.shape), dtype_name(tensor))
            checklist.finish()
            self.has_looked = True
        finally:
            drain(weights)

    def send(self, weights: Iterable[tuple[str, Tensor]], plan: UpdatePlan, rank: int) -> Sent:
        """Carry `weights`, in whose export every rank takes part to its end, to where `plan` has this rank send them."""
        weights = iter(weights)
        try:
            lanes = self._lanes(plan, rank)
            return self._send(weights, plan, lanes) if lanes else Sent()
        finally:
            drain(weights)

    def close(self) -> None:
        for carrier in self._carriers.values():
            carrier.close()
        self._carriers.clear()
        if self.direct is not None:
            self.direct.close()

    def _send(self, weights: Iterator[tuple[str, Tensor]], plan: UpdatePlan, lanes: list[Lane]) -> Sent:
        ring = self._ring = self._ring or self._make_ring()
        checklist = Checklist(self.expected(), plan.dtype, at_once=self.direct is not None)
        deadline = Deadline.after(plan.seconds)
        entries: list[Entry] = []
        with contextlib.ExitStack() as stack:
            for lane in lanes:
                stack.enter_context(lane).do(lane.carrier.begin, plan.version, deadline)
            try:
                for piece in pack(weights, checklist, ring.free_buffer):
                    entries += piece.entries
                    ring.settle()
                    ring.lend([lane.do(lane.carrier.carry, piece) for lane in lanes])
            except ValueError as problem:
                return Sent(refusal=str(problem))
            table = Table(plan.version, tuple(entries))
            for lane in lanes:
                lane.do(lane.carrier.commit, table)
        self._forget(lane.carrier for lane in lanes if lane.fault)
        return Sent(tuple(outcome for lane in lanes for outcome in lane.outcomes(table.digest)))

    def _make_ring(self) -> Ring:
        if self.direct is not None:
            return Ring(self.direct.buffers, self.direct.device.settle)
        is_pinned = torch.cuda.is_available()
        return Ring([torch.empty(self.piece_bytes, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(BUFFERS)])

    def _lanes(self, plan: UpdatePlan, rank: int) -> list[Lane]:
        if self.direct is not None:
            return [Lane(carrier, [target.name for target in of]) for carrier, of in self.direct.carriers(plan, rank)]
        places = plan.for_rank(rank)
        gone = self._carriers.keys() - set(places) if places else set()  # nodes that left, or have another folder
        self._forget(self._carriers[place] for place in gone)
        for place in places:
            if place not in self._carriers:
                self._carriers[place] = carrier_to(place, plan)
        return [Lane(self._carriers[place], [place.node]) for place in places]

    def _forget(self, carriers: Iterable[Carrier]) -> None:
        """Close those to nodes: a connection may be in the middle of something."""
        gone = list(carriers)
        for place, carrier in list(self._carriers.items()):
            if carrier in gone:
                self._carriers.pop(place).close()


def drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Go through the rest of an export, which is collective: another rank may still need this one."""
    for _ in weights:
        pass


def carrier_to(place: Place, plan: UpdatePlan) -> Carrier:
    """Whatever the hosts are called: who sees the node's folder writes into it."""
    if sees(Path(place.folder), place.nonce):
        return HostCarrier(Path(place.folder))
    return TCPCarrier(place, plan.token)


class Lane:
    """A carrier to `names`, whose calls run in order in a thread of its own; leaving the context waits for all."""

    def __init__(self, carrier: Carrier, names: Sequence[str]) -> None:
        self.carrier, self.names = carrier, names
        self.fault = ""  # the first; after it nothing is carried
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"weights to {', '.join(names)}")

    def outcomes(self, digest: str) -> Iterator[Outcome]:
        """What became of each of `names`."""
        for name in self.names:
            fault = self.carrier.dropped.get(name, self.fault)
            yield Outcome(name, fault=fault) if fault else Outcome(name, digest)

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
    """`buffers` in turn; one is given out again when every lane is done with it.

    `settle` returns when what was written into them is there.
    """

    def __init__(self, buffers: Sequence[Tensor], settle: Callable[[], None] = lambda: None) -> None:
        self.buffers, self.settle = buffers, settle
        self.loans: list[list[Future[None]]] = [[] for _ in buffers]
        self.turn = 0

    def free_buffer(self) -> Tensor:
        """The next buffer [size] uint8; waits for the slowest lane, whose carrier keeps to its deadline."""
        self.turn = (self.turn + 1) % len(self.buffers)
        wait(self.loans[self.turn])
        return self.buffers[self.turn]

    def lend(self, loans: list[Future[None]]) -> None:
        """The buffer given out last is in use until all of `loans` are done."""
        self.loans[self.turn] = loans
