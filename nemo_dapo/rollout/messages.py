"""What the hub on rank 0 and the agents on the serving nodes say to each other: JSON objects over one websocket each.

    agent: Hello -> hub: Plan -> agent: Report -> hub: Welcome        or, in the hub's place, a Refusal that says why
    hub: Call …, agent: ServerState … and one Result a Call            until the hub says Stop or the lease is lost

Both ends ping each other all the time. Silence for `lease` seconds, or a closed connection, is the end of the lease: the
hub gives the node up and the agent ends its servers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import typing
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from aiohttp import ClientWebSocketResponse, WSMsgType, web

from nemo_dapo.config import RolloutConfig

PROTOCOL = 1
ROUTE = "/agent"
BEATS = 10  # pings within one lease
CLOSE_SECONDS = 1.0  # for the other side to agree to a close: it may be stopped, or cut off
MAX_MESSAGE_BYTES = 4 << 20
HELLO_SECONDS = 10.0  # from the connection to the first word

Socket = web.WebSocketResponse | ClientWebSocketResponse


class LeaseLostError(ConnectionError):
    """The other side is silent or gone."""


@dataclass(frozen=True)
class Hello:
    """Who an agent is. The first two fields stay what they are in every version of the protocol."""

    protocol: int
    package: str  # version of this package
    node: str
    pid: int
    gpus: list[str]  # UUIDs


@dataclass(frozen=True)
class Plan:
    """What a node is to serve. `first` is the index, in the whole fleet of `total` servers, of the node's first server."""

    slot: int
    first: int
    total: int
    rollout: dict[str, Any]  # options_said; num_servers of them run on the node
    model_path: str
    precision: str
    seed: int  # of the fleet's first server
    api_key: str
    log_dir: str
    run_file: str  # which the node sees, with the run's token in it, where the run's folder is everyone's
    spans_hosts: bool  # then servers listen on the address by which the node reaches the hub
    weight_token: str = ""  # which the receiver of weights is shown


@dataclass(frozen=True)
class Report:
    """What an agent found on its node when it looked at the plan; `problems` are reasons for which it cannot serve."""

    address: str  # as rank 0 can reach it
    vllm: str  # versions in the servers' environment, "" where it has none
    nccl: str
    model: dict[str, Any]  # hf_folder.fingerprint
    place: dict[str, str] = field(default_factory=dict)  # of its weights: a weights.Place
    gpus: list[list[str]] = field(default_factory=list)  # of each of its servers, in the workers' order: UUIDs
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Welcome:
    pass


@dataclass(frozen=True)
class Refusal:
    """Why a node cannot join, and what to do about it; one that is not final may be gone by the next attempt."""

    reason: str
    is_final: bool = True


@dataclass(frozen=True)
class Call:
    """`action` is start (all servers; index is not read), or restart or end (server `index` of the fleet)."""

    number: int
    action: str
    index: int = -1


@dataclass(frozen=True)
class Result:
    """Of call `number`: no error means done."""

    number: int
    error: str = ""
    error_class: str = ""


@dataclass(frozen=True)
class ServerState:
    """One server as its agent sees it: not started yet where `pid` is 0, ended where `ended` says how."""

    index: int
    pid: int = 0
    url: str = ""
    is_ready: bool = False
    ended: str = ""


@dataclass(frozen=True)
class Stop:
    pass


KINDS = {kind.__name__: kind for kind in (Hello, Plan, Report, Welcome, Refusal, Call, Result, ServerState, Stop)}


def encode(message: Any) -> str:
    return json.dumps({"kind": type(message).__name__, **dataclasses.asdict(message)})


def decode(text: str, *kinds: type[Any]) -> Any:
    """The message in `text`; raises ValueError unless it is one of `kinds`, whole and of the right types."""
    try:
        said = json.loads(text)
        kind = KINDS[said.pop("kind")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(f"{text[:80]!r} is no message of this protocol") from problem
    if kind not in kinds:
        raise ValueError(f"{kind.__name__} was said where {' or '.join(k.__name__ for k in kinds)} was expected")
    types = typing.get_type_hints(kind)
    for option in dataclasses.fields(kind):
        if option.name not in said and option.default is dataclasses.MISSING and not callable(option.default_factory):
            raise ValueError(f"{kind.__name__} lacks {option.name}")
    for name, value in said.items():
        expected = typing.get_origin(types.get(name)) or types.get(name)
        if expected is None or type(value) is not expected:
            raise ValueError(f"{kind.__name__}.{name}={str(value)[:80]!r} is not what this version says there")
    return kind(**said)


def version_said(text: str) -> tuple[int, str] | None:
    """(protocol, package) of the first word of an agent of any version; None where it is no such thing."""
    try:
        said = json.loads(text)
        return int(said["protocol"]), str(said["package"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def options_said(config: RolloutConfig) -> dict[str, Any]:
    """The options as JSON has them, for a plan."""
    options = dataclasses.asdict(config)
    return {name: value.value if isinstance(value, Enum) else value for name, value in options.items()}


def options_heard(said: Mapping[str, Any]) -> RolloutConfig:
    """The options of a plan."""
    types = typing.get_type_hints(RolloutConfig)
    kinds = {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, Enum)}
    options: dict[str, Any] = {name: kinds[name](value) if name in kinds else value for name, value in said.items()}
    return RolloutConfig(**options)


async def heard(socket: Socket, lease: float) -> AsyncGenerator[str, None]:
    """The texts that the other side sends, while both ends show signs of life; raises LeaseLostError at the end of that."""
    beating = asyncio.ensure_future(_beat(socket, lease / BEATS))
    try:
        while True:
            try:
                message = await socket.receive(timeout=lease)
            except asyncio.TimeoutError:
                raise LeaseLostError(f"no sign of life for {lease:g} s (rollout.lease_seconds)") from None
            if message.type is WSMsgType.TEXT:
                yield message.data
            elif message.type is WSMsgType.PING:
                await socket.pong(message.data)
            elif message.type is not WSMsgType.PONG:
                raise LeaseLostError("the connection was closed")
    finally:
        beating.cancel()


async def _beat(socket: Socket, seconds: float) -> None:
    while not socket.closed:
        await socket.ping()
        await asyncio.sleep(seconds)


async def say(socket: Socket, message: Any) -> None:
    """Send one message; a connection that is gone is for `heard` to find."""
    try:
        await socket.send_str(encode(message))
    except ConnectionError:
        return
