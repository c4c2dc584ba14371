"""A sample whose server is lost behind a push of weights: what is asked of the next, and what a whole draft spares."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemo_dapo.config import RolloutConfig
from nemo_dapo.rollout import client
from nemo_dapo.rollout import requests as requests_module
from nemo_dapo.rollout.answers import Ending, Expected
from nemo_dapo.rollout.client import ServerUnavailableError
from nemo_dapo.rollout.fleet import Fleet
from nemo_dapo.rollout.member import Life
from nemo_dapo.rollout.requests import Requests
from nemo_dapo.types import Draft, Prompt, SamplingParams, VersionSpan
from tests.stand_in_server import StandInServers

PROMPT, PARAMS = Prompt("p", (9, 9), "", ""), SamplingParams(max_tokens=8)


def bring(on_tokens: Callable[[np.ndarray, np.ndarray], None], ids: list[int], logprobs: list[float]) -> None:
    on_tokens(np.array(ids, np.int32), np.array(logprobs, np.float32))


class OneServer:
    """Stands for upkeep and fleet; the first request brings three tokens, one behind a push, and its server is gone."""

    def __init__(self) -> None:
        self.member = SimpleNamespace(index=0, life=Life(asyncio.get_running_loop().create_future()))
        self.fleet, self.version, self.asked = self, 0, [None]
        self.paused: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    def describe(self, index: int) -> str:
        return "the server"

    async def take(self, n: int, *, is_retry: bool = False) -> Any:
        return self.member

    async def ready(self, member: Any) -> Any:
        return member.life

    async def report(self, *args: Any, **options: Any) -> None: ...

    def served(self, member: Any) -> None: ...

    def progressed(self, member: Any) -> None: ...

    def give(self, member: Any, n: int = 1) -> None: ...

    async def sample(self, http: Any, server: Any, body: bytes, expected: Expected, on_tokens: Any) -> Ending:
        self.bodies.append(json.loads(body))
        if len(self.bodies) == 1:
            bring(on_tokens, [2], [-1.0])
            bring(on_tokens, [3], [-1.5])
            self.version = 1
            bring(on_tokens, [7], [-1.5])  # under which weights it does not say
            raise ServerUnavailableError("gone")
        bring(on_tokens, [4, 1], [-0.25, -0.5])
        return Ending("stop", (VersionSpan(1, 0, 2),))


@pytest.mark.parametrize(
    ("max_staleness", "prompt", "tokens", "versions"),
    [
        (1, [9, 9, 2, 3], [2, 3, 4, 1], (VersionSpan(0, 0, 2), VersionSpan(1, 2, 4))),
        (0, [9, 9], [4, 1], (VersionSpan(1, 0, 2),)),
    ],
)
def test_tokens_of_older_weights_are_gone_on_with_where_groups_outlive_a_push_and_not_elsewhere(
    max_staleness: int, prompt: list[int], tokens: list[int], versions: tuple[VersionSpan, ...], monkeypatch: Any
) -> None:
    async def course() -> None:
        server, draft = OneServer(), Draft()
        monkeypatch.setattr(client, "sample", server.sample)
        requests = Requests(RolloutConfig(max_staleness=max_staleness), server, None, [1], 20)  # type: ignore[arg-type]
        (one,) = await requests.group(requests.asked(PROMPT, PARAMS), 1, [draft])
        assert (one.token_ids.tolist(), one.versions) == (tokens, versions)
        further = server.bodies[1]
        assert (further["token_ids"], further["sampling_params"]["max_tokens"]) == (prompt, 8 - len(prompt) + 2)
        assert requests.partial.tokens_gone_on_with == len(prompt) - 2
        assert requests.partial.tokens_thrown_away == 5 - len(prompt)
        assert draft.sample == one
        assert await requests.group(requests.asked(PROMPT, PARAMS), 1, [draft]) == [one]
        assert len(server.bodies) == 2, "a whole draft is asked for no more"

    asyncio.run(course())


def test_what_a_server_had_sent_before_it_broke_an_answer_off_is_gone_on_with(monkeypatch: Any) -> None:
    class Aborting(OneServer):
        async def sample(self, http: Any, server: Any, body: bytes, expected: Expected, on_tokens: Any) -> Ending:
            self.bodies.append(json.loads(body))
            if len(self.bodies) == 1:
                bring(on_tokens, [2, 3], [-1.0, -1.5])
                return Ending("abort", (VersionSpan(0, 0, 2),))
            bring(on_tokens, [4, 1], [-0.25, -0.5])
            return Ending("stop", (VersionSpan(0, 0, 2),))

    async def course() -> None:
        server = Aborting()
        monkeypatch.setattr(client, "sample", server.sample)
        requests = Requests(RolloutConfig(), server, None, [1], 20)  # type: ignore[arg-type]
        (one,) = await requests.group(requests.asked(PROMPT, PARAMS), 1)
        assert (one.token_ids.tolist(), one.versions) == ([2, 3, 4, 1], (VersionSpan(0, 0, 4),))
        assert server.bodies[1]["token_ids"] == [9, 9, 2, 3]
        assert requests.partial.tokens_thrown_away == 0

    asyncio.run(course())


def test_a_group_that_is_cancelled_between_its_places_and_its_first_request_gives_them_back() -> None:
    async def course() -> int:
        fleet = Fleet(1, 4, StandInServers(*"a"), lambda index, fault: None)
        upkeep = SimpleNamespace(fleet=fleet, version=0, paused=[], asked=[None], describe=str)
        requests = Requests(RolloutConfig(), upkeep, None, [1], 20)  # type: ignore[arg-type]
        member = await fleet.take(4)
        group = asyncio.create_task(requests.group(requests.asked(PROMPT, PARAMS), 4))
        while not fleet.waiters:
            await asyncio.sleep(0)
        fleet.give(member, 4)
        await asyncio.sleep(0)  # the group has its places now, and its samples have not had a turn
        assert member.load == 4
        group.cancel()
        await asyncio.wait({group})
        return member.load

    assert asyncio.run(course()) == 0


class Unsteady:
    """Groups of 1 to 4 samples on a few servers that fail, die and miss updates; half of the groups are cancelled."""

    def __init__(self, seed: int, monkeypatch: Any) -> None:
        self.random = random.Random(seed)
        self.servers = StandInServers(*"abc"[: self.random.randint(1, 3)])
        self.servers.cures = {index: lambda: None for index in range(len(self.servers))}
        size = len(self.servers)
        self.fleet = Fleet(size, self.random.choice([2, 4, 9]), self.servers, lambda i, _: self.servers.restart(i))
        upkeep = SimpleNamespace(fleet=self.fleet, version=0, paused=[], asked=[None] * size, describe=str)
        self.requests = Requests(RolloutConfig(max_staleness=1), upkeep, None, [1], 20)  # type: ignore[arg-type]
        monkeypatch.setattr(client, "sample", self.sample)

    async def sample(self, http: Any, server: Any, body: bytes, expected: Expected, on_tokens: Any) -> Ending:
        await self.turns(6)
        draw = self.random.random()
        if draw < 0.2:
            self.servers.dead |= {self.random.randrange(len(self.servers))} if draw < 0.05 else set()
            raise ServerUnavailableError("gone")
        bring(on_tokens, [4, 1], [-0.25, -0.5])
        return Ending("stop", (VersionSpan(0, 0, 2),))

    async def turns(self, most: int) -> None:
        for _ in range(self.random.randint(0, most)):
            await asyncio.sleep(0)

    def miss_or_take_an_update(self) -> None:
        """One server misses it where another serves; those that missed the one before may have this one."""
        member = self.random.choice(self.fleet.members)
        if self.random.random() < 0.1 and not member.is_down and sum(map(self.fleet.can_serve, self.fleet.members)) > 1:
            self.fleet.outdate(member, "it got no weights")
        if self.random.random() < 0.2:
            self.take_an_update()

    def take_an_update(self) -> None:
        for member in self.fleet.members:
            self.fleet.renew(member, 0)

    async def course(self) -> None:
        groups = []
        for _ in range(25):
            size = self.random.randint(1, 4)
            groups.append(asyncio.create_task(self.requests.group(self.requests.asked(PROMPT, PARAMS), size)))
            await self.turns(3)
            if self.random.random() < 0.5:
                self.random.choice(groups).cancel()
            self.miss_or_take_an_update()
        self.take_an_update()
        _, stuck = await asyncio.wait(groups, timeout=20)
        assert not stuck
        assert all(place.done() for _, place in self.fleet.waiters)
        assert [member.load for member in self.fleet.members] == [0] * len(self.servers)


@pytest.mark.parametrize("part", range(3))
def test_whatever_fails_and_is_cancelled_no_group_is_stuck_and_no_place_stays_taken(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "FIRST_BACKOFF_SECONDS", 0.0)

    async def course(seed: int) -> None:
        await Unsteady(seed, monkeypatch).course()

    for seed in range(part * 10, part * 10 + 10):
        asyncio.run(course(seed))
