"""A reward service over HTTP: one request a group, retried within a deadline.

    POST <address>   {"uid", "problem", "ground_truth", "source", "metadata", "responses": [text, …]}
    200              {"verdicts": [{"correct": bool, "score": number?, "extracted": text?, "error": text?}, …]}, in order

Connection failures and the statuses 408, 429 and 5xx are retried with growing pauses; another status is final.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from nemo_dapo.types import Prompt, Verdict

_RETRIED = (408, 429)
_MARGIN = 0.9  # of the time limit: the error is reported here, before the pool kills the worker
_FIRST_PAUSE = 0.2  # seconds, doubled after each attempt
_MAX_BODY = 16 << 20


class RemoteReward:
    """Callable (prompt, responses) -> verdicts that asks the service at `address`; `timeout` seconds for all attempts."""

    def __init__(self, address: str, *, timeout: float) -> None:
        self.address = address
        self.timeout = timeout

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        """One Verdict a response, each with `error` when the service could not be used in time."""
        try:
            return _read(self._ask(_request(prompt, responses)), len(responses))
        except (OSError, ValueError) as error:
            failure = Verdict(correct=False, error=f"remote: {self.address}: {type(error).__name__}: {error}")
            return [failure] * len(responses)

    def _ask(self, body: bytes) -> Any:
        deadline = time.monotonic() + _MARGIN * self.timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._post(body, deadline - time.monotonic())
            except OSError as error:
                final = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in _RETRIED
                if final or time.monotonic() + pause >= deadline:
                    raise
            time.sleep(pause)
            pause *= 2

    def _post(self, body: bytes, timeout: float) -> Any:
        request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=max(timeout, 0.01)) as reply:
            return json.loads(reply.read(_MAX_BODY))


def _request(prompt: Prompt, responses: Sequence[str]) -> bytes:
    names = ("uid", "problem", "ground_truth", "source", "metadata")
    body = {name: getattr(prompt, name) for name in names} | {"responses": list(responses)}
    return json.dumps(body, default=str).encode()


def _read(reply: Any, expected: int) -> list[Verdict]:
    found = reply.get("verdicts") if isinstance(reply, dict) else None
    if not isinstance(found, list) or len(found) != expected:
        raise ValueError(f"expected {{'verdicts': [{expected} objects]}}, got {str(reply)[:200]}")
    return [_verdict(item) for item in found]


def _verdict(item: Any) -> Verdict:
    if not isinstance(item, dict) or not isinstance(item.get("correct"), bool):
        raise ValueError(f"expected an object with a bool `correct`, got {str(item)[:200]}")
    score = item.get("score")
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < float("inf")
    ):
        raise ValueError(f"expected a finite number as `score`, got {score!r:.100}")
    extracted, error = (None if item.get(name) is None else str(item[name]) for name in ("extracted", "error"))
    return Verdict(item["correct"], extracted, error, None if score is None else float(score))
