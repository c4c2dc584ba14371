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
            await self.call(member.index, purpose, action, limit)
            return None
        except (TimeoutError, ConnectionError) as named:
            return str(named)
        except RuntimeError as error:
            return f"{self._servers.describe(member.index)}: it was to {purpose}: {type(error).__name__}: {error}"

    async def call(self, index: int, purpose: str, action: ServerCall[T], limit: Limit) -> T:
        """Run `action` on a server within `limit`; raises TimeoutError, or ServerDiedError once it cannot answer any more,
        which name the server, its log and `purpose`, beside what `action` raises.

        A call that waits for an engine process which is gone would wait for ever: vLLM's /pause does.
        """
        deadline, who = time.monotonic() + limit.seconds, self._servers.describe(index)
        try:
            async with control.client(self._servers.servers[index].url, self._servers.headers) as http:
                return await control.unless(death(self._servers, index, PULSE_SECONDS), action(http, deadline))
        except TimeoutError as late:
            within = f"within {limit.option}={limit.seconds:g} s"
            raise TimeoutError(f"{who}: it did not {purpose} {within} ({late})") from late
        except (httpx.TransportError, ConnectionError) as broken:
            # httpx's is no OSError, as who restarts servers expects.
            problem = f"{type(broken).__name__}: {broken}".rstrip(": ")
            raise control.ServerDiedError(f"{who}: it was to {purpose}: {problem}") from broken
