"""Our route inside a vLLM server: one sample as frames of `wire`, straight from the engine's arrays of numbers.

    POST /nemo_dapo/v1/generate   {"token_ids", "sampling_params", "priority", "cache_salt"}  ->  a stream of frames

vLLM's own route answers 140 bytes of JSON a token, made on the event loop that feeds all requests. The middleware that
guards the key hands requests for this path to `generate`: that works with each vLLM from 0.20 on, where an endpoint plugin
(their `vllm.endpoint_plugins` group, newer) would need a second way for older ones.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams

from nemo_dapo.rollout import wire

log = logging.getLogger(__name__)

_HAS_INTERVAL = "stream_interval" in SamplingParams.__struct_fields__


async def generate(scope: Any, receive: Any, send: Any) -> None:
    """ASGI application of the route; `scope["app"]` is vLLM's."""
    request = Request(scope, receive)
    engine = request.app.state.engine_client
    response: Response
    try:
        prompt, params, priority = read_request(await request.json(), engine.model_config)
    except Exception as error:  # whatever vLLM raises for options out of range: the request's fault, not the server's
        response = PlainTextResponse(f"{type(error).__name__}: {error}", status_code=400)
    else:
        # When the client goes, starlette ends the generator, upon which vLLM aborts the request.
        response = StreamingResponse(frames(engine, prompt, params, priority), media_type=wire.MEDIA_TYPE)
    await response(scope, receive, send)


def read_request(body: Mapping[str, Any], model: Any) -> tuple[TokensPrompt, SamplingParams, int]:
    """The engine's arguments from a request's JSON; raises for one that the engine could not serve."""
    ids = [int(token) for token in body["token_ids"]]
    # The engine itself does not look: a prompt beyond its length kills its process, and everybody's answers with it.
    if not 0 < len(ids) < model.max_model_len or not 0 <= min(ids) <= max(ids) < model.get_vocab_size():
        raise ValueError(
            f"{len(ids)} prompt tokens; expected 1 to {model.max_model_len - 1} ids below {model.get_vocab_size()}"
        )
    prompt = TokensPrompt(prompt_token_ids=ids)
    if body.get("cache_salt"):
        prompt["cache_salt"] = str(body["cache_salt"])
    options = dict(body["sampling_params"])
    if options.setdefault("n", 1) != 1:
        raise ValueError(f"n={options['n']}; expected 1: every sample is a request of its own")
    params = SamplingParams(**options)
    params.logprobs = 0  # of the sampled token alone
    params.flat_logprobs = True  # lists of numbers in place of an object a token
    params.detokenize = False
    # Where vLLM cannot gather tokens, a piece a token would cost its event loop more than the JSON: one piece at the end.
    params.output_kind = RequestOutputKind.DELTA if _HAS_INTERVAL else RequestOutputKind.FINAL_ONLY
    if _HAS_INTERVAL:
        params.stream_interval = min(params.stream_interval or wire.TOKENS_PER_FRAME, wire.TOKENS_PER_FRAME)
    return prompt, params, int(body.get("priority", 0))


async def frames(engine: Any, prompt: TokensPrompt, params: SamplingParams, priority: int) -> AsyncIterator[bytes]:
    """The frames of one sample; an error of the engine is the last of them, since the status line is long gone."""
    number = first = 0
    try:
        async for output in engine.generate(prompt, params, f"nemo_dapo-{uuid.uuid4().hex}", priority=priority):
            piece = output.outputs[0]
            ids, logprobs = piece.token_ids, piece.logprobs.logprobs if len(piece.token_ids) else []
            if not output.finished:
                if not len(ids):
                    continue
                yield wire.encode(wire.TOKENS, number, first, ids, logprobs)
            else:
                spans = [(int(span.version), span.start, span.end) for span in piece.weight_versions or ()]
                reason, routes = piece.finish_reason or "abort", getattr(piece, "routed_experts", None)
                for frame in wire.encode_routes(number, first, routes) if routes is not None else ():
                    yield frame
                    number += 1
                said: dict[str, Any] = {"finish_reason": reason, "versions": spans, "routes": routes}
                yield wire.encode_final(number, first, ids, logprobs, **said)
            number, first = number + 1, first + len(ids)
    except ValueError as error:  # the request's own fault: a prompt that is too long, an option out of range
        yield wire.encode_failed(number, first, f"refused: {error}")
    except Exception as error:
        log.exception("generation failed")
        yield wire.encode_failed(number, first, f"failed: {type(error).__name__}: {error}")
