"""Whether a server that was told something can still do it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

import httpx

from nemo_dapo.rollout import control

HEALTH_SECONDS = 4.0  # for a server to answer /health
MAX_REFUSED = 3  # connections in a row, by a server that served before: it has stopped listening


class Servers(Protocol):
    @property
    def servers(self) -> Sequence[Any]:
        """Each with its `url`."""
        ...

    def alive(self, index: int) -> bool: ...

    def describe_exit(self, index: int) -> str: ...


async def death(servers: Servers, index: int, pause: float) -> str:
    """Why server `index` cannot answer any more, as soon as it shows: one that is busy or far away can.

    `pause` seconds lie between two looks.
    """
    refused = 0
    while refused < MAX_REFUSED:
        await asyncio.sleep(pause)
        if not servers.alive(index):
            return servers.describe_exit(index)
        try:
            async with control.client(servers.servers[index].url) as http:  # a connection of its own
                reply = await control.ask(http, "GET", "/health", time.monotonic() + HEALTH_SECONDS)
        except httpx.ConnectError:
            refused += 1
        except (TimeoutError, httpx.HTTPError, RuntimeError):
            refused = 0
        else:
            refused = 0
            if reply.status == 503:
                return "its engine process is gone (/health answers 503)"
    return f"it refused {refused} connections in a row"
