"""One request to a vLLM server: token ids in, samples with log-probabilities and weight versions out.

The route is `POST /inference/v1/generate` (vLLM's `--tokens-only`). Every request has a connection of its own: nothing
outlives the event loop it was made in, and closing it (cancellation, deadline) makes the server drop the request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nemo_dapo.types import Prompt, Sample, SamplingParams, VersionSpan

GENERATE_ROUTE = "/inference/v1/generate"
CONNECT_SECONDS = 10.0
# vLLM sends this floor in place of NaN and -inf, which JSON cannot carry.
NOT_A_LOGPROB = -9998.0


class ServerUnavailableError(ConnectionError):
    """The server did not answer, or answered that it cannot serve: worth another attempt, here or elsewhere."""


@dataclass(frozen=True)
class Reader:
    """What turns a response into samples: the tokenizer, and the weight version to assume where the server reports none
    (vLLM before weight versions; None = a response without versions is an error)."""

    tokenizer: Any
    assumed_version: int | None = None


def stop_tokens(model_path: Path, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's, config.json's and generation_config.json's end-of-sequence ids."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        path = model_path / name
        declared = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        ids.update([declared] if isinstance(declared, int) else declared or [])
    return sorted(ids)


def request_body(prompt: Prompt, n: int, params: SamplingParams, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """The JSON of one request. No seed: a seeded request kills vLLM's CPU engine when its prefill is chunked."""
    return {
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "n": n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_tokens,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": list(stop_token_ids),
        },
    }


async def generate(
    url: str, headers: Mapping[str, str], prompt: Prompt, body: dict[str, Any], reader: Reader, timeout: float
) -> list[Sample]:
    """Send one request and return its `n` samples.

    Raises ServerUnavailableError when the server is gone or busy, RuntimeError when it refuses the request or answers
    with something that cannot be trained on. The time limit `timeout` [s] is for silence of the server.
    """
    limits = httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
    # trust_env: proxy variables are not for servers of our own. verify: the scheme is http, no certificates to load.
    async with httpx.AsyncClient(headers=dict(headers), timeout=limits, trust_env=False, verify=False) as client:
        try:
            response = await client.post(url + GENERATE_ROUTE, json=body)
        except httpx.TransportError as problem:
            raise ServerUnavailableError(f"{url}: {type(problem).__name__} {problem}".strip()) from problem
    # An API server whose engine process died answers 500 with this word until it ends itself a moment later.
    engine_died = response.status_code == 500 and "EngineCore" in response.text
    if engine_died or response.status_code in (429, 502, 503, 504):
        raise ServerUnavailableError(f"{url}: HTTP {response.status_code} {response.text[:300]}")
    if response.status_code != 200:
        raise RuntimeError(
            f"vLLM at {url} refused prompt {prompt.uid} ({len(prompt.token_ids)} tokens, {body['sampling_params']}): "
            f"HTTP {response.status_code} {response.text[:500]}"
        )
    return read_samples(response.json(), prompt, body["sampling_params"]["n"], reader)


def read_samples(answer: Mapping[str, Any], prompt: Prompt, n: int, reader: Reader) -> list[Sample]:
    """The samples of a response, in the order of their index; RuntimeError where it is not what was asked for."""
    choices = sorted(answer.get("choices") or [], key=lambda choice: choice["index"])
    if len(choices) != n:
        raise RuntimeError(f"vLLM returned {len(choices)} samples of prompt {prompt.uid}, expected {n}")
    return [read_sample(choice, prompt, reader) for choice in choices]


def read_sample(choice: Mapping[str, Any], prompt: Prompt, reader: Reader) -> Sample:
    """One sample: as many finite log-probabilities as tokens, and weight versions that cover all of them."""
    where = f"sample {choice['index']} of prompt {prompt.uid}"
    token_ids = tuple(choice.get("token_ids") or ())
    content = (choice.get("logprobs") or {}).get("content") or []
    logprobs = tuple(math.nan if entry["logprob"] is None else float(entry["logprob"]) for entry in content)
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"vLLM returned {len(logprobs)} log-probabilities for {len(token_ids)} tokens in {where}")
    for position, value in enumerate(logprobs):
        if not math.isfinite(value) or value <= NOT_A_LOGPROB:
            raise RuntimeError(
                f"vLLM returned log-probability {value} for token {token_ids[position]} at position {position} in "
                f"{where} (it sends -9999 for NaN and -inf): check the weights of the last update for NaN"
            )
    return Sample(
        token_ids=token_ids,
        logprobs=logprobs,
        text=reader.tokenizer.decode(token_ids, skip_special_tokens=True),
        finish_reason=choice.get("finish_reason") or "abort",
        versions=read_versions(choice.get("weight_versions"), len(token_ids), where, reader.assumed_version),
    )


def read_versions(spans: Any, length: int, where: str, assumed: int | None) -> tuple[VersionSpan, ...]:
    """Weight versions of `length` tokens as adjoining spans from 0 to `length`."""
    if not spans and assumed is not None:
        return (VersionSpan(assumed, 0, length),)
    versions = tuple(VersionSpan(int(span["version"]), span["start"], span["end"]) for span in spans or [])
    edges = [0, *(span.end for span in versions)]
    if edges[-1] != length or [span.start for span in versions] != edges[:-1]:
        raise RuntimeError(f"vLLM reported weight versions {spans} for the {length} tokens of {where}: not all covered")
    return versions
