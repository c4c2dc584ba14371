"""One request to one vLLM server: token ids in, one sample with log-probabilities and weight versions out.

Two routes. Ours (`wire.ROUTE`) streams eight bytes a token; vLLM's own (`POST /inference/v1/generate` of `--tokens-only`)
answers 140 bytes of JSON a token and serves where our plugin is not loaded. Cancelling a request closes its connection,
upon which the server drops it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from nemo_dapo.rollout import answers, wire
from nemo_dapo.rollout.answers import Answer, Ending, Expected, UnusableAnswerError
from nemo_dapo.telemetry.escape import printable
from nemo_dapo.types import Prompt, SamplingParams, VersionSpan

log = logging.getLogger(__name__)

JSON_ROUTE = "/inference/v1/generate"
CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0  # below uvicorn's 5: a connection that the server is about to close is not used again
JSON_BYTES_PER_TOKEN = 1024  # seven times what vLLM sends
MAX_REFUSAL_BYTES = 1 << 16
FILES_BESIDE_CONNECTIONS = 512  # of a trainer rank with its workers, libraries and ranks
REQUEST_HEADERS = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
REFUSALS = (400, 413, 422)  # what a server says of a request that is wrong whoever serves it; the rest is about itself

OnTokens = Callable[[wire.Ids, wire.Logprobs], None]


class ServerUnavailableError(ConnectionError):
    """The server did not answer, or answered that it cannot serve: worth another attempt, here or elsewhere."""


class RefusedRequestError(RuntimeError):
    """The server refused the request itself: it would be refused again, anywhere."""


@dataclass(frozen=True)
class Server:
    """How one server is asked. One that reports no weight versions (vLLM 0.20) is believed to have the newest."""

    url: str
    has_frames: bool = True
    reports_versions: bool = True


def session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """The one connection pool of a run; made, used and closed in one event loop. Proxy variables do not apply."""
    return aiohttp.ClientSession(
        headers=dict(headers),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # a small body must not become a large one
        trust_env=False,
        read_bufsize=1 << 18,
    )


def allow_open_files(connections: int) -> None:
    """Raise this process's limit of open files: every sample in flight has a connection, and shells allow 1,024."""
    needed = connections + FILES_BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    if allowed < needed:
        log.warning(
            "%d samples may be in flight, but this process may open %d files (ulimit -Hn): raise that, or lower "
            "rollout.max_concurrent_sequences",
            connections,
            allowed,
        )


def stop_tokens(model_path: Path, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's, config.json's and generation_config.json's end-of-sequence ids."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        path = model_path / name
        declared = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        ids.update([declared] if isinstance(declared, int) else declared or [])
    return sorted(ids)


def request_body(
    prompt: Prompt, params: SamplingParams, stop_token_ids: list[int], priority: int | None = None
) -> bytes:
    """The JSON of a request for one sample; a lower `priority` is served first, None leaves it out.

    No seed: a seeded request kills vLLM's CPU engine when its prefill is chunked.
    """
    body: dict[str, Any] = {
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "n": 1,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_tokens,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": stop_token_ids,
        },
    }
    return json.dumps(body if priority is None else body | {"priority": priority}).encode()


def with_salt(body: bytes, version: int) -> bytes:
    """The request `body` under weights `version`: a server shares prefixes among requests of one version alone."""
    return body[:-1] + f', "cache_salt": "{version}"}}'.encode()


async def sample(
    http: aiohttp.ClientSession,
    server: Server,
    body: bytes,
    expected: Expected,
    on_tokens: OnTokens,
) -> Ending:
    """Send one request and read its answer, which may still be wrong (`answers.check`).

    `on_tokens` is called with the tokens as they come, all of them. Raises ServerUnavailableError when the
    server is gone or busy, RefusedRequestError when it refuses the request, UnusableAnswerError for what is no answer.
    """
    route = wire.ROUTE if server.has_frames else JSON_ROUTE
    try:
        async with http.post(server.url + route, data=body, headers=REQUEST_HEADERS) as response:
            await _check_status(response, expected.uid)
            if server.has_frames:
                return await _read_frames(response, server, expected, on_tokens)
            limit = MAX_REFUSAL_BYTES + JSON_BYTES_PER_TOKEN * expected.max_tokens
            raw = await _read(response, limit)
    except (aiohttp.ClientError, asyncio.TimeoutError) as problem:
        raise ServerUnavailableError(f"{type(problem).__name__} {problem}".strip()) from problem
    answer = _read_json(raw, expected, None if server.reports_versions else expected.oldest_version)
    on_tokens(answer.token_ids, answer.logprobs)
    return Ending(answer.finish_reason, answer.versions)


async def _check_status(response: aiohttp.ClientResponse, uid: str) -> None:
    if response.status == 200:
        return
    said = (
        f"HTTP {response.status} {printable((await _read(response, MAX_REFUSAL_BYTES)).decode(errors='replace'), 300)}"
    )
    if response.status in REFUSALS:
        raise RefusedRequestError(f"vLLM refused prompt {printable(uid)}: {said}")
    raise ServerUnavailableError(said)  # an API server whose engine process died answers 500


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit:
            raise UnusableAnswerError(f"the answer is longer than {limit} bytes")
    return bytes(body)


async def _read_frames(
    response: aiohttp.ClientResponse, server: Server, expected: Expected, on_tokens: OnTokens
) -> Ending:
    reader, routes = wire.FrameReader(expected.max_tokens, expected.max_route_bytes), bytearray()
    last: wire.Frame | None = None
    try:
        async for piece in response.content.iter_any():
            for last in reader.feed(piece):
                on_tokens(last.token_ids, last.logprobs)
                if last.kind == wire.ROUTES:
                    routes += last.extra
        reader.close()
    except wire.WireError as error:
        raise UnusableAnswerError(f"sample of prompt {expected.uid}: {error}") from error
    assert last is not None, "a stream that closed well had a last frame"
    ending = _read_end(last, expected.uid, routes)
    if ending.versions or server.reports_versions:
        return ending
    size = last.first + len(last.token_ids)
    return dataclasses.replace(ending, versions=(VersionSpan(expected.oldest_version, 0, size),))


def _read_end(last: wire.Frame, uid: str, routes: bytearray) -> Ending:
    """Finish reason, weight versions and routes of an answer, by its last frame; raises what a failed one amounts to."""
    if last.kind == wire.FAILED:
        said = printable(last.extra.decode(errors="replace"), 300)
        if said.startswith("refused"):
            raise RefusedRequestError(f"vLLM refused prompt {uid}: {said}")
        raise ServerUnavailableError(said)
    try:
        final = last.final
        if final["total"] != last.first + len(last.token_ids):
            raise ValueError(f"it says {final['total']!r:.40} tokens and sent {last.first + len(last.token_ids)}")
        versions = tuple(VersionSpan(*(int(edge) for edge in span)) for span in final["versions"])
        return Ending(str(final["finish_reason"]), versions, wire.routes_of(routes, final.get("routes")))
    except (wire.WireError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError(f"sample of prompt {uid}: {type(error).__name__}: {error}") from error


def _read_json(raw: bytes, expected: Expected, assumed_version: int | None) -> Answer:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        said = printable(raw[:100].decode(errors="replace"), 100)
        raise UnusableAnswerError(f"sample of prompt {expected.uid}: no JSON: {said}") from error
    return answers.from_json(body, expected, assumed_version)
