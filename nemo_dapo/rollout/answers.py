"""What a server may answer, and what can not be right: nothing else is trained on.

R response tokens of one sample, P of its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_dapo.rollout.wire import Ids, Logprobs, Routes
from nemo_dapo.types import BYTE_EXPERTS, VersionSpan

# vLLM's JSON carries this floor in place of NaN and -inf.
NOT_A_LOGPROB = -9998.0
# A float32 log-softmax may exceed 0 by the rounding of logits of some hundred: 1e-5. A probability of 1.001 is no rounding.
MAX_LOGPROB = 1e-3
TOKEN_NAME = "token_id:"
FINISH_REASONS = ("stop", "length", "abort")


class UnusableAnswerError(RuntimeError):
    """An answer that cannot be right: it counts against its server, and the sample is asked for again."""


@dataclass(frozen=True)
class Answer:
    """One sample as a server sent it: `token_ids` [R] int32, `logprobs` [R] float32 (nats), `routes` [P + R - 1, L, K]."""

    token_ids: Ids
    logprobs: Logprobs
    finish_reason: str
    versions: tuple[VersionSpan, ...]
    routes: Routes | None = None


@dataclass(frozen=True)
class Ending:
    """How an answer ended whose tokens were given away as they came; `versions` count from its first token."""

    finish_reason: str
    versions: tuple[VersionSpan, ...]
    routes: Routes | None = None


@dataclass(frozen=True)
class Mixture:
    """What the routes of a model's tokens look like: in each of `layers`, `top_k` of `experts`.

    vLLM counts all layers, those without experts too, whose rows mean nothing.
    """

    layers: int
    top_k: int
    experts: int

    @property
    def dtype(self) -> str:
        return "uint8" if self.experts <= BYTE_EXPERTS else "uint16"

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.top_k * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Expected:
    """What was asked for. `vocab_size` 0 = unknown; `oldest_version` is that of the weights when the request was sent.

    `mixture` is None where no routes are to come.
    """

    uid: str
    max_tokens: int
    stop_token_ids: frozenset[int]
    vocab_size: int = 0
    oldest_version: int = 0
    prompt_tokens: int = 0
    mixture: Mixture | None = None

    @property
    def max_route_bytes(self) -> int:
        return (self.prompt_tokens + self.max_tokens) * self.mixture.bytes_per_token if self.mixture else 0


def check(answer: Answer, expected: Expected, newest_version: int) -> None:
    """Raises UnusableAnswerError unless `answer` can be a sample of `expected` under weights up to `newest_version`."""
    if problem := _problem(answer, expected, newest_version):
        raise UnusableAnswerError(f"sample of prompt {expected.uid}: {problem}")


def can_go_on(answer: Answer, expected: Expected) -> bool:
    """Whether `answer`, cut off by whatever happened, can be the beginning of a longer sample of `expected`."""
    ids = answer.token_ids
    if not 0 < len(ids) < expected.max_tokens or np.isin(ids, list(expected.stop_token_ids)).any():
        return False
    return not (_wrong_tokens(answer, expected) or _wrong_logprobs(answer))


def _problem(answer: Answer, expected: Expected, newest_version: int) -> str | None:
    size = len(answer.token_ids)
    if len(answer.logprobs) != size:
        return f"{len(answer.logprobs)} log-probabilities for {size} tokens"
    if answer.finish_reason not in FINISH_REASONS:
        return f"finish reason {answer.finish_reason!r}, expected one of {FINISH_REASONS}"
    if answer.finish_reason == "abort":
        return None  # never trained on
    return (
        _wrong_length(answer, expected)
        or _wrong_tokens(answer, expected)
        or _wrong_logprobs(answer)
        or _wrong_versions(answer.versions, size, expected.oldest_version, newest_version)
        or _wrong_routes(answer, expected)
    )


def _wrong_length(answer: Answer, expected: Expected) -> str | None:
    size = len(answer.token_ids)
    if not 1 <= size <= expected.max_tokens:
        return f"{size} tokens, expected 1 to {expected.max_tokens}"
    if answer.finish_reason == "length" and size < expected.max_tokens:
        return f"cut after {size} tokens, expected max_tokens={expected.max_tokens}"
    return None


def _wrong_tokens(answer: Answer, expected: Expected) -> str | None:
    ids, stops = answer.token_ids, expected.stop_token_ids
    if ids.min() < 0 or (expected.vocab_size and ids.max() >= expected.vocab_size):
        return f"token ids from {ids.min()} to {ids.max()}, expected 0 to {expected.vocab_size - 1}"
    if answer.finish_reason == "stop" and stops and int(ids[-1]) not in stops:
        return f"it stopped at token {ids[-1]}, which is none of the end tokens {sorted(stops)}"
    return None


def _wrong_logprobs(answer: Answer) -> str | None:
    values = answer.logprobs
    if values.min() > NOT_A_LOGPROB and values.max() <= MAX_LOGPROB:  # neither holds of NaN
        return None
    at = int((~((values > NOT_A_LOGPROB) & (values <= MAX_LOGPROB))).argmax())
    return (
        f"log-probability {values[at]} of token {answer.token_ids[at]} at position {at} (JSON has -9999 for NaN and -inf): "
        "check the weights of the last update for NaN"
    )


def _wrong_versions(spans: Sequence[VersionSpan], size: int, oldest: int, newest: int) -> str | None:
    edges = [0, *(span.end for span in spans)]
    if edges[-1] != size or [span.start for span in spans] != edges[:-1]:
        return f"weight versions {_shown(spans)} do not cover its {size} tokens"
    versions = [span.version for span in spans]
    if versions != sorted(versions) or versions[0] < oldest or versions[-1] > newest:
        return f"weight versions {_shown(spans)}, expected {oldest} to {newest}: the server missed an update"
    return None


def _wrong_routes(answer: Answer, expected: Expected) -> str | None:
    mixture, routes = expected.mixture, answer.routes
    if mixture is None:
        return None
    if routes is None:
        return "no routes of its tokens came with it: its server needs our plugin and --enable-return-routed-experts"
    # The last token predicts nothing: it went nowhere.
    shape = (expected.prompt_tokens + len(answer.token_ids) - 1, mixture.layers, mixture.top_k)
    if routes.shape != shape or routes.dtype.name != mixture.dtype:
        return f"routes {list(routes.shape)} {routes.dtype}, expected {list(shape)} {mixture.dtype}"
    if routes.size and routes.max() >= mixture.experts:
        return f"a token went to expert {routes.max()}, expected 0 to {mixture.experts - 1}"
    return None


def _shown(spans: Sequence[VersionSpan]) -> list[tuple[int, int, int]]:
    return [(span.version, span.start, span.end) for span in spans]


def from_json(body: Any, expected: Expected, assumed_version: int | None) -> Answer:
    """The answer of vLLM's own route; raises UnusableAnswerError for anything of another shape.

    `assumed_version` stands where the server reports none (vLLM before weight versions); None = that is an error.
    """
    try:
        (choice,) = body["choices"]
        token_ids = [_whole(token) for token in choice["token_ids"]]
        content = (choice["logprobs"] or {}).get("content") or []
        scored = [token for entry in content if (token := _scored(entry)) is not None]
        values = [math.nan if entry["logprob"] is None else _number(entry["logprob"]) for entry in content]
        spans = choice.get("weight_versions")
        if not spans and assumed_version is not None:
            spans = [{"version": assumed_version, "start": 0, "end": len(token_ids)}]
        versions = tuple(VersionSpan(int(s["version"]), _whole(s["start"]), _whole(s["end"])) for s in spans or ())
        answer = Answer(
            np.array(token_ids, np.int32),
            np.array(values, np.float32),
            choice.get("finish_reason") or "abort",
            versions,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnusableAnswerError(
            f"sample of prompt {expected.uid}: no answer of vLLM's generate route: {type(error).__name__}: {error}"
        ) from error
    if len(answer.logprobs) != len(answer.token_ids):
        raise UnusableAnswerError(
            f"sample of prompt {expected.uid}: {len(answer.logprobs)} log-probabilities for {len(answer.token_ids)} tokens"
        )
    if scored and scored != token_ids:
        raise UnusableAnswerError(f"sample of prompt {expected.uid}: the log-probabilities are of other tokens")
    return answer


def _scored(entry: dict[str, Any]) -> int | None:
    """The token that a log-probability is of, which vLLM gives as a number or by a name; None where it does not say."""
    if "token_id" in entry:
        return _whole(entry["token_id"])
    name = str(entry.get("token", ""))
    return int(name.removeprefix(TOKEN_NAME)) if name.startswith(TOKEN_NAME) else None


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is no whole number")
    return value
