"""What the servers of a run are told to do, each within a limit, and what one that does not do it has failed at."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import httpx

from nemo_dapo.config import RolloutConfig
from nemo_dapo.rollout import control
from nemo_dapo.rollout.attached import AttachedServers
from nemo_dapo.rollout.member import Member
from nemo_dapo.rollout.nodes import ServingNodes
from nemo_dapo.rollout.pulse import death

T = TypeVar("T")
PULSE_SECONDS = 1.0  # between two looks at whether a server that is to do something can still do it

ServerCall = Callable[[httpx.AsyncClient, float], Awaitable[T]]


class Limit(NamedTuple):
    """For how many seconds a server may be busy with what it is told, and the option that says so."""

    option: str
    seconds: float


class Calls:
    """Calls to servers by their index; what comes in a `ServerCall` gets a client of the server and a deadline."""

    def __init__(self, config: RolloutConfig, servers: ServingNodes | AttachedServers) -> None:
        self._config, self._servers = config, servers

    @property
    def for_weights(self) -> Limit:
        return Limit("rollout.sync_timeout", self._config.sync_timeout)

    @property
    def for_a_word(self) -> Limit:
        """Of what is asked before weights travel: one that stands still is not to hold the step up for as long as they."""
        progress = Limit("rollout.progress_timeout", self._config.progress_timeout)
        return min(progress, self.for_weights, key=lambda limit: limit.seconds)

    async def fault(self, member: Member, purpose: str, action: ServerCall[None], limit: Limit) -> str | None:
        """Run `action` on a server; None when it went well, else what went wrong, server and log named."""
        if member.given_up:
            return None
        if not self._servers.alive(member.index):
            return self._servers.describe_exit(member.index)
        try:
            await self.call(member.index, action, limit)
            return None
        except TimeoutError as late:
            problem = f"it did not {purpose} within {limit.option}={limit.seconds:.0f} s ({late})"
        except (ConnectionError, RuntimeError) as error:
            problem = f"it was to {purpose}: {type(error).__name__}: {error}"
        return f"{self._servers.describe(member.index)}: {problem}"

    async def call(self, index: int, action: ServerCall[T], limit: Limit) -> T:
        """Run `action` on a server within `limit`; raises ServerDiedError once it cannot answer any more.

        A call that waits for an engine process which is gone would wait for ever: vLLM's /pause does.
        """
        deadline = time.monotonic() + limit.seconds
        try:
            async with control.client(self._servers.servers[index].url, self._servers.headers) as http:
                return await control.unless(death(self._servers, index, PULSE_SECONDS), action(http, deadline))
        except httpx.TransportError as broken:  # no OSError, as whoever restarts servers expects
            raise control.ServerDiedError(f"{type(broken).__name__}: {broken}") from broken
