"""The servers as a trainer's rank reaches them that puts weights straight into their devices."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from nemo_dapo.rollout.weights.pack import Piece
from nemo_dapo.rollout.weights.plan import Target
from nemo_dapo.telemetry.escape import printable

GRACE_SECONDS = 5.0  # for an answer after the deadline of what it is an answer to


@dataclass(frozen=True)
class Asked:
    """One route of several servers, called at once, and what comes of each, within `seconds` from the start."""

    route: str
    seconds: float
    deadline: float  # of time.monotonic()
    answers: Mapping[str, Future[None]]  # by server

    def faults(self) -> dict[str, str]:
        """By server, why its call did not succeed; waits for the calls, not for longer than the deadline and a grace."""
        wait(self.answers.values(), timeout=max(0.0, self.deadline + GRACE_SECONDS - time.monotonic()))
        found: dict[str, str] = {}
        for name, answer in self.answers.items():
            if not answer.done():
                found[name] = f"{self.route} did not answer within {self.seconds:.0f} s"
            elif problem := answer.exception():
                found[name] = f"{type(problem).__name__}: {problem}"
        return found


class ServerCalls:
    """Calls of the weight routes of several servers at once, each with its own body."""

    def __init__(self, key: str, servers: int) -> None:
        self.key = key
        self._pool = ThreadPoolExecutor(servers, thread_name_prefix="weights to servers")

    def begin(self, targets: Sequence[Target], route: str, bodies: Sequence[Any], seconds: float) -> Asked:
        """Start them all."""
        deadline = time.monotonic() + seconds
        answers = {
            target.name: self._pool.submit(self._post, target, route, body, deadline)
            for target, body in zip(targets, bodies, strict=True)
        }
        return Asked(route, seconds, deadline, answers)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _post(self, target: Target, route: str, body: Any, deadline: float) -> None:
        """Raises RuntimeError, with its words, where the server refuses, and what http.client raises where it is gone."""
        address = urlsplit(target.url)
        patience = max(0.001, deadline + GRACE_SECONDS - time.monotonic())
        connection = HTTPConnection(address.hostname or "", address.port, timeout=patience)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            connection.request("POST", route, json.dumps(body), headers)
            response = connection.getresponse()
            said = response.read(1000).decode(errors="replace")
            if response.status != 200:
                raise RuntimeError(f"{route} answers HTTP {response.status} {printable(said, 500)}")
        except TimeoutError as late:  # a socket's own words would not say what it waited for
            raise TimeoutError(f"{route} did not answer within {patience:.0f} s") from late
        except HTTPException as problem:
            raise ConnectionError(f"{route}: {type(problem).__name__}: {problem}") from problem
        finally:
            connection.close()


def piece_info(version: int, piece: Piece, seconds: float) -> dict[str, Any]:
    """What a worker must know of a piece, beside where its bytes are; `seconds` is how long it may wait for them."""
    return {
        "version": version,
        "offset": piece.offset,
        "nbytes": len(piece.data),
        "entries": [astuple(entry) for entry in piece.entries],
        "seconds": seconds,
    }
