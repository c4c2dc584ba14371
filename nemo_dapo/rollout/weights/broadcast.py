"""Carrier to the devices of many servers at once, by NCCL broadcasts from one trainer rank.

Every server is told of a piece by HTTP, and all of their workers receive it in one broadcast. A worker that hangs holds all
up: at the piece's deadline each end aborts by itself. Who did not answer is left out, the others form a group anew and
receive the piece again; a worker that has it already passes it over. The group stays for the next update, while all of its
servers live.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence

from nemo_dapo.rollout.weights.deadline import Deadline
from nemo_dapo.rollout.weights.nccl import NCCL, Communicator, first_ranks, require_same_version
from nemo_dapo.rollout.weights.pack import Piece
from nemo_dapo.rollout.weights.plan import Target, named
from nemo_dapo.rollout.weights.servers import ServerCalls, piece_info
from nemo_dapo.rollout.weights.table import Table

log = logging.getLogger(__name__)

PIECE_SECONDS = 30.0  # for one piece to get everywhere
JOIN_SECONDS = 60.0  # for a group to form

MakeCommunicator = Callable[[NCCL, bytes, int, int, float], Communicator]


class BroadcastCarrier:
    """To `targets`, of which those that fail are named in `dropped`; raises ConnectionError once none is left.

    That all of it came is asked by rank 0, which ends the update at each server (`push.py`).
    """

    def __init__(
        self,
        targets: Sequence[Target],
        calls: ServerCalls,
        nccl: NCCL,
        communicator: MakeCommunicator = Communicator,
    ) -> None:
        """Raises ValueError where a server's NCCL is another than this process's."""
        require_same_version(nccl.version(), {target.name: target.nccl for target in targets})
        self.of, self.targets = tuple(targets), list(targets)
        self.calls, self.nccl, self.make = calls, nccl, communicator
        self.dropped: dict[str, str] = {}
        self.version, self.deadline = -1, Deadline.after(0.0)
        self._group: Communicator | None = None

    def begin(self, version: int, deadline: Deadline) -> None:
        self.version, self.deadline = version, deadline
        self._form_group()

    def carry(self, piece: Piece) -> None:
        """Broadcast a piece [n] on this rank's device, until every server that is left has it."""
        while not self._broadcast(piece):
            continue

    def commit(self, table: Table) -> None:
        """Nothing is left to carry."""

    def serves(self, targets: Sequence[Target]) -> bool:
        """Whether the group is one of exactly these, so that another update can begin with it."""
        return self._group is not None and not self.dropped and self.of == tuple(targets)

    def close(self) -> None:
        self._leave()
        self.calls.close()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _broadcast(self, piece: Piece) -> bool:
        """Whether all servers that are left have the piece; where one was lost, in a group without it.

        That it has left this rank does not say that it is there: who is behind a worker that hangs has nothing, and answers
        in time that its broadcast was broken off.
        """
        assert self._group is not None
        step = f"{named(self.targets)} had the piece of weights {self.version} at byte {piece.offset}"
        seconds = self.deadline.left(PIECE_SECONDS, step)
        info = piece_info(self.version, piece, seconds)
        bodies = [{"update_info": {"version": self.version, "piece": info}}] * len(self.targets)
        calls = self.calls.begin(self.targets, "/update_weights", bodies, seconds)
        try:
            self._group.broadcast(piece.data, calls.deadline)
        except TimeoutError as late:
            log.error("weights %d, byte %d: %s", self.version, piece.offset, late)
            self._leave()
        if faults := calls.faults():
            self._drop(faults)
        is_everywhere = self._group is not None
        self._form_group()
        return is_everywhere

    def _form_group(self) -> None:
        """A communicator of this rank and all workers of the servers that are left; who does not join is dropped."""
        while self._group is None:
            seconds = self.deadline.left(
                JOIN_SECONDS, f"{named(self.targets)} had joined the NCCL group of weights {self.version}"
            )
            unique_id, workers = self.nccl.unique_id(), [target.workers for target in self.targets]
            group = {
                "unique_id": base64.b64encode(unique_id).decode(),
                "world_size": 1 + sum(workers),
                "seconds": seconds,
            }
            bodies = [{"init_info": {"group": {**group, "first_rank": rank}}} for rank in first_ranks(workers)]
            calls = self.calls.begin(self.targets, "/init_weight_transfer_engine", bodies, seconds)
            try:
                self._group = self.make(self.nccl, unique_id, 1 + sum(workers), 0, calls.deadline)
            except TimeoutError as late:
                log.error("weights %d: %s", self.version, late)
            if faults := calls.faults():
                self._drop(faults)

    def _drop(self, faults: dict[str, str]) -> None:
        """Go on without them, in a group that is yet to be formed."""
        self._leave()
        self.dropped |= faults
        self.targets = [target for target in self.targets if target.name not in faults]
        for name, fault in faults.items():
            log.error("weights %d no longer go to %s: %s", self.version, name, fault)
        if not self.targets:
            raise ConnectionError(f"no server is left to send weights to: {self.dropped}")
