"""The servers of a run as rank 0 has them, whatever nodes they are on: each is known by its place in the fleet.

A node has `rollout.num_servers` places in a row, whose servers its agent starts and restarts when it is told to; requests
and control calls go from rank 0 straight to the servers' URLs. A node that is lost leaves its places empty until it, or a
spare one, registers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nemo_dapo.config import Placement, Precision, RolloutConfig, Transport
from nemo_dapo.config.placement import split_address
from nemo_dapo.hf_folder import fingerprint
from nemo_dapo.rollout.agreement import Terms
from nemo_dapo.rollout.command import choose_key
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.hub import CallFailedError, Hub, Node, NodeLostError
from nemo_dapo.rollout.keeper import AGENT_LOG, AgentKeeper
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.messages import Plan, ServerState, options_said
from nemo_dapo.rollout.run_file import RUN_FILE, Door, choose_token, write_run_file
from nemo_dapo.rollout.servers import END_GRACE_SECONDS, ServersClosedError, of_start_timeout
from nemo_dapo.rollout.weights.plan import Place, Target
from nemo_dapo.tasks import all_or_none, within

log = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS_BETWEEN_WORDS = 15.0
CALL_MARGIN_SECONDS = 3 * END_GRACE_SECONDS  # a restart ends the old server before the new one's own limit begins
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Weights:
    """What the nodes must know of them: the size of one version, and what their receivers are shown."""

    nbytes: int
    token: str


@dataclass(frozen=True)
class RemoteServer:
    """One place in the fleet; what is in it is its node's to say."""

    index: int
    slot: int
    nodes: ServingNodes

    @property
    def state(self) -> ServerState:
        node = self.nodes.last[self.slot]
        return node.servers.get(self.index, ServerState(self.index)) if node else ServerState(self.index)

    @property
    def url(self) -> str:
        return self.state.url

    @property
    def pid(self) -> int:
        """Of the server's guardian, on its node."""
        return self.state.pid

    @property
    def log_path(self) -> Path:
        return self.nodes.log_dir(self.node) / f"server_{self.index}.log"

    @property
    def node(self) -> str:
        """The node that has the place, or had it last; '' before the first."""
        node = self.nodes.last[self.slot]
        return node.name if node else ""


class ServingNodes:
    """What the engine needs of its servers. `start` returns when all are healthy; `close` leaves no process behind.

    `names` are the only nodes that may serve, in the order of their places; without them any may. `nccl` is the version
    that they must have, "" for any. Nothing is started before `start`, but agents may register from the beginning on.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model_path: Path,
        precision: Precision,
        run_dir: Path,
        seed: int,
        weights: Weights,
        *,
        names: Sequence[str] = (),
        nccl: str = "",
    ) -> None:
        self.config, self.model_path, self.precision = config, model_path, precision
        self.run_dir, self.seed, self.weights = run_dir, seed, weights
        self.api_key = choose_key(config)
        self.is_local = config.placement is Placement.local
        names = [node_name()] if self.is_local else list(names)
        slots = len(names) or config.nodes
        self.last: list[Node | None] = [None] * slots  # who holds each place, or held it last
        self.servers = [RemoteServer(i, i // config.num_servers, self) for i in range(slots * config.num_servers)]
        if config.min_servers > len(self.servers):
            raise ValueError(
                f"rollout.min_servers={config.min_servers} exceeds the {len(self.servers)} servers of {slots} node(s); "
                "lower it"
            )
        self.closing, self._ending = threading.Event(), threading.Lock()
        self.token = choose_token()
        self.loop = LoopThread("hub")
        is_direct = config.transport is Transport.device
        terms = Terms(str(model_path), fingerprint(model_path), nccl, is_direct=is_direct)
        self.hub = Hub(
            terms,
            slots,
            self._plan,
            token=self.token,
            lease=config.lease_seconds,
            names=names,
            changed=self._note,
        )
        self.spans_hosts = any(name != node_name() for name in names) or config.placement is Placement.dedicated
        self.addresses: list[str] = []
        self.keeper: AgentKeeper | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Listen, and say where; raises ValueError for an address that cannot be had, OSError for a folder or a disk."""
        host, port = split_address(self.config.listen)
        self._run(self.hub.open(host or ("" if self.spans_hosts else LOOPBACK), port))
        self.addresses = [f"{name}:{self.hub.port}" for name in reachable_as(host, self.spans_hosts)]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_run_file(self.run_dir, self.door)
        if self.is_local:
            self.keeper = AgentKeeper(self.door, self.log_dir(node_name()) / AGENT_LOG)

    @property
    def door(self) -> Door:
        return Door(self.addresses, self.token, self.config.lease_seconds, self.weights.nbytes)

    def __len__(self) -> int:
        return len(self.servers)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    def log_dir(self, node: str) -> Path:
        return self.run_dir / "servers" / ("" if self.is_local else node)

    def _plan(self, slot: int, node: str) -> Plan:
        return Plan(
            slot=slot,
            first=slot * self.config.num_servers,
            total=len(self.servers),
            rollout=options_said(self.config),
            model_path=str(self.model_path.absolute()),
            precision=self.precision.value,
            seed=self.seed,
            api_key=self.api_key,
            log_dir=str(self.log_dir(node).absolute()),
            run_file=str((self.run_dir / RUN_FILE).absolute()),
            spans_hosts=self.spans_hosts,
            weight_token=self.weights.token,
        )

    def places(self) -> list[Place]:
        """Where the nodes that are there keep their weights."""
        return [Place(**node.report.place) for node in self.hub.nodes if node]

    def target(self, index: int) -> Target:
        """Server `index`, into whose devices ranks are to send."""
        server = self.servers[index]
        node = self.last[server.slot]
        gpus = node.report.gpus[index - node.plan.first] if node else []
        nccl = node.report.nccl if node else ""
        return Target(f"vLLM server {index}", server.url, tuple(gpus), nccl, server.pid)

    # ---------------------------------------------------------------- start and end

    def start(self) -> None:
        """Wait until every place has its node and have them all start their servers.

        Raises RuntimeError for a node that is refused, a server that ends at start or when another thread calls `close`,
        TimeoutError after `rollout.start_timeout` seconds; either way all of them are ended first.
        """
        try:
            if self.keeper:
                self.keeper.start()
            self._wait_for(self._start_all())
        except BaseException:
            self.close()
            raise

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for the start, or for what ends it before."""
        future: Future[None] = self.loop.submit(work)
        started = said = time.monotonic()
        while not (future.done() or self.closing.wait(0.1)):
            if self.keeper and self.keeper.failed:
                future.cancel()
                raise RuntimeError(self._refusals() or self.keeper.failed)
            if (now := time.monotonic()) - said > SECONDS_BETWEEN_WORDS:
                said = now
                waited = of_start_timeout(now - started, self.config)
                print(f"vLLM servers: starting for {waited}; {self.describe_start()}", flush=True)
        if not future.done():
            future.cancel()
            raise ServersClosedError("vLLM servers were not ready yet when the run ended")
        future.result()

    async def _start_all(self) -> None:
        slots = range(len(self.hub.nodes))
        arrival = asyncio.ensure_future(self._everyone())
        refusal = asyncio.ensure_future(self.hub.first_refusal())
        either: set[asyncio.Future[Any]] = {arrival, refusal} if self.hub.names else {arrival}
        try:
            await asyncio.wait(either, timeout=self.config.start_timeout, return_when=asyncio.FIRST_COMPLETED)
            if refusal.done() and self.hub.names and not arrival.done():
                raise RuntimeError(self._refusals())
            if not arrival.done():
                raise TimeoutError(
                    f"{sum(node is None for node in self.hub.nodes)} of {len(slots)} serving nodes did not register within "
                    f"rollout.start_timeout={self.config.start_timeout:.0f} s ({self.describe_start()}). Each runs `python "
                    f"-m nemo_dapo.rollout.keeper --run-file {self.run_dir / RUN_FILE}`, and must reach one of "
                    f"{', '.join(self.addresses)} (rollout.listen). {self._refusals()}"
                )
            limit = self.config.start_timeout + CALL_MARGIN_SECONDS
            await all_or_none([self._call(slot, "start", -1, limit) for slot in slots])
        finally:
            arrival.cancel()
            refusal.cancel()

    async def _everyone(self) -> None:
        for slot in range(len(self.hub.nodes)):
            await self.hub.node_at(slot)

    def describe_start(self) -> str:
        """Which nodes are there, and what their servers are at."""
        nodes = self.hub.nodes
        there = [f"{node.name} ({self._progress(node)})" for node in nodes if node]
        missing = [name for name in self.hub.names if name not in {node.name for node in nodes if node}]
        waits = f"waiting for {', '.join(missing) or f'{nodes.count(None)} more node(s)'}" if None in nodes else ""
        return "; ".join(filter(None, [", ".join(there), waits])) + f"; logs in {self.run_dir / 'servers'}"

    def _progress(self, node: Node) -> str:
        ready = sum(server.is_ready for server in node.servers.values())
        return f"{ready} of {self.config.num_servers} ready"

    def _refusals(self) -> str:
        found = [f"node {name} is refused: {refusal.reason}" for name, refusal in sorted(self.hub.refusals.items())]
        return "\n".join(found)

    def close(self) -> None:
        """End all servers and their agents, at once where they are still starting; safe to call twice, from any thread."""
        self.closing.set()
        with self._ending:
            if not self.loop.loop.is_closed():
                self.loop.submit(self.hub.close()).result()
            if self.keeper:
                self.keeper.close()
            self.loop.close()

    # ---------------------------------------------------------------- one server

    def alive(self, index: int) -> bool:
        server = self.servers[index]
        node = self.last[server.slot]
        return node is not None and not node.lost and server.state.pid != 0 and not server.state.ended

    def is_away(self, index: int) -> bool:
        """Whether the place's node is lost, so that nothing can be started there."""
        return self.hub.nodes[self.servers[index].slot] is None

    async def node_back(self, index: int) -> None:
        """Returns once the place has a node; from any event loop."""
        await asyncio.wrap_future(self.loop.submit(self.hub.node_at(self.servers[index].slot)))

    def describe(self, index: int) -> str:
        """What a message says of a server that may live: number, node, process and log."""
        server = self.servers[index]
        node = "" if self.is_local else f" on {server.node or 'no node yet'}"
        return f"vLLM server {index}{node} (pid {server.pid or '-'}, {server.log_path})"

    def describe_exit(self, index: int) -> str:
        server = self.servers[index]
        node = self.last[server.slot]
        if node is not None and node.lost:
            return f"{self.describe(index)} is lost with its node {node.name}: {node.lost}"
        return server.state.ended or f"{self.describe(index)} was not started"

    def end(self, index: int) -> None:
        """Have server `index` killed; `restart` brings it back. One whose node is lost has ended with it."""
        if not self.is_away(index):
            with contextlib.suppress(NodeLostError):
                self._run(self._call(self.servers[index].slot, "end", index, CALL_MARGIN_SECONDS))

    def restart(self, index: int) -> None:
        """Have server `index` killed where it still runs, started anew, and wait until it is healthy.

        Raises ServersClosedError when the run ends, ConnectionError for a node that is lost, RuntimeError or TimeoutError
        for a server that does not come up.
        """
        limit = self.config.start_timeout + CALL_MARGIN_SECONDS
        try:
            self._run(self._call(self.servers[index].slot, "restart", index, limit))
        except (OSError, RuntimeError, CancelledError) as problem:
            if self.closing.is_set():
                raise ServersClosedError(f"vLLM server {index} is not started: the run ends") from problem
            raise

    async def _call(self, slot: int, action: str, index: int, limit: float) -> None:
        node = await self.hub.node_at(slot)
        try:
            await within(limit, node.call(action, index))
        except CallFailedError as failed:
            raise ERRORS.get(failed.error_class, RuntimeError)(str(failed)) from failed
        except asyncio.TimeoutError as late:
            what = "its servers" if index < 0 else f"vLLM server {index}"
            raise TimeoutError(
                f"node {node.name} did not {action} {what} within {limit:.0f} s: see {self.log_dir(node.name) / AGENT_LOG}"
            ) from late

    def _note(self, node: Node) -> None:
        self.last[node.plan.slot] = node

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self.loop.loop.is_closed():
            work.close()
            raise ServersClosedError("no server is started any more: the run ends")
        return self.loop.submit(work).result()


ERRORS: dict[str, type[Exception]] = {"ServersClosedError": ServersClosedError, "TimeoutError": TimeoutError}


def reachable_as(host: str, spans_hosts: bool) -> list[str]:
    """Names of rank 0's host under which agents try to reach it, the likeliest first."""
    if host and host not in ("0.0.0.0", "::"):
        return [f"[{host}]" if ":" in host else host]
    if not spans_hosts:
        return [LOOPBACK]
    # torchrun's other ranks reach rank 0 by the second one.
    names = [node_name(), os.environ.get("MASTER_ADDR", "")]
    return list(dict.fromkeys(name for name in names if name))
