"""The part that runs inside a vLLM server: our weight transfer, and a guard for its routes.

vLLM loads `register` through the `vllm.general_plugins` entry point in each of its processes. The trainer's side never
imports this module, which needs vLLM.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from nemo_dapo.rollout import vllm_route, vllm_weights, wire
from nemo_dapo.rollout.challenge import NONCE_PARAMETER, proof
from nemo_dapo.rollout.weights import verify

OPEN_PATHS = ("/health", "/ping", "/metrics")


class RequireKey:
    """ASGI middleware: every route but health and metrics needs `Authorization: Bearer $VLLM_API_KEY`.

    vLLM's own check covers /v1 and /inference alone, while the development routes can replace the weights. It also serves
    our own routes, and answers a challenge at /health, by which the trainer knows its server.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.key = os.environ.get("VLLM_API_KEY", "")
        self.expected = f"Bearer {self.key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] not in OPEN_PATHS and not secrets.compare_digest(given, self.expected):
            await PlainTextResponse("Unauthorized", status_code=401)(scope, receive, send)
        elif scope["path"] == wire.ROUTE:
            await vllm_route.generate(scope, receive, send)
        elif scope["path"] == verify.ROUTE:
            await verify_weights(scope, receive, send)
        elif scope["path"] == "/health" and (nonce := parse_qs(scope["query_string"].decode()).get(NONCE_PARAMETER)):
            await self.app(scope, receive, with_body(send, proof(self.key, nonce[0], scope["server"][1])))
        else:
            await self.app(scope, receive, send)


async def verify_weights(scope: Any, receive: Any, send: Any) -> None:
    """ASGI application: 422, with the reason, unless the node's folder holds what the body (a push.Held) names."""
    held = await Request(scope, receive).json()
    try:
        await asyncio.to_thread(verify.require_whole, Path(held["folder"]), held["version"], held["digest"])
        response = PlainTextResponse("")
    except (ValueError, RuntimeError) as wrong:
        response = PlainTextResponse(str(wrong), status_code=422)
    await response(scope, receive, send)


def with_body(send: Any, body: bytes) -> Any:
    """An ASGI `send` that puts `body` in place of an empty one and leaves the status as it is."""

    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name != b"content-length"]
            await send({**message, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        else:
            await send({"type": "http.response.body", "body": body})

    return sending


def register() -> None:
    """Entry point: make our weight transfer known to this vLLM process; vLLM may call it more than once."""
    vllm_weights.register()
