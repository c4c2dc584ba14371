"""A reward service over HTTP: one request a group, retried within a deadline.

    POST <address>   {"uid", "problem", "ground_truth", "source", "metadata", "responses": [text, …]}
    200              {"verdicts": [{"correct": bool, "score": number?, "extracted": text?, "error": text?}, …]}, in order

Broken connections, replies cut off half-way and the statuses 408, 429 and 5xx are retried with growing pauses; another
status is final, a redirect too. A service on this machine is asked directly, whatever proxy the environment names.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Sequence
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx

from nemo_dapo.rewards.verdict import make_verdict
from nemo_dapo.tasks import within
from nemo_dapo.telemetry.escape import printable
from nemo_dapo.types import Prompt, Verdict

_RETRIED = (408, 429)
_MARGIN = 0.9  # of the time limit: the error is reported here, before the pool kills the worker
_FIRST_PAUSE = 0.2  # seconds, doubled after each attempt
_MAX_BODY = 16 << 20
_SHOWN = 200  # characters of a refused reply
_FIELDS = ("correct", "extracted", "error", "score")


class _TransientError(Exception):
    """What may pass when asked again."""


class RemoteReward:
    """Callable (prompt, responses) -> verdicts that asks the service at `address`; `timeout` seconds for all attempts.

    Raises ValueError for an address, or a proxy of the environment, that cannot be used.
    """

    def __init__(self, address: str, *, timeout: float) -> None:
        self.timeout = timeout
        self._url = _checked(address)
        self.address = str(self._url.copy_with(userinfo=b""))  # for messages: without a password
        self._via = "" if _is_loopback(self._url.host) else _proxy(self._url)
        try:
            self._client()
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise ValueError(f"reward service {address!r} cannot be asked{self._via}: {error}; mend that") from error

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        """One Verdict a response, each with `error` when the service could not be used in time."""
        try:
            return _read(asyncio.run(self._ask(_request(prompt, responses))), len(responses))
        except (OSError, ValueError, httpx.HTTPError, _TransientError, RecursionError) as error:
            kind = "" if isinstance(error, _TransientError) else f"{type(error).__name__}: "
            text = f"remote: {self.address}{self._via}: {kind}{printable(str(error), 2 * _SHOWN)}"
            return [Verdict(correct=False, error=text)] * len(responses)

    def _client(self) -> httpx.AsyncClient:
        # Each wait within an attempt is bounded by the deadline around all of them.
        return httpx.AsyncClient(timeout=None, trust_env=not _is_loopback(self._url.host), follow_redirects=False)

    async def _ask(self, body: bytes) -> Any:
        failures: list[Exception] = []
        try:
            return await within(_MARGIN * self.timeout, self._insist(body, failures))
        except asyncio.TimeoutError:
            raise (failures or [_TransientError(f"no answer within {_MARGIN * self.timeout:g} s")])[-1] from None

    async def _insist(self, body: bytes, failures: list[Exception]) -> Any:
        pause = _FIRST_PAUSE
        async with self._client() as client:
            while True:
                try:
                    return await self._post(client, body)
                except (httpx.TransportError, _TransientError) as error:
                    failures.append(error)
                await asyncio.sleep(pause)
                pause *= 2

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        async with client.stream("POST", self._url, content=body, headers=headers) as reply:
            text = bytearray()
            async for piece in reply.aiter_bytes():
                text += piece
                if len(text) > _MAX_BODY:
                    raise ValueError(f"the reply is larger than {_MAX_BODY >> 20} MiB")
        _check_status(reply, bytes(text))
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            # Only the connection's end marked the reply's: it may have been cut off.
            unframed = not reply.headers.keys() & {"content-length", "transfer-encoding"}
            raise _TransientError(f"the reply ends half-way: {error}") if unframed else error from None


def _checked(address: str) -> httpx.URL:
    expected = "expected http(s)://host[:port][/path] without spaces"
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ValueError(f"reward service {address!r}: {error}; {expected}") from error
    if not url.host or any(c.isspace() for c in address) or not 0 < (url.port or 80) < 1 << 16:
        raise ValueError(f"reward service {address!r} is no address; {expected}")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _proxy(url: httpx.URL) -> str:
    """` through the proxy at …` where the environment asks for one: an error without it sends the reader astray."""
    proxies = getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.host):
        return ""
    return f" (through the proxy {address.rpartition('@')[2]} of the environment)"  # without its password


def _check_status(reply: httpx.Response, body: bytes) -> None:
    """Raises what a reply other than 200 means, with the first words of its body."""
    if reply.is_redirect:
        raise ValueError(
            f"HTTP {reply.status_code} redirects to {reply.headers['location']!r}; name the service's own address, because "
            "a redirected POST may lose its body"
        )
    if reply.status_code == 200:
        return
    text = f"HTTP {reply.status_code} {reply.reason_phrase}: {body[:_SHOWN].decode(errors='replace')}"
    if reply.status_code in _RETRIED or reply.is_server_error:
        raise _TransientError(text)
    raise ValueError(text)


def _request(prompt: Prompt, responses: Sequence[str]) -> bytes:
    names = ("uid", "problem", "ground_truth", "source", "metadata")
    body = {name: getattr(prompt, name) for name in names} | {"responses": list(responses)}
    return json.dumps(body, default=str).encode()


def _read(reply: Any, expected: int) -> list[Verdict]:
    found = reply.get("verdicts") if isinstance(reply, dict) else None
    if not isinstance(found, list) or len(found) != expected:
        raise ValueError(f"expected {{'verdicts': [{expected} objects]}}, got {str(reply)[:_SHOWN]}")
    return [_verdict(item) for item in found]


def _verdict(item: Any) -> Verdict:
    if not isinstance(item, dict) or "correct" not in item:
        raise ValueError(f"expected an object with a bool `correct`, got {str(item)[:_SHOWN]}")
    return make_verdict(**{name: item.get(name) for name in _FIELDS})
