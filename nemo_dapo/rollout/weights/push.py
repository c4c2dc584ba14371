"""Rank 0's calls by which a server takes the weights that lie in its node's folder, or that ranks put into its devices.

    look at the bytes -> pause -> load, checked again -> set the version and read it back -> resume

What goes into devices does so between `begin` and `conclude`, whose first call asks whether all of it came.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import httpx

from nemo_dapo.rollout.control import Reply, ask, call
from nemo_dapo.rollout.weights import verify
from nemo_dapo.telemetry.escape import printable


@dataclass(frozen=True)
class Held:
    """A version that lies whole in a node's folder: what a server of that node is told to load.

    Without a folder it is what came to the server's devices.
    """

    version: int
    folder: str
    digest: str


async def damage(http: httpx.AsyncClient, held: Held, deadline: float) -> str:
    """What a server, asked before it is paused, finds wrong with the weights of its node; '' where they are as sent.

    Also '' from a server that cannot say, whose plugin is older: it finds out when it loads them, and must be restarted.
    Raises RuntimeError for an answer that is none.
    """
    reply = await ask(http, "POST", verify.ROUTE, deadline, json=asdict(held))
    if reply.status not in (200, 404, 422):
        raise RuntimeError(
            f"{verify.ROUTE} of {http.base_url} failed: HTTP {reply.status} {printable(reply.text, 500)}"
        )
    return printable(reply.text, 500) if reply.status == 422 else ""


async def push_weights(
    http: httpx.AsyncClient, held: Held, deadline: float, *, resume: bool = True, keeps_cache: bool = False
) -> None:
    """Make one server load `held` and check that it says so.

    Requests in flight are frozen, not aborted: their key-value cache is dropped and recomputed with the new weights, or
    with `keeps_cache` gone on with, and the spans of their samples name both versions. Without `resume` the server stays
    paused. `deadline` is of time.monotonic(). Raises RuntimeError when the server refuses a call or ends up with another
    version, ServerDiedError or httpx.TransportError when it is gone, TimeoutError when it is late.
    """
    await begin(http, deadline, keeps_cache=keeps_cache)
    await conclude(http, held, deadline, resume=resume, keeps_cache=keeps_cache)


async def begin(http: httpx.AsyncClient, deadline: float, *, keeps_cache: bool = False) -> None:
    """The first half of `push_weights`: from here on the server takes weights and generates nothing."""
    await pause(http, deadline, keeps_cache=keeps_cache)
    await call(http, "POST", "/start_weight_update", deadline, may_be_absent=True)


async def conclude(
    http: httpx.AsyncClient, held: Held, deadline: float, *, resume: bool = True, keeps_cache: bool = False
) -> None:
    """The second half of `push_weights`."""
    await call(http, "POST", "/update_weights", deadline, json={"update_info": asdict(held)})
    await call(http, "POST", "/finish_weight_update", deadline, json={}, may_be_absent=True)
    if not keeps_cache:
        await call(http, "POST", "/reset_prefix_cache", deadline, params={"reset_running_requests": "true"})
    # The version last: tokens carry it only once the weights and the cache are the new ones.
    await set_version(http, held.version, deadline)
    if resume:
        await call(http, "POST", "/resume", deadline)


async def pause(http: httpx.AsyncClient, deadline: float, *, keeps_cache: bool = False) -> None:
    """Freeze the requests of a server, those to come too; it may be paused already."""
    params = {"mode": "keep"} | ({"clear_cache": "false"} if keeps_cache else {})
    await call(http, "POST", "/pause", deadline, params=params)


async def set_version(http: httpx.AsyncClient, version: int, deadline: float) -> None:
    """Set the weight version of a server and read it back; nothing on a server too old to have one."""
    body = {"new_version": str(version)}
    if await call(http, "POST", "/update_weight_version", deadline, json=body, may_be_absent=True) is None:
        return
    reply = await call(http, "GET", "/weight_info", deadline)
    if reply is None or said_version(reply) != str(version):
        said = reply and printable(reply.text, 200)
        raise RuntimeError(f"{http.base_url} has weights {said} after the update, not {version}")


def said_version(reply: Reply) -> str | None:
    try:
        return str(json.loads(reply.body)["weight_version"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


async def reports_versions(http: httpx.AsyncClient, deadline: float) -> bool:
    """Whether the server knows weight versions at all; vLLM 0.20 does not."""
    return await call(http, "GET", "/weight_info", deadline, may_be_absent=True) is not None
