"""Calls of a server's control routes: small answers, each within one deadline that holds for the whole call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from nemo_dapo.telemetry.escape import printable

MAX_ANSWER_BYTES = 8 << 20  # /metrics of a busy server is the largest


class ServerDiedError(ConnectionError):
    """The API server says that the process with the model is gone; it ends itself a moment later."""


T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


def client(url: str, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    """A client of one server. The scheme is http and proxy variables of the environment do not apply."""
    return httpx.AsyncClient(base_url=url, headers=dict(headers or {}), timeout=None, trust_env=False, verify=False)


async def ask(http: httpx.AsyncClient, method: str, route: str, deadline: float, **request: Any) -> Reply:
    """One request, whatever its status. `deadline` is of time.monotonic(); one that passes is a TimeoutError.

    httpx's own limits are a read each: a server that sends a byte now and then would never meet them.
    """
    remaining = deadline - time.monotonic()
    where = f"{route} of {http.base_url}"
    if remaining <= 0:
        raise TimeoutError(f"no time is left for {where}")
    asking = asyncio.ensure_future(_ask(http, method, route, request))
    try:  # not asyncio.wait_for: before Python 3.12 it forgets a cancellation that comes with the answer
        await asyncio.wait({asking}, timeout=remaining)
        if asking.done():
            return asking.result()
        raise TimeoutError(f"{where} did not answer within {remaining:.0f} s")
    finally:
        await _end(asking)


async def _ask(http: httpx.AsyncClient, method: str, route: str, request: dict[str, Any]) -> Reply:
    body = bytearray()
    try:
        async with http.stream(method, route, headers={"Accept-Encoding": "identity"}, **request) as response:
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise RuntimeError(f"{route} of {http.base_url} answers more than {MAX_ANSWER_BYTES} bytes")
            return Reply(response.status_code, bytes(body))
    except AttributeError as closed:
        # anyio (seen in 4.16) asks for the other end's address of a socket that this end has reset as soon as it was open.
        if closed.name != "getpeername":
            raise
        raise httpx.ConnectError(f"{http.base_url} closed the connection at once") from closed


async def call(
    http: httpx.AsyncClient, method: str, route: str, deadline: float, *, may_be_absent: bool = False, **request: Any
) -> Reply | None:
    """One request that must be answered with 200; None when there is no such route and `may_be_absent`.

    Raises ServerDiedError where the engine process is gone, RuntimeError for any other answer.
    """
    reply = await ask(http, method, route, deadline, **request)
    if reply.status == 404 and may_be_absent:
        return None
    if reply.status != 200:
        said = f"{route} of {http.base_url} failed: HTTP {reply.status} {printable(reply.text, 500)}"
        raise ServerDiedError(said) if reply.status >= 500 and "EngineCore" in reply.text else RuntimeError(said)
    return reply


async def unless(death: Awaitable[str], work: Awaitable[T]) -> T:
    """What `work` returns; raises ServerDiedError as soon as `death` says why it never will."""
    working, dying = asyncio.ensure_future(work), asyncio.ensure_future(death)
    try:
        await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ServerDiedError(dying.result())
    finally:
        await _end(working, dying)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
