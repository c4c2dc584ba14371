"""Carrier to the receiver of another node, over one HTTP connection an update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from nemo_dapo.rollout.weights.checksum import checksum
from nemo_dapo.rollout.weights.deadline import Deadline
from nemo_dapo.rollout.weights.pack import Piece
from nemo_dapo.rollout.weights.plan import Place
from nemo_dapo.rollout.weights.receive import CHECKSUM_HEADER
from nemo_dapo.rollout.weights.table import Table
from nemo_dapo.telemetry.escape import printable

STALL_SECONDS = 20.0  # in which a receiver takes nothing, or does not answer: it is stopped, or the link is down


class TCPCarrier:
    """Puts pieces to the receiver of `place`.

    Raises TimeoutError, which says at what, where it takes nothing for STALL_SECONDS or the deadline passes,
    ConnectionError where it is gone, RuntimeError, with its words, where it refuses.
    """

    def __init__(self, place: Place, token: str) -> None:
        self.place, self.token = place, token
        self.version, self.deadline, self.route = -1, Deadline.after(0.0), ""
        self.dropped: dict[str, str] = {}
        self.connection: HTTPConnection | None = None
        self.is_waited_for = (
            False  # an answer: it is read before the next request, so that pieces are checked meanwhile
        )

    def begin(self, version: int, deadline: Deadline) -> None:
        self.version, self.deadline = version, deadline
        if not self.place.address:
            raise ConnectionError(f"{self.place.folder} is not on this host, and the node has no receiver")
        self.close()  # the last update's: in the minutes since, the receiver or a firewall on the way may have ended it
        address = urlsplit(f"//{self.place.address}")
        self.connection = HTTPConnection(address.hostname or "", address.port)

    def carry(self, piece: Piece) -> None:
        data = piece.data.numpy()
        self._put(str(piece.offset), data, {CHECKSUM_HEADER: str(checksum(data))})

    def commit(self, table: Table) -> None:
        self._put("table", table.render().encode(), {})
        self._require_accepted()

    def close(self) -> None:
        self.is_waited_for = False
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _put(self, what: str, body: Any, headers: dict[str, str]) -> None:
        assert self.connection is not None
        if self.is_waited_for:
            self._require_accepted()
        view, self.route = memoryview(body), f"/weights/{self.version}/{what}"
        request = {"Authorization": f"Bearer {self.token}", "Content-Length": str(view.nbytes), **headers}
        self.connection.putrequest("PUT", self.route, skip_accept_encoding=True)
        for name, value in request.items():
            self.connection.putheader(name, value)
        with self._patience("accepted") as self.connection.timeout:
            self.connection.endheaders()
        self.is_waited_for = True
        try:
            while view:
                with self._patience("taken all of") as seconds:
                    self.connection.sock.settimeout(seconds)
                    view = view[self.connection.sock.send(view) :]
        except (BrokenPipeError, ConnectionResetError):  # it may have said why
            self._require_accepted()
            raise

    def _require_accepted(self) -> None:
        assert self.connection is not None
        self.is_waited_for = False
        with self._patience("answered to") as seconds:
            self.connection.sock.settimeout(seconds)
            with self.connection.getresponse() as response:
                said = printable(response.read(1000).decode(errors="replace"), 500)
        if response.status != 200:
            raise RuntimeError(f"{self.place.address} refused the weights: HTTP {response.status} {said}")

    @contextlib.contextmanager
    def _patience(self, done: str) -> Iterator[float]:
        """Seconds until the receiver must have `done` the present request; a socket's own words would not say what."""
        step = f"{self.place.address} had {done} PUT {self.route}"
        seconds = self.deadline.left(STALL_SECONDS, step)
        try:
            yield seconds
        except TimeoutError as late:
            raise TimeoutError(f"{seconds:.0f} s were over before {step}: it is stopped, or the link is down") from late
