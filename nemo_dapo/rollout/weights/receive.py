"""The receiver of a serving node without a trainer's rank: takes weights over HTTP and puts them into the node's folder.

    PUT /weights/<version>/<offset>   a piece of the run of bytes: the next one
    PUT /weights/<version>/table      the last word

A sender that begins anew takes the place of the one before. Whoever does not have the token is answered 401 and nothing
else. Runs in the node's agent, in threads of its own; torch is not needed.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dapo.rollout.weights.checksum import checksum
from nemo_dapo.rollout.weights.store import WeightWriter
from nemo_dapo.rollout.weights.table import parse

log = logging.getLogger(__name__)

CHECKSUM_HEADER = "X-Checksum"
SILENCE_SECONDS = 60.0  # of a sender in the middle of a request, or before its next one
MAX_BODY_BYTES = 1 << 30


class RefusedError(Exception):
    """What a sender is told."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Receiver(ThreadingHTTPServer):
    """Listens from the moment it is made, on `port` or a free one; `close` it."""

    daemon_threads = True
    block_on_close = False  # a thread that waits for a stopped sender must not hold up the node's end

    def __init__(self, folder: Path, token: str, host: str, port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.token = token
        self.writer = WeightWriter(folder)
        self.receiving = threading.Lock()  # held for each piece
        self.sender: Handler | None = None
        self.version, self.end = -1, 0  # of what has come
        threading.Thread(target=self.serve_forever, name="weight receiver", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.writer.close()

    def take_piece(self, handler: Handler, version: int, offset: int, length: int, expected: int) -> None:
        """Receive `length` bytes for `offset`; raises RefusedError unless they are the next ones, as they were sent."""
        if offset == 0 and self.sender not in (None, handler):
            self.sender.hang_up()
        with self.receiving:
            if offset == 0:
                self.sender, self.version, self.end = handler, version, 0
                self.writer.begin()
            self._require_turn(handler, version)
            if offset != self.end:
                raise RefusedError(HTTPStatus.CONFLICT, f"a piece for byte {offset} came, expected was byte {self.end}")
            view = self.writer.room(offset, length)
            if handler.rfile.readinto(view) != length:
                raise ConnectionError("the sender broke off")
            handler.unread = 0
            if checksum(np.frombuffer(view, np.uint8)) != expected:
                raise RefusedError(
                    HTTPStatus.UNPROCESSABLE_ENTITY, f"bytes {offset} to {offset + length} changed on the way"
                )
            self.end += length

    def take_table(self, handler: Handler, version: int, text: str) -> None:
        """The version is whole with this; raises RefusedError where its table says otherwise."""
        with self.receiving:
            self._require_turn(handler, version)
            try:
                table = parse(text)
            except ValueError as problem:
                raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(problem)) from problem
            if (table.version, table.nbytes) != (version, self.end):
                announced = f"the table is of version {table.version} with {table.nbytes} bytes"
                raise RefusedError(HTTPStatus.CONFLICT, f"{announced}, {self.end} bytes of version {version} came")
            self.writer.commit(table)
            self.version = -1

    def _require_turn(self, handler: Handler, version: int) -> None:
        if self.sender is not handler or self.version != version:
            raise RefusedError(HTTPStatus.CONFLICT, f"version {version} was not begun by this sender, or ended since")

    def handle_error(self, request: Any, client_address: Any) -> None:
        said = "receiving weights from %s failed, at byte %d of version %d"
        log.warning(said, client_address, self.end, self.version, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection of one sender."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE_SECONDS
    rbufsize = 1 << 16
    server: Receiver
    unread = 0  # bytes of the request's body

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if secrets.compare_digest(
            self.headers.get("Authorization", "").encode(), f"Bearer {self.server.token}".encode()
        ):
            return True
        self.send_error(HTTPStatus.UNAUTHORIZED)
        return False

    def do_PUT(self) -> None:
        try:
            self._take()
        except RefusedError as refused:
            self._skip_body()
            self._say(refused.status, refused.why)
        except OSError as problem:  # of the disk, or of the connection, which then does not hear of it
            self._skip_body()
            self._say(HTTPStatus.INSUFFICIENT_STORAGE, str(problem))
        else:
            self._say(HTTPStatus.OK, "")

    def _take(self) -> None:
        place = re.fullmatch(r"/weights/(\d{1,18})/(\d{1,18}|table)", self.path)
        length = int(self.headers.get("Content-Length", -1))
        if place is None or not 0 <= length <= MAX_BODY_BYTES:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST, f"{self.path} with {length} bytes is nothing that is received here"
            )
        version, what, self.unread = int(place[1]), place[2], length
        if what == "table":
            text, self.unread = self.rfile.read(length).decode(), 0
            self.server.take_table(self, version, text)
        else:
            self.server.take_piece(self, version, int(what), length, int(self.headers.get(CHECKSUM_HEADER, -1)))

    def _skip_body(self) -> None:
        """Who closes a connection with something unread in it takes back what it said before."""
        while self.unread and (skipped := self.rfile.read(min(self.unread, 1 << 20))):
            self.unread -= len(skipped)

    def hang_up(self) -> None:
        """End the connection, from another thread."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended
            return

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._say(HTTPStatus(code), "")

    def _say(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = status != HTTPStatus.OK  # what is left of the request is not read
        body = why.encode()
        head = f"HTTP/1.1 {int(status)} {status.phrase}\r\nContent-Length: {len(body)}\r\n"
        head += "Connection: close\r\n\r\n" if self.close_connection else "\r\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, *_: object) -> None: ...
