"""What a server that was just started is told and asked, before it is asked for samples."""

from __future__ import annotations

import time

import httpx

from nemo_dapo.rollout import admission, client, control, wire
from nemo_dapo.rollout.admission import Reading
from nemo_dapo.rollout.fleet import HopelessError
from nemo_dapo.rollout.weights import push
from nemo_dapo.rollout.weights.ledger import DamagedWeightsError
from nemo_dapo.rollout.weights.push import Held

INITIAL_VERSION = 0  # of the weights in the model's folder, until the first update
METRICS_SECONDS = 4.0  # for a server to answer /metrics; one that does not has made no progress that we know of


async def agree(held: Held | None, http: httpx.AsyncClient, deadline: float) -> tuple[client.Server, Reading]:
    """Begin its transfer engine, set its version, have it load `held`; how it is asked, and what it has room for.

    Raises DamagedWeightsError for weights that are not as they were sent, HopelessError for those that it refuses.
    """
    await control.call(http, "POST", "/init_weight_transfer_engine", deadline, json={"init_info": {}})
    reports = await push.reports_versions(http, deadline)
    await push.set_version(http, INITIAL_VERSION, deadline)
    has_frames = (await control.ask(http, "POST", wire.ROUTE, deadline, json={})).status == 400
    if held:
        await _load(held, http, deadline)
    url = str(http.base_url).rstrip("/")
    return client.Server(url, has_frames, reports), await read_metrics(http) or Reading()


async def _load(held: Held, http: httpx.AsyncClient, deadline: float) -> None:
    if wrong := await push.damage(http, held, deadline):
        raise DamagedWeightsError(wrong)
    try:
        await push.push_weights(http, held, deadline)
    except RuntimeError as refused:
        raise HopelessError(f"a fresh server refuses the weights: {refused}") from refused


async def read_metrics(http: httpx.AsyncClient) -> Reading | None:
    """None where the server does not answer."""
    try:
        reply = await control.ask(http, "GET", "/metrics", time.monotonic() + METRICS_SECONDS)
    except (TimeoutError, ConnectionError, httpx.HTTPError, RuntimeError):
        return None
    return admission.read(reply.text)
