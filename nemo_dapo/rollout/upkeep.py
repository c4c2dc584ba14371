"""The servers of a run kept serving the newest weights: agreed with, watched, updated, put to sleep, started anew.

    update   the ranks send -> one server a node looks at what came -> every server pauses -> the version that answers
             are checked against -> load, resume

With `rollout.transport=device` servers pause before the ranks send, since they are sent into the weights that they serve.
No node keeps a copy: a server that is started anew has none until the next update, or, where no other has them, until the
ranks have sent this one again.

An answer's tokens are of the weights that the server names for them, and must not be older than the newest when the request
was sent. So nothing may generate under the old ones once a request can expect the new.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import httpx

from nemo_dapo.config import InflightCache, RolloutConfig
from nemo_dapo.rollout import client, control, fresh
from nemo_dapo.rollout.admission import Reading
from nemo_dapo.rollout.attached import AttachedServers
from nemo_dapo.rollout.calls import Calls
from nemo_dapo.rollout.fleet import Fleet, HopelessError, SickError
from nemo_dapo.rollout.fresh import INITIAL_VERSION
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.member import Life, Member
from nemo_dapo.rollout.nodes import ServingNodes
from nemo_dapo.rollout.servers import ServersClosedError
from nemo_dapo.rollout.weights import push
from nemo_dapo.rollout.weights.ledger import Ledger, NoWeightsError
from nemo_dapo.rollout.weights.plan import Seat, Sent, Target, UpdatePlan, seated
from nemo_dapo.rollout.weights.push import Held
from nemo_dapo.tasks import all_or_none

log = logging.getLogger(__name__)

T = TypeVar("T")
AWAY_SECONDS = 0.25  # between two looks at whether the node of a server that is worked on is still there
NO_COPY = (
    ", which no other server brings about (start the same command again: it goes on from the last checkpoint; "
    "rollout.transport=host keeps a copy, and of two servers one would have gone on)"
)
STARTING, ASLEEP, UPDATE = "start", "sleep", "weight update"  # why servers may be silent or gone for a while
WEIGHTS, CACHE = "weights", "kv_cache"  # what a server can wake by itself, as vLLM names it


class Hold(NamedTuple):
    """A server that generates nothing for an update, in which of its lives, and what it has failed at."""

    member: Member
    life: Life
    fault: str | None


class Upkeep:
    """`fleet` is who serves, `asked[index]` how a server is asked, `version` that of the newest weights.

    What is a coroutine runs in `loop`, the rest blocks in other threads. While `paused` holds something, servers generate
    nothing by our own doing.
    """

    def __init__(
        self,
        config: RolloutConfig,
        servers: ServingNodes | AttachedServers,
        ledger: Ledger,
        loop: LoopThread,
        target: Callable[[int], Target] | None = None,
    ) -> None:
        """`ledger` says what each node holds for its servers. `target` describes a server into whose devices ranks send;
        None where they send to nodes."""
        self.config, self.servers, self.ledger, self.target = config, servers, ledger, target
        self.describe = servers.describe
        self.version = INITIAL_VERSION
        self.restarts = 0
        self.pause_seconds = 0.0  # of all updates so far: servers generated nothing
        self.must_repeat = False  # the last update: no server has it, and one that was started anew can take it
        # Of requests in flight, over an update. Without any there is nothing to keep.
        self.keeps_cache = config.max_staleness > 0 and config.inflight_cache is InflightCache.keep
        self._calls = Calls(config, servers)
        self.asked = [client.Server(server.url) for server in servers.servers]
        self.paused: list[str] = []
        self.asleep: set[str] = set()  # what the servers have given up
        self._has_newest = [True] * len(servers)  # False while a restarted server has yet to be given the weights
        self._unwell: dict[int, tuple[Life, str]] = {}  # what failed at sleeping or waking, to be restarted
        self._holds: list[Hold] = []  # of the update under way
        self._held_at = 0.0
        self._loop = loop
        self.fleet = self._run(self._open())

    async def _open(self) -> Fleet:
        fleet = Fleet(
            len(self.servers),
            self.config.max_concurrent_sequences,
            self.servers,
            self._restart,
            cache_target=self.config.kv_cache_target,
            least=self.config.min_servers,
            patience=self.config.start_timeout,
        )
        self._watch = asyncio.ensure_future(fleet.watch(self.look, self.config.progress_timeout, self.paused))
        return fleet

    @contextlib.contextmanager
    def quiet(self, reason: str) -> Iterator[None]:
        """Nothing is held against a silent server meanwhile."""
        self.paused.append(reason)
        try:
            yield
        finally:
            self.paused.remove(reason)

    def prepare_all(self) -> None:
        """Agree with every fresh server on routes and versions."""
        with ThreadPoolExecutor(max_workers=len(self.servers)) as pool:
            for done in [pool.submit(self.prepare, index) for index in range(len(self.servers))]:
                done.result()

    # ---------------------------------------------------------------- weights

    def begin_update(self, version: int, seats: Sequence[Seat]) -> UpdatePlan:
        """As `VLLMEngine.begin_update`; servers go on generating meanwhile, but for those whose devices are sent to."""
        self.paused.append(UPDATE)
        hosts, seconds = [seat.host for seat in seats], self.config.sync_timeout
        if self.target is None:
            return self.ledger.begin(version, hosts, seconds)
        self._hold_all([m for m in self.fleet.members if not (m.is_down or m.given_up)], push.begin)
        targets = [self.target(held.member.index) for held in self._holds if not held.fault]
        return self.ledger.begin(version, hosts, seconds, seated(targets, seats), self.servers.api_key)

    def finish_update(self, everyone: Sequence[Sent]) -> None:
        """As `VLLMEngine.finish_update`."""
        try:
            with self.ledger.finish(everyone, self._damage) as version:
                if self.target is None:
                    # A restart that is under way waits for the ledger and ends with these weights: nobody waits for it.
                    members = [m for m in self.fleet.members if not m.is_down or self._comes_back(m.index)]
                    self._hold_all(members, push.pause)
                self.version = version
            self._run(all_or_none([self._update(*held) for held in self._holds]))
            if not self.asleep:
                self._run(self._see_who_has_it())
            self.pause_seconds += time.monotonic() - self._held_at
        finally:
            self.paused.remove(UPDATE)

    async def _see_who_has_it(self) -> None:
        """Set `must_repeat`, where nobody has the update once those are there that are being started anew.

        Raises SickError where too few servers are left, RuntimeError where none is there to take it.
        """
        if self.target is None:
            return
        fleet = self.fleet
        await asyncio.sleep(0)  # restarts that were left to themselves have begun
        if not any(fleet.can_serve(one) and not one.is_down for one in fleet.members):
            await all_or_none([self._while_there(one, fleet.settled(one)) for one in fleet.members])
        if fleet.too_few.done():
            raise SickError(fleet.too_few.result())
        there = [one for one in fleet.members if not (one.is_down or one.given_up)]
        if not there:
            raise self.ledger.nobody()
        self.must_repeat = all(one.is_stale for one in there)
        if self.must_repeat:
            log.warning("no server has weights %d; they are sent again to those that were started anew", self.version)

    def _damage(self, held: Mapping[str, Held]) -> dict[str, str]:
        """By node, what is wrong with the weights that it holds; servers generate meanwhile."""
        if self.target is not None:  # devices are looked at by their server, before it goes on
            return {}
        found = self._run(all_or_none([self._look_at(node, its) for node, its in held.items()]))
        return {node: wrong for node, wrong in zip(held, found, strict=True) if wrong}

    async def _look_at(self, node: str, held: Held) -> str:
        """What a server of the node finds wrong with its weights; '' where they are right, or none is there to look."""
        there = (m for m in self.fleet.members if self.node_of(m.index) == node and self.servers.alive(m.index))
        well = (m for m in there if not (m.is_down or m.given_up or m.index in self._unwell))
        if (member := next(well, None)) is None:
            return ""
        life, found = member.life, ""

        async def look(http: httpx.AsyncClient, deadline: float) -> None:
            nonlocal found
            found = await push.damage(http, held, deadline)

        if fault := await self._calls.fault(member, "look at the weights", look, self._calls.for_a_word):
            self._unwell[member.index] = life, fault
        return found

    def _hold_all(self, members: Sequence[Member], action: Callable[..., Awaitable[None]]) -> None:
        """Let these servers generate nothing more."""
        self._held_at = time.monotonic()
        self._holds = self._run(all_or_none([self._hold(member, action) for member in members]))

    async def _hold(self, member: Member, action: Callable[..., Awaitable[None]]) -> Hold:
        """By `push.pause`, or what begins with it; also what the server failed at when it fell asleep or woke up."""
        life, fault = self._unwell.pop(member.index, (None, None))
        if life is member.life:
            return Hold(member, member.life, fault)
        pause = functools.partial(action, keeps_cache=self.keeps_cache)
        return Hold(member, member.life, await self._calls.fault(member, "pause", pause, self._calls.for_a_word))

    async def _update(self, member: Member, life: Life, fault: str | None) -> None:
        if member.is_down and not self._has_newest[member.index] and self._others_serve(member):
            return  # it died meanwhile; its restart waits for the ledger and ends with these weights
        await self._while_there(member, self.fleet.settled(member))  # a restart may have ended with the weights before
        now = member.life
        if now is not life:
            fault = None  # of a life that is over
        elif self.target is not None:
            fault = fault or self.ledger.fault(self.target(member.index).name)
        if not (fault or self._has_newest_at_hand(member, life)):
            # Its node got nothing, as the log says. It stays paused; the next update brings it back.
            self.fleet.outdate(member, f"{self.describe(member.index)} did not get weights {self.version}")
            return
        take = functools.partial(self._take, member)
        fault = fault or await self._calls.fault(member, "take the weights", take, self._calls.for_weights)
        if fault and self.asleep:  # a fresh server takes its whole share of a device where the trainer still is
            log.error("%s; it is restarted when the others wake up", fault)
            self._unwell[member.index] = now, fault
        elif fault:
            await self._repair(member, now, fault)

    async def _repair(self, member: Member, life: Life, fault: str) -> None:
        """Have a server restarted; that takes minutes, so it is waited for only where nobody else serves meanwhile."""
        repair = self.fleet.attend(member, life, fault, is_fatal=True)
        if self._others_serve(member):
            self.fleet.leave_to_itself(member, asyncio.ensure_future(repair))
        else:
            await self._while_there(member, repair)

    def _others_serve(self, member: Member) -> bool:
        return any(self.fleet.can_serve(one) and not one.is_down for one in self.fleet.members if one is not member)

    def _has_newest_at_hand(self, member: Member, life: Life) -> bool:
        """Whether its node has the newest weights, or its devices, which a new life does not know of."""
        if self.target is None:
            return self.ledger.holds(self.node_of(member.index))
        return member.life is life and self.ledger.arrived(self.target(member.index).name) is not None

    def node_of(self, index: int) -> str:
        return self.servers.servers[index].node

    def _comes_back(self, index: int) -> bool:
        """Whether a server that is being restarted is about to serve with the weights of before."""
        return self._has_newest[index] and not self.servers.is_away(index)

    async def _while_there(self, member: Member, work: Coroutine[Any, Any, None]) -> None:
        """Wait for what is done about a server, unless that waits for a node: then it goes on by itself."""
        task = asyncio.ensure_future(work)
        while not task.done() and not self.servers.is_away(member.index):
            await asyncio.wait({task}, timeout=AWAY_SECONDS)
        if task.done():
            task.result()
        else:
            self.fleet.leave_to_itself(member, task)

    async def _take(self, member: Member, http: httpx.AsyncClient, deadline: float) -> None:
        # Without its cache a server cannot go on.
        options = {"resume": not self.asleep, "keeps_cache": self.keeps_cache}
        if self.target is not None:
            held = self.ledger.arrived(self.target(member.index).name)
            assert held is not None  # else it is stale
            await push.conclude(http, held, deadline, **options)
        else:
            with self.ledger.loading(self.node_of(member.index)) as held:
                assert held is not None  # after an update
                await push.push_weights(http, held, deadline, **options)
        self.fleet.renew(member, held.version)

    # ---------------------------------------------------------------- sleep

    def sleep(self) -> None:
        """As `VLLMEngine.sleep`, where the servers are awake."""
        self.paused.append(ASLEEP)
        self._everywhere("/sleep", {"level": "2"})
        for index in self._unwell:  # it would keep the device from the trainer
            self.servers.end(index)
        self.asleep = {WEIGHTS, CACHE}

    def wake_weights(self) -> None:
        """As `VLLMEngine.wake_weights`."""
        if WEIGHTS in self.asleep:
            self._everywhere("/wake_up", {"tags": WEIGHTS})
            self.asleep.remove(WEIGHTS)

    def wake_up(self) -> None:
        """As `VLLMEngine.wake_up`."""
        if not self.asleep:
            return
        assert WEIGHTS not in self.asleep, "wake_weights and update come before"
        self._everywhere("/wake_up", {"tags": CACHE})
        self._everywhere("/resume", {})
        self.asleep = set()
        unwell, self._unwell = self._unwell, {}
        faults = [(self.fleet.members[index], *what) for index, what in unwell.items()]
        self._run(all_or_none([self._repair(*what) for what in faults]))
        self._run(self._see_who_has_it())
        self.paused[:] = [reason for reason in self.paused if reason != ASLEEP]

    def _everywhere(self, route: str, params: dict[str, str]) -> None:
        """One call of a control route on each; a server that fails at it is restarted when the servers wake up."""

        async def ask(http: httpx.AsyncClient, deadline: float) -> None:
            await control.call(http, "POST", route, deadline, params=params)

        async def each(member: Member) -> None:
            await self._while_there(member, self.fleet.settled(member))  # a restart under way would bring it up awake
            life = member.life
            if member.index in self._unwell:
                return
            if fault := await self._calls.fault(member, f"answer {route}", ask, self._calls.for_weights):
                log.error("%s; it is restarted when the servers wake up", fault)
                self._unwell[member.index] = life, fault

        with self.quiet(route):
            self._run(all_or_none([each(member) for member in self.fleet.members]))

    # ---------------------------------------------------------------- restarts

    def _restart(self, index: int, fault: str) -> None:
        """Start a server anew with the newest weights; where its node lost them, it waits for the next.

        Raises HopelessError where no other server could serve until then.
        """
        self._has_newest[index] = False
        self._require_hope(index, fault)
        self.restarts += 1
        try:
            self.servers.restart(index)
        except ServersClosedError as closed:
            raise HopelessError(str(closed)) from closed
        member = self.fleet.members[index]
        try:
            with self.ledger.loading(self.node_of(index)) as held:  # an update may have come meanwhile
                self.prepare(index, held)
                member.is_stale, self._has_newest[index] = False, True  # before the next update can begin
        except NoWeightsError as none:
            self._require_hope(index, fault)
            self.prepare(index)
            member.is_stale = True
            self._has_newest[index] = True
            log.warning("%s serves again after the next weight update: %s", self.describe(index), none)

    def _require_hope(self, index: int, fault: str) -> None:
        """Raise HopelessError where a server would have no weights, and nobody else would bring the next update about.

        What goes to devices is sent again while servers do nothing else: see `must_repeat`.
        """
        try:
            with self.ledger.loading(self.node_of(index)):
                return
        except NoWeightsError as none:
            is_sent_again = self.target is not None and (self.must_repeat or bool(self.paused))
            if not is_sent_again and not any(
                self.fleet.can_serve(other) for other in self.fleet.members if other.index != index
            ):
                remedy = NO_COPY if self.target is not None else ""
                raise HopelessError(f"{none}{remedy}; {fault}") from none

    def prepare(self, index: int, held: Held | None = None) -> None:
        """What a fresh server needs once: the transfer engine, its version, and the weights that its node holds."""
        agree, purpose = functools.partial(fresh.agree, held), "take what a fresh server needs"
        server, reading = asyncio.run(self._calls.call(index, purpose, agree, self._calls.for_weights))
        if not server.has_frames:
            log.warning(
                "vLLM server %d does not have our plugin's route: its answers come as JSON, 140 bytes a token instead of "
                "8; install this package into the environment of rollout.python",
                index,
            )
        self.asked[index] = server
        self.fleet.members[index].version = held.version if held else INITIAL_VERSION
        self.fleet.members[index].admission.begin(reading)

    async def look(self, index: int) -> Reading | None:
        """What the server's /metrics say; None where it does not answer."""
        async with control.client(self.asked[index].url) as http:
            return await fresh.read_metrics(http)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.submit(work).result()
