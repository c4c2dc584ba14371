"""A server on a real socket that answers our route, or vLLM's JSON route, rightly or in some wrong way: for tests alone.

The real server is tested in test_rollout_vllm.py; this one does what a real one does only when it is sick.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_dapo.rollout import wire
from nemo_dapo.rollout.weights.plan import Place
from nemo_dapo.rollout.weights.store import WeightStore

JSON_ROUTE = "/inference/v1/generate"
TOKENS, LOGPROBS = [2, 3, 1], [-1.0, -1.5, -0.5]

Act = Callable[["Handler"], None]


def frames(
    tokens: list[int] = TOKENS,
    logprobs: list[float] = LOGPROBS,
    version: int = 0,
    reason: str = "stop",
    routes: wire.Routes | None = None,
) -> bytes:
    sent = [] if routes is None else list(wire.encode_routes(0, 0, routes))
    versions = [[version, 0, len(tokens)]]
    end = wire.encode_final(len(sent), 0, tokens, logprobs, finish_reason=reason, versions=versions, routes=routes)
    return b"".join([*sent, end])


def choice(tokens: list[int] = TOKENS, version: int = 0, **changes: Any) -> dict[str, Any]:
    """One choice of vLLM's JSON answer."""
    content = [{"token_id": t, "logprob": -0.5 * t} for t in tokens]
    spans = [{"version": str(version), "start": 0, "end": len(tokens)}]
    whole = {"index": 0, "token_ids": list(tokens), "logprobs": {"content": content}, "finish_reason": "stop"}
    return {**whole, "weight_versions": spans, **changes}


def say(handler: Handler, body: bytes, status: int = 200, claimed: int | None = None, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if claimed is None else claimed))
    handler.end_headers()
    handler.wfile.write(body)


def good(handler: Handler) -> None:
    say(handler, frames() if handler.path == wire.ROUTE else json.dumps({"choices": [choice()]}).encode())


def hang(handler: Handler) -> None:
    """Say nothing until the client goes away or the server is closed."""
    handler.connection.settimeout(0.1)
    while not handler.server.closing.is_set():
        try:
            if handler.connection.recv(1) == b"":
                handler.server.dropped.set()
                return
        except TimeoutError:
            continue


def hang_in_the_middle(handler: Handler) -> None:
    say(handler, frames()[:20], claimed=len(frames()))
    hang(handler)


def trickle(handler: Handler) -> None:
    """A byte now and then, for ever."""
    say(handler, b"", claimed=1 << 30)
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"N")


def without_end(count: int) -> Act:
    """Frames of `count` tokens in their right order, for ever."""

    def act(handler: Handler) -> None:
        say(handler, b"", claimed=1 << 40)
        for number in itertools.count():
            if handler.server.closing.is_set():
                return
            handler.wfile.write(wire.encode(wire.TOKENS, number, number * count, [2] * count, [-1.0] * count))

    return act


def close_in_the_middle(handler: Handler) -> None:
    say(handler, frames()[:20], claimed=len(frames()))
    handler.close_connection = True


def begin(*frames: bytes, then: Act) -> Act:
    """Send `frames`, wait until the test has seen to it that they were read, then do what is worse."""

    def act(handler: Handler) -> None:
        say(handler, b"".join(frames), claimed=1 << 20)
        handler.server.go_on.wait(20)
        then(handler)

    return act


def close(handler: Handler) -> None:
    handler.close_connection = True


def answer(body: bytes, status: int = 200, **headers: str) -> Act:
    return lambda handler: say(handler, body, status, None, **headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path.partition("?")[0] not in (wire.ROUTE, JSON_ROUTE):
            self.server.control(self)
            return
        if not self.body or (self.path == wire.ROUTE and not self.server.has_frames):
            say(self, b"", 400 if self.server.has_frames else 404)
            return
        self.server.requests += 1
        self.server.bodies.append(self.body)
        script = self.server.script
        (script.pop(0) if script else self.server.otherwise)(self)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            say(self, self.server.metrics.encode())
        else:
            self.server.control(self)

    def log_message(self, *_: object) -> None: ...

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:  # the client went away, as some tests mean it to
            return


class StandIn(ThreadingHTTPServer):
    """Acts by `script`, an entry a request, then always by `otherwise`."""

    daemon_threads = True
    request_queue_size = 1024  # a connection that finds the queue full is tried again by TCP after seconds

    def __init__(self, otherwise: Act = good, script: list[Act] | None = None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.otherwise, self.script = otherwise, list(script or [])
        self.requests = 0
        self.bodies: list[dict[str, Any]] = []
        self.metrics, self.version, self.has_frames = "", "0", True
        self.calls: list[str] = []
        self.asked: list[str] = []  # the same with their queries
        self.sick_calls: dict[str, list[Act]] = {}  # what control routes do instead of working, an entry a call
        self.closing, self.dropped, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def control(self, handler: Handler) -> None:
        """Every other route works, and remembers the version of the weights."""
        route = handler.path.partition("?")[0]
        self.calls.append(route)
        self.asked.append(handler.path)
        if self.sick_calls.get(route):
            self.sick_calls[route].pop(0)(handler)
            return
        if route == "/update_weight_version":
            self.version = handler.body["new_version"]
        say(handler, json.dumps({"weight_version": self.version}).encode())

    def handle_error(self, *_: object) -> None: ...

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class StandInServers:
    """What the engine uses of ServingNodes; a `dead` server, or a sick one, is well after `restart` by its cure."""

    def __init__(self, *urls: str) -> None:
        self.api_key = "k"
        self.headers = {"Authorization": "Bearer k"}
        self.servers = [
            SimpleNamespace(url=url, log_path=Path(f"server_{i}.log"), node="here") for i, url in enumerate(urls)
        ]
        self.away: set[int] = set()
        self.dead: set[int] = set()
        self.cures: dict[int, Callable[[], object]] = {}
        self.restarts: list[int] = []
        self.ended: list[int] = []

    def __len__(self) -> int:
        return len(self.servers)

    def alive(self, index: int) -> bool:
        return index not in self.dead and index not in self.away

    def is_away(self, index: int) -> bool:
        return index in self.away

    async def node_back(self, index: int) -> None:
        while index in self.away:
            await asyncio.sleep(0.01)

    def describe(self, index: int) -> str:
        return f"vLLM server {index} (pid 0, server_{index}.log)"

    def describe_exit(self, index: int) -> str:
        return f"vLLM server {index} ended"

    @functools.cached_property
    def store(self) -> WeightStore:
        return WeightStore(8, "here")

    def places(self) -> list[Place]:
        return [self.store.place()]

    def start(self) -> None: ...

    def end(self, index: int) -> None:
        self.ended.append(index)

    def restart(self, index: int) -> None:
        self.restarts.append(index)
        if index in self.cures:
            self.dead.discard(index)
            self.cures[index]()
        elif index in self.dead:
            raise RuntimeError(f"vLLM server {index} ended with exit code 1")

    def close(self) -> None:
        if "store" in vars(self):
            self.store.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return reached
