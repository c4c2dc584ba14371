"""The hub on rank 0: serving nodes register with it, hold their lease by their connection, and are told what to do.

It listens where `rollout.listen` says. A request without the run's token is answered 401 and nothing else. Everything here
runs in one event loop, the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import hdrs, web

from nemo_dapo.rollout.agreement import Terms, refuse_node, refuse_report, refuse_version
from nemo_dapo.rollout.messages import (
    CLOSE_SECONDS,
    HELLO_SECONDS,
    MAX_MESSAGE_BYTES,
    ROUTE,
    Call,
    Hello,
    LeaseLostError,
    Plan,
    Refusal,
    Report,
    Result,
    ServerState,
    Stop,
    Welcome,
    decode,
    heard,
    say,
    version_said,
)
from nemo_dapo.tasks import within

log = logging.getLogger(__name__)

END_SECONDS = 30.0  # for agents to end their servers, each of which has its own grace below that


class NodeLostError(ConnectionError):
    """The node that was called has lost its lease, or loses it meanwhile."""


class CallFailedError(RuntimeError):
    """The node tried what it was called for and failed; `error_class` is the name of its error's class."""

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


@dataclass
class Node:
    """One agent that is registered, until its lease is lost."""

    hello: Hello
    report: Report
    plan: Plan
    socket: web.WebSocketResponse
    servers: dict[int, ServerState] = field(default_factory=dict)
    calls: dict[int, asyncio.Future[Result]] = field(default_factory=dict)
    lost: str = ""  # why
    num_calls: int = 0

    @property
    def name(self) -> str:
        return self.hello.node

    async def call(self, action: str, index: int = -1) -> None:
        """Have the agent do `action` and wait for it; the caller sets the deadline.

        Raises CallFailedError with the agent's own words, NodeLostError when it goes away.
        """
        if self.lost:
            raise NodeLostError(f"node {self.name}: {self.lost}")
        self.num_calls += 1
        number = self.num_calls
        self.calls[number] = asyncio.get_running_loop().create_future()
        try:
            await say(self.socket, Call(number, action, index))
            result = await self.calls[number]
        finally:
            del self.calls[number]
        if result.error:
            raise CallFailedError(result.error, result.error_class)

    def hear(self, message: Result | ServerState) -> None:
        if isinstance(message, ServerState):
            self.servers[message.index] = message
        elif (call := self.calls.get(message.number)) and not call.done():
            call.set_result(message)

    def lose(self, reason: str) -> None:
        self.lost = reason
        for call in self.calls.values():
            if not call.done():
                call.set_exception(NodeLostError(f"node {self.name}: {reason}"))


class Hub:
    """Places for `slots` nodes, each taken by at most one at a time.

    `plan_for(slot, node)` says what that node serves; `names`, where not empty, are those of the only nodes there may be,
    in the order of their slots. `changed(node)` is told of every node that comes, goes or says something of a server.
    """

    def __init__(
        self,
        terms: Terms,
        slots: int,
        plan_for: Callable[[int, str], Plan],
        *,
        token: str,
        lease: float,
        names: Sequence[str] = (),
        changed: Callable[[Node], None] = lambda node: None,
    ) -> None:
        self.terms, self.plan_for, self.token, self.lease = terms, plan_for, token, lease
        self.names, self.changed = list(names), changed
        self.nodes: list[Node | None] = [None] * slots
        self.refusals: dict[str, Refusal] = {}  # the last one of each node that is not there
        self._claims: dict[str, tuple[int, int]] = {}  # slot and process of those that are there or about to be
        self._homes: dict[str, int] = {name: slot for slot, name in enumerate(names)}  # where a node was before
        self._arrival = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def open(self, host: str, port: int) -> None:
        """Listen; raises ValueError where that address is taken or not this machine's."""
        app = web.Application(middlewares=[self._require_token], client_max_size=1)
        app.router.add_get(ROUTE, self._serve)
        app.on_response_prepare.append(_say_no_more)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_SECONDS)
        await self._runner.setup()
        try:
            await web.SockSite(self._runner, listening_socket(host, port)).start()
        except OSError as problem:
            await self._runner.cleanup()
            raise ValueError(
                f"rollout.listen: {host or 'all addresses'} port {port} cannot be listened on ({problem.strerror}); "
                "name an address of rank 0's host and a free port, or leave it empty for any"
            ) from problem
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Have every agent end its servers, wait END_SECONDS at most until they have, and close."""
        for node in self.nodes:
            if node:
                await say(node.socket, Stop())
        with contextlib.suppress(asyncio.TimeoutError):
            await within(END_SECONDS, self._empty())
        if left := [node.name for node in self.nodes if node]:
            log.error(
                "agents of %s did not end within %.0f s; their servers end when they find their lease lost, after "
                "rollout.lease_seconds=%g",
                *(", ".join(left), END_SECONDS, self.lease),
            )
        if self._runner:
            await self._runner.cleanup()

    async def _empty(self) -> None:
        while any(self.nodes):
            await self._wait_for_change()

    # ---------------------------------------------------------------- nodes

    async def node_at(self, slot: int) -> Node:
        """The node in `slot`, once there is one."""
        while (node := self.nodes[slot]) is None:
            await self._wait_for_change()
        return node

    async def first_refusal(self) -> tuple[str, Refusal]:
        """(node, refusal), once a node was refused for good that is not there since."""
        while True:
            for name, refusal in self.refusals.items():
                if refusal.is_final:
                    return name, refusal
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        await self._arrival.wait()

    def _say_changed(self) -> None:
        self._arrival.set()
        self._arrival = asyncio.Event()

    # ---------------------------------------------------------------- one connection

    @web.middleware
    async def _require_token(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        said = request.headers.get(hdrs.AUTHORIZATION, "")
        if not secrets.compare_digest(said.encode(), f"Bearer {self.token}".encode()):
            return web.Response(status=401)
        return await handler(request)

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        """One agent, from its hello to the loss of its lease."""
        socket = web.WebSocketResponse(timeout=CLOSE_SECONDS, autoping=False, max_msg_size=MAX_MESSAGE_BYTES)
        await socket.prepare(request)
        async with contextlib.aclosing(heard(socket, self.lease)) as words:
            try:
                hello = await within(HELLO_SECONDS, self._greet(socket, words))
                if hello is not None:
                    await self._host(socket, words, hello)
            except (LeaseLostError, ConnectionError, asyncio.TimeoutError, ValueError) as problem:
                log.warning("an agent at %s went away before it had registered: %s", request.remote, problem)
        await socket.close()
        return socket

    async def _greet(self, socket: web.WebSocketResponse, words: AsyncGenerator[str, None]) -> Hello | None:
        """The agent's hello, None where it was refused; its slot is claimed."""
        text = await anext(words)
        if (said := version_said(text)) and (refusal := refuse_version(*said)):
            await self._refuse(socket, _name_said(text), refusal)
            return None
        hello = decode(text, Hello)
        slot = self._free_slot(hello.node)
        present = {name: pid for name, (_, pid) in self._claims.items()}
        if refusal := refuse_node(hello, present, self.names, slot is not None):
            await self._refuse(socket, hello.node, refusal)
            return None
        assert slot is not None
        self._claims[hello.node] = slot, hello.pid
        return hello

    def _free_slot(self, name: str) -> int | None:
        """Where `name` was before, else a place that nobody had, else one whose node is gone."""
        taken = {slot for slot, _ in self._claims.values()}
        if (home := self._homes.get(name)) is not None and home not in taken:
            return home
        free = [slot for slot in range(len(self.nodes)) if slot not in taken]
        return min(free, key=lambda slot: (slot in self._homes.values(), slot), default=None)

    async def _host(self, socket: web.WebSocketResponse, words: AsyncGenerator[str, None], hello: Hello) -> None:
        slot, _ = self._claims[hello.node]
        plan = self.plan_for(slot, hello.node)
        node: Node | None = None
        try:
            await say(socket, plan)
            report = decode(await anext(words), Report)
            if refusal := refuse_report(report, self.terms):
                await self._refuse(socket, hello.node, refusal)
                return
            node = self.nodes[slot] = Node(hello, report, plan, socket)
            self._homes = {name: its for name, its in self._homes.items() if its != slot} | {hello.node: slot}
            self.refusals.pop(hello.node, None)
            await say(socket, Welcome())
            self._tell(node)
            async for text in words:
                node.hear(decode(text, Result, ServerState))
                self._tell(node)
        except (LeaseLostError, ConnectionError, ValueError) as problem:
            if node is None:
                raise
            node.lose(str(problem))
        finally:
            self._leave(hello.node, slot, node)

    def _leave(self, name: str, slot: int, node: Node | None) -> None:
        del self._claims[name]
        self.nodes[slot] = None
        if node is not None:
            node.lose(node.lost or "the hub closes")
            self._tell(node)
        self._say_changed()

    def _tell(self, node: Node) -> None:
        self.changed(node)
        self._say_changed()

    async def _refuse(self, socket: web.WebSocketResponse, name: str, refusal: Refusal) -> None:
        if self.refusals.get(name) != refusal:  # an agent in a loop comes again and again
            log.error("node %s is refused: %s", name, refusal.reason)
        self.refusals[name] = refusal
        await say(socket, refusal)
        self._say_changed()


async def _say_no_more(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Who has no token does not learn what answers here."""
    response.headers.pop(hdrs.SERVER, None)


def _name_said(text: str) -> str:
    return str(json.loads(text).get("node", "?"))[:80]


def listening_socket(host: str, port: int) -> socket.socket:
    """One socket, where `host` is empty for IPv4 and IPv6 alike: two of them would get two different free ports."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family)
