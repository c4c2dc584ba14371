"""Requests, their answers and what is done about servers that are sick, against stand-ins on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import torch

from nemo_dapo.config import PartialAnswers, RolloutConfig
from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout import calls as calls_module
from nemo_dapo.rollout import client, control, wire
from nemo_dapo.rollout import fleet as fleet_module
from nemo_dapo.rollout import requests as requests_module
from nemo_dapo.rollout.answers import Mixture
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.rollout.fleet import MAX_FAULTS, MAX_RESTARTS, Fleet, LostServerError, SickError
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.progress import Progress
from nemo_dapo.rollout.received import Received
from nemo_dapo.rollout.requests import MAX_LATE, MAX_LOST, MAX_TRIES
from nemo_dapo.rollout.weights import verify
from nemo_dapo.rollout.weights.ledger import Ledger
from nemo_dapo.rollout.weights.plan import Outcome, Sent, Target
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.types import Prompt, Sample, SamplingParams, Verdict, VersionSpan
from tests import stand_in_server as stand
from tests.fakes import FakeLoader
from tests.stand_in_server import StandIn, StandInServers, wait_for

PROMPT = Prompt(uid="p-17", token_ids=(5, 6), problem="", ground_truth="")
PARAMS = SamplingParams(max_tokens=4)
VOCABULARY = 9


class Tokenizer:
    """What the engine needs of a tokenizer."""

    eos_token_id = 1


def spelled(sample: Sample) -> str:
    return "".join(chr(96 + i) for i in sample.token_ids if i != 1)


@pytest.fixture
def start() -> Iterator[Callable[..., StandIn]]:
    """Starts stand-ins, and ends them after the test."""
    started: list[StandIn] = []

    def one(*args: Any, **kwargs: Any) -> StandIn:
        started.append(StandIn(*args, **kwargs))
        return started[-1]

    yield one
    for server in started:
        server.close()


@pytest.fixture
def engine_over() -> Iterator[Callable[..., VLLMEngine]]:
    """Builds engines over stand-ins, with a store of one small weight, and closes them after the test."""
    engines: list[VLLMEngine] = []

    def build(servers: StandInServers, mixture: Mixture | None = None, **options: Any) -> VLLMEngine:
        config = RolloutConfig(max_prompt_length=4, max_response_length=4, **options)
        ledger, sender = Ledger(servers.places, "float32"), Sender(lambda: ExpectedWeights({"w": (2,)}))
        sizes = [1], VOCABULARY, mixture
        engines.append(VLLMEngine(config, servers, ledger, sender, *sizes))  # type: ignore[arg-type]
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def closed_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def generate(engine: VLLMEngine, n: int = 1, groups: int = 1) -> list[list[Sample]]:
    async def many() -> list[list[Sample]]:
        return await asyncio.gather(*(engine.generate(PROMPT, n, PARAMS) for _ in range(groups)))

    return asyncio.run(many())


# -------------------------------------------------------------------- requests and answers


def test_every_sample_is_a_request_of_its_own_without_a_seed_and_earlier_groups_come_first(start, engine_over):
    server = start()
    engine = engine_over(StandInServers(server.url))
    for _ in range(2):
        (samples,) = generate(engine, n=3)
        assert [spelled(s) for s in samples] == ["bc"] * 3
    assert server.requests == 6
    assert [body["priority"] for body in server.bodies] == [0, 0, 0, 1, 1, 1]
    for body in server.bodies:
        assert body["sampling_params"]["n"] == 1
        assert body["sampling_params"]["stop_token_ids"] == [1]
        assert "seed" not in json.dumps(body)


def test_both_routes_give_the_same_sample(start, engine_over):
    answers = []
    for has_frames in (True, False):
        server = start()
        server.has_frames = has_frames
        engine = engine_over(StandInServers(server.url))
        engine.upkeep.prepare(0)
        answers.append(generate(engine))
    assert answers[0] == answers[1]


def test_a_server_without_our_route_is_asked_by_json_aloud(start, engine_over, caplog):
    server = start()
    server.has_frames = False
    engine = engine_over(StandInServers(server.url))
    engine.upkeep.prepare(0)
    assert generate(engine)
    assert "140 bytes a token instead of 8" in caplog.text


def test_a_refused_request_is_not_repeated_and_not_held_against_the_server(start, engine_over):
    server = start(stand.answer(b"bad \x1b[2J temperature", 400))
    servers = StandInServers(server.url)
    with pytest.raises(RuntimeError, match=r"refused prompt p-17: HTTP 400 bad \\x1b\[2J temperature"):
        generate(engine_over(servers))
    assert server.requests == 1
    assert servers.restarts == []


def test_a_request_refused_after_the_status_line_is_not_repeated(start, engine_over):
    server = start(stand.answer(wire.encode_failed(0, 0, "refused: no such option")))
    with pytest.raises(RuntimeError, match="refused prompt p-17: refused: no such option"):
        generate(engine_over(StandInServers(server.url)))
    assert server.requests == 1


def test_proxy_variables_do_not_reach_a_server_of_our_own(start, engine_over, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert generate(engine_over(StandInServers(start().url)))


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(start, engine_over):
    server = start()
    engine = engine_over(StandInServers(server.url))
    with pytest.raises(ValueError, match=r"p-17 has 2 tokens, with max_tokens=9 that is 11, but the servers hold 8"):
        asyncio.run(engine.generate(PROMPT, 1, SamplingParams(max_tokens=9)))
    assert server.requests == 0


def test_every_declared_end_token_stops_a_response(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert client.stop_tokens(tmp_path, Tokenizer()) == [1, 8, 9]


def test_a_cancelled_request_closes_its_connection_and_gives_its_place_back(start, engine_over):
    server = start(stand.hang)
    engine = engine_over(StandInServers(server.url))

    async def cancel() -> None:
        task = asyncio.create_task(engine.generate(PROMPT, 2, PARAMS))
        assert await asyncio.to_thread(wait_for, lambda: server.requests == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert wait_for(lambda: engine.upkeep.fleet.members[0].load == 0)
    assert server.dropped.wait(20)


# -------------------------------------------------------------------- routes of experts

MIXTURE = Mixture(layers=3, top_k=2, experts=8)


def routes_of(rows: int) -> np.ndarray:
    """Of `rows` tokens of MIXTURE; the first ones are the same whatever their number."""
    return (np.arange(rows * 6, dtype=np.uint8) % 8).reshape(rows, 3, 2)


def told(sample: Sample) -> np.ndarray:
    """The routes that came with it."""
    assert sample.routes is not None
    return sample.routes


def test_the_routes_of_prompt_and_response_come_with_a_sample(start, engine_over):
    routes = routes_of(len(PROMPT.token_ids) + 2)
    ((one,),) = generate(engine_over(StandInServers(start(stand.answer(stand.frames(routes=routes))).url), MIXTURE))
    assert np.array_equal(told(one), routes)


def test_the_routes_of_tokens_gone_on_with_elsewhere_come_from_where_they_were_read_again(
    start, engine_over, two_frames
):
    routes = routes_of(len(PROMPT.token_ids) + 3)
    last = stand.frames([4, 1], [-0.25, -0.5], routes=routes)
    server = start(stand.answer(last), [stand.begin(FIRST, SECOND, then=stand.close)])
    server.go_on = two_frames
    ((one,),) = generate(engine_over(StandInServers(server.url), MIXTURE))
    assert one.token_ids.tolist() == [2, 3, 4, 1]
    assert np.array_equal(told(one), routes)


@pytest.mark.parametrize(
    ("routes", "complaint"),
    [
        (None, "--enable-return-routed-experts"),
        (routes_of(5), r"routes \[5, 3, 2\] uint8, expected \[4, 3, 2\] uint8"),
        (routes_of(4).astype(np.uint16), "up to 36 bytes of routes"),
        (routes_of(4) + 1, "a token went to expert 8, expected 0 to 7"),
        (routes_of(40), "up to 36 bytes of routes"),
    ],
)
def test_routes_that_cannot_be_are_held_against_their_server(routes, complaint, start, engine_over, caplog):
    sick = start(stand.answer(stand.frames(routes=routes)))
    healthy = start(stand.answer(stand.frames(routes=routes_of(len(PROMPT.token_ids) + 2))))
    engine = engine_over(StandInServers(sick.url, healthy.url), MIXTURE)
    assert {told(s).shape for group in generate(engine, n=2, groups=4) for s in group} == {(4, 3, 2)}
    assert re.search(complaint, caplog.text)


# -------------------------------------------------------------------- sick servers

GOOD = stand.frames()
SICK: dict[str, stand.Act] = {
    "hangs": stand.hang,
    "hangs in the middle": stand.hang_in_the_middle,
    "sends a byte now and then for ever": stand.trickle,
    "is always busy": stand.answer(b"busy", 503),
    "closes in the middle": stand.close_in_the_middle,
    "answers 500": stand.answer(b"oops", 500),
    "has no model any more": stand.answer(b"EngineCore encountered an issue", 500),
    "ends without a last frame": stand.answer(wire.encode(wire.TOKENS, 0, 0, [2], [-1.0])),
    "answers HTML": stand.answer(b"<html>proxy</html>"),
    "answers nothing": stand.answer(b""),
    "flips a bit": stand.answer(GOOD[:40] + bytes([GOOD[40] ^ 4]) + GOOD[41:]),
    "sends its answer twice": stand.answer(GOOD + GOOD),
    "lies about the count": stand.answer(GOOD[:16] + struct.pack("<I", 99) + GOOD[20:]),
    "goes on for ever": stand.without_end(1),
    "compresses a bomb": stand.answer(gzip.compress(b"0" * (1 << 20)), Content_Encoding="gzip"),
    "fails at generating": stand.answer(wire.encode_failed(0, 0, "failed: EngineDeadError")),
    "aborts": stand.answer(stand.frames(reason="abort")),
    "has another version": stand.answer(stand.frames(version=3)),
    "has NaN": stand.answer(stand.frames(logprobs=[-1.0, float("nan"), -1.0])),
    "names a token outside the vocabulary": stand.answer(stand.frames([2, VOCABULARY, 1])),
    "names no weight version": stand.answer(
        wire.encode_final(0, 0, [2, 1], [-1.0, -1.0], finish_reason="stop", versions=[])
    ),
    "lies about the count with a right checksum": stand.answer(
        wire.encode(
            wire.FINAL, 0, 0, [2, 1], [-1.0, -1.0], b'{"finish_reason": "stop", "versions": [[0, 0, 2]], "total": 9}'
        )
    ),
    "skips tokens": stand.answer(wire.encode(wire.TOKENS, 0, 1, [2], [-1.0]) + GOOD),
    "skips a frame": stand.answer(wire.encode(wire.TOKENS, 1, 0, [2], [-1.0]) + GOOD),
    "sends frames without tokens for ever": stand.without_end(0),
    "says that it was cut though it was not": stand.answer(stand.frames(reason="length")),
    "names a negative token": stand.answer(stand.frames([2, -1, 1])),
    "stops at a token that ends nothing": stand.answer(stand.frames([2, 3, 4])),
    "begins well and ends with garbage": stand.answer(wire.encode(wire.TOKENS, 0, 0, [2], [-1.0]) + b"<html>" * 9),
    "begins outside the vocabulary and dies": stand.begin(
        wire.encode(wire.TOKENS, 0, 0, [VOCABULARY], [-1.0]), then=stand.close
    ),
    "has no spans at all": stand.answer(
        wire.encode(wire.FINAL, 0, 0, [2, 1], [-1.0, -1.0], b'{"finish_reason": "stop"}')
    ),
}
BAD_JSON: dict[str, bytes] = {
    "cut": b'{"choices": [{"index"',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "no choices": b'{"choices": []}',
    "two choices": json.dumps({"choices": [stand.choice(), stand.choice()]}).encode(),
    "no log-probabilities": json.dumps({"choices": [stand.choice(logprobs=None)]}).encode(),
    "-9999": json.dumps({"choices": [stand.choice(logprobs={"content": [{"logprob": -9999.0}] * 3})]}).encode(),
    "a null log-probability": json.dumps(
        {"choices": [stand.choice(logprobs={"content": [{"logprob": None}] * 3})]}
    ).encode(),
    "of other tokens": json.dumps(
        {"choices": [stand.choice(logprobs={"content": [{"token_id": 7, "logprob": -1.0}] * 3})]}
    ).encode(),
    "a token that is text": json.dumps({"choices": [stand.choice() | {"token_ids": ["x", 3, 1]}]}).encode(),
    "a token that is a fraction": json.dumps({"choices": [stand.choice() | {"token_ids": [2.5, 3, 1]}]}).encode(),
    "a body without end": b" " * (1 << 18),
}


@pytest.mark.parametrize("kind", SICK)
def test_a_sick_server_beside_a_healthy_one_costs_no_sample(kind, start, engine_over, caplog):
    sick, healthy = start(SICK[kind]), start()
    sick.go_on.set()
    servers = StandInServers(sick.url, healthy.url)
    engine = engine_over(servers, progress_timeout=0.4)
    groups = generate(engine, n=2, groups=6)
    assert [[spelled(s) for s in group] for group in groups] == [["bc"] * 2] * 6
    assert sick.requests
    assert "vLLM server 0 (pid 0, server_0.log)" in caplog.text
    assert "vLLM server 1" not in caplog.text


def test_what_a_dying_server_does_to_its_samples_is_said_once(start, engine_over, caplog):
    sick, healthy = start(stand.close_in_the_middle), start()
    generate(engine_over(StandInServers(sick.url, healthy.url)), n=8, groups=6)
    said = [line for line in caplog.messages if "will be sent again" in line]
    assert sick.requests >= 8
    assert len(said) == 1


class Alternating:
    """Judges every other sample right: every group is informative."""

    async def score(self, prompt, samples):
        return [Verdict(correct=bool(i % 2)) for i in range(len(samples))]


class Numbers(FakeLoader):
    def prompt(self, i: int) -> Prompt:
        return Prompt(uid=f"p-{i}", token_ids=(5, 6), problem="", ground_truth="")


# Eight ways to be sick; those in JSON are of servers without our route.
STEP: dict[str, stand.Act] = {
    "hangs": stand.hang,
    "hangs in the middle": stand.hang_in_the_middle,
    "always 503": stand.answer(b"busy", 503),
    "closes in the middle": stand.close_in_the_middle,
    "truncated JSON": stand.answer(BAD_JSON["cut"]),
    "log-probability -9999": stand.answer(BAD_JSON["-9999"]),
    "no choices": stand.answer(BAD_JSON["no choices"]),
    "one 500": stand.answer(b"Internal Server Error", 500),
}


@pytest.mark.parametrize("kind", STEP)
def test_a_step_collects_its_groups_beside_a_sick_server(kind, start, engine_over):
    once = kind == "one 500"
    sick = start(stand.good if once else STEP[kind], [STEP[kind]] if once else None)
    healthy = start()
    sick.has_frames = healthy.has_frames = kind not in ("truncated JSON", "log-probability -9999", "no choices")
    engine = engine_over(StandInServers(sick.url, healthy.url), progress_timeout=0.4)
    for index in range(2):
        engine.upkeep.prepare(index)
    sampler = GroupSampler(engine, Alternating(), Numbers(), group_size=2, params=PARAMS, timeout=60.0)
    collected = asyncio.run(sampler.collect(20))
    assert len({group.prompt.uid for group in collected.groups}) == 20
    assert sick.requests


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_is_no_answer_beside_a_healthy_server_costs_no_sample(kind, start, engine_over):
    sick, healthy = start(stand.answer(BAD_JSON[kind])), start()
    sick.has_frames = healthy.has_frames = False
    engine = engine_over(StandInServers(sick.url, healthy.url))
    for index in range(2):
        engine.upkeep.prepare(index)
    groups = generate(engine, groups=4)
    assert [[spelled(s) for s in group] for group in groups] == [["bc"]] * 4
    assert sick.requests


def test_every_damaged_byte_of_an_answer_is_noticed_and_the_sample_asked_for_again(start, engine_over, monkeypatch):
    """Each byte of an answer of two frames in turn, changed in any way."""
    monkeypatch.setattr(fleet_module, "MAX_FAULTS", 1 << 30)
    whole = wire.encode(wire.TOKENS, 0, 0, [2], [-1.0]) + wire.encode_final(
        1, 1, [3, 1], [-1.5, -0.5], finish_reason="stop", versions=[[0, 0, 3]]
    )
    change = np.random.default_rng(0).integers(1, 256, len(whole))
    damaged = [whole[:i] + bytes([whole[i] ^ int(change[i])]) + whole[i + 1 :] for i in range(len(whole))]
    server = start(stand.answer(whole), [stand.answer(body) for body in damaged])
    engine = engine_over(StandInServers(server.url), max_concurrent_sequences=len(damaged))
    groups = generate(engine, groups=len(damaged))
    assert {(s.token_ids.tobytes(), s.logprobs.tobytes()) for (s,) in groups} == {
        (np.array([2, 3, 1], np.int32).tobytes(), np.array([-1.0, -1.5, -0.5], np.float32).tobytes())
    }
    assert server.requests == 2 * len(damaged)


# -------------------------------------------------------------------- servers that die in the middle

FIRST, SECOND = wire.encode(wire.TOKENS, 0, 0, [2], [-1.0]), wire.encode(wire.TOKENS, 1, 1, [3], [-1.5])
FAILED = wire.encode_failed(2, 2, "failed: EngineDeadError")


def rest(version: int) -> stand.Act:
    """What follows the tokens 2 and 3."""
    return stand.answer(stand.frames([4, 1], [-0.25, -0.5], version=version))


@pytest.fixture
def two_frames(monkeypatch) -> threading.Event:
    """Set once the engine has read two frames of a sample."""
    arrived, add = threading.Event(), Progress.add

    def noting(self: Progress, token_ids: wire.Ids, logprobs: wire.Logprobs, newest: int) -> None:
        add(self, token_ids, logprobs, newest)
        if self.received.size == 2:
            arrived.set()

    monkeypatch.setattr(Progress, "add", noting)
    return arrived


@pytest.mark.parametrize("end", [stand.close, lambda handler: handler.wfile.write(FAILED), stand.hang])
def test_what_a_dying_server_had_sent_is_gone_on_with_elsewhere_exactly_once(end, start, engine_over, two_frames):
    server = start(rest(0), [stand.begin(FIRST, SECOND, then=end)])
    server.go_on = two_frames
    engine = engine_over(StandInServers(server.url), progress_timeout=0.4)
    ((one,),) = generate(engine)
    assert one.token_ids.tolist() == [2, 3, 4, 1]
    assert one.logprobs.tolist() == [-1.0, -1.5, -0.25, -0.5]
    assert one.versions == (VersionSpan(0, 0, 4),)
    whole, further = server.bodies
    assert (further["token_ids"], further["sampling_params"]["max_tokens"]) == ([*PROMPT.token_ids, 2, 3], 2)
    assert whole == further | {
        "token_ids": list(PROMPT.token_ids),
        "sampling_params": further["sampling_params"] | {"max_tokens": 4},
    }
    metrics = engine.metrics()
    assert (metrics["server/tokens_gone_on_with"], metrics["server/tokens_thrown_away"]) == (2, 0)
    assert engine.metrics()["server/tokens_gone_on_with"] == 0


@pytest.mark.parametrize(
    "end", [lambda handler: handler.wfile.write(b"<html>" * 9), lambda handler: handler.wfile.write(SECOND)]
)
def test_nothing_is_kept_of_a_server_that_answers_nonsense(end, start, engine_over, two_frames):
    server = start(stand.good, [stand.begin(FIRST, SECOND, then=end)])
    server.go_on = two_frames
    engine = engine_over(StandInServers(server.url))
    assert spelled(generate(engine)[0][0]) == "bc"
    assert server.bodies[0] == server.bodies[1]
    assert engine.metrics()["server/tokens_thrown_away"] == 2


def test_with_discard_what_a_dying_server_had_sent_is_thrown_away_and_counted(start, engine_over, two_frames):
    server = start(stand.good, [stand.begin(FIRST, SECOND, then=stand.close)])
    server.go_on = two_frames
    engine = engine_over(StandInServers(server.url), partial_answers=PartialAnswers.discard)
    assert spelled(generate(engine)[0][0]) == "bc"
    assert server.bodies[0] == server.bodies[1]
    metrics = engine.metrics()
    assert (metrics["server/tokens_gone_on_with"], metrics["server/tokens_thrown_away"]) == (0, 2)


def test_tokens_of_older_weights_are_not_gone_on_with(start, engine_over, two_frames):
    server = start(stand.answer(stand.frames(version=1)), [stand.begin(FIRST, SECOND, then=stand.close)])
    engine = engine_over(StandInServers(server.url))

    async def scenario() -> list[Sample]:
        task = asyncio.create_task(engine.generate(PROMPT, 1, PARAMS))
        assert await asyncio.to_thread(two_frames.wait, 20)
        await asyncio.to_thread(engine.update_weights, WEIGHTS, 1)
        server.go_on.set()
        return await task

    (one,) = asyncio.run(scenario())
    assert one.versions == (VersionSpan(1, 0, 3),)
    assert server.bodies[1] == server.bodies[0] | {"cache_salt": "1"}  # no prefix is shared with the version before
    assert engine.metrics()["server/tokens_thrown_away"] == 2


def test_a_hung_server_that_a_restart_cures_gets_its_requests_back(start, engine_over, caplog):
    server = start(stand.hang)
    servers = StandInServers(server.url)
    servers.cures[0] = lambda: setattr(server, "otherwise", stand.good)
    groups = generate(engine_over(servers, progress_timeout=0.4), n=2, groups=2)
    assert [len(group) for group in groups] == [2, 2]
    assert servers.restarts == [0]
    said = r"restarting vLLM server 0 .*, try 1 of 3 .*\(up for \d s, 4 samples open, 0 finished in this run\): "
    hangs = r"no token of its 4 open samples for \d s, expected within rollout.progress_timeout=0.4 s"
    assert re.search(said + hangs, caplog.text)


def test_a_slow_server_whose_counters_move_is_left_alone(start, engine_over):
    """Nothing comes of its requests for three times the limit, but it says that it generates."""
    server = start(stand.hang)
    counted = iter(range(10**9))
    type_ = type(server)
    server.__class__ = type(
        "Counting", (type_,), {"metrics": property(lambda _: metrics(next(counted)), lambda *_: None)}
    )
    servers = StandInServers(server.url)
    engine = engine_over(servers, progress_timeout=0.4)

    async def wait() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.generate(PROMPT, 1, PARAMS), 1.5)

    asyncio.run(wait())
    assert servers.restarts == []


def metrics(tokens: int) -> str:
    return f'vllm:generation_tokens_total{{engine="0"}} {tokens}.0\n'


@pytest.mark.parametrize("said", [b"<html>proxy\x1b</html>", b"<html>proxy\x1b</html>" * 9])
def test_the_only_server_garbling_for_ever_ends_the_run_with_its_name_and_words(said, start, engine_over, monkeypatch):
    monkeypatch.setattr(requests_module, "MAX_BACKOFF_SECONDS", 0.2)
    server = start(stand.answer(said))
    with pytest.raises(RuntimeError, match=r"vLLM server 0 \(pid 0, server_0.log\).*b'<html>"):
        generate(engine_over(StandInServers(server.url)))
    assert server.requests <= MAX_TRIES


def test_a_late_sample_is_sent_again_a_few_times_and_then_named(start, engine_over):
    server = start(stand.hang)
    servers = StandInServers(server.url)
    late = r"server 0 .*prompt p-17 within rollout.request_timeout=0 s, 0 of at most 4 tokens came, 3 times; raise"
    with pytest.raises(TimeoutError, match=late):
        generate(engine_over(servers, request_timeout=0.2))
    assert server.requests == MAX_LATE + 1
    assert servers.restarts == [0] * MAX_LATE


def test_a_dead_server_is_restarted_once_and_its_requests_are_sent_again(start, engine_over):
    alive = start()
    servers = StandInServers(closed_url())
    servers.dead = {0}
    servers.cures[0] = lambda: setattr(servers.servers[0], "url", alive.url)
    engine = engine_over(servers)
    assert [len(group) for group in generate(engine, n=2, groups=5)] == [2] * 5
    assert engine.restarts == 1


def test_a_server_that_stays_dead_is_given_up_while_another_serves(start, engine_over, caplog):
    servers = StandInServers(closed_url(), start().url)
    servers.dead = {0}
    engine = engine_over(servers)
    assert [len(group) for group in generate(engine, n=2, groups=6)] == [2] * 6
    assert servers.restarts == [0] * MAX_RESTARTS
    assert re.findall(
        r"restarting .*, try (\d) of 3 before it is given up \((up for|the start before failed after) \d s", caplog.text
    ) == [("1", "up for"), ("2", "the start before failed after"), ("3", "the start before failed after")]
    assert "given up, the run goes on with 1 other(s), rollout.min_servers=1; a resume starts it again" in caplog.text
    assert len(generate(engine)) == 1  # nobody asks it any more
    assert servers.restarts == [0] * MAX_RESTARTS


def test_the_last_server_that_stays_dead_ends_the_run(engine_over):
    servers = StandInServers(closed_url())
    servers.dead = {0}
    with pytest.raises(RuntimeError, match=rf"sick after {MAX_RESTARTS} restart.*ended with exit code 1"):
        generate(engine_over(servers), n=2, groups=2)


def test_a_server_is_not_restarted_with_weights_that_are_gone(engine_over):
    servers = StandInServers(closed_url())
    servers.dead = {0}
    engine = engine_over(servers)
    engine.begin_update(1)
    with pytest.raises(ValueError, match="1 missing: w"):
        engine.finish_update([Sent(refusal="1 missing: w")])
    with pytest.raises(RuntimeError, match="the last update failed, so there are no weights"):
        generate(engine)
    assert servers.restarts == []


def test_the_only_server_that_dies_while_it_samples_ends_the_run_with_what_would_have_kept_its_weights(
    start, engine_over
):
    server = start()
    server.otherwise = current
    servers = StandInServers(server.url)
    engine = engine_over(servers)
    engine.upkeep.target = lambda index: Target("vLLM server 0", server.url, ("GPU-0",))
    engine.begin_update(1)
    engine.finish_update([Sent((Outcome("vLLM server 0", "digest"),))])
    assert not engine.must_repeat
    assert len(generate(engine)) == 1
    servers.dead, server.otherwise = {0}, stand.close
    with pytest.raises(RuntimeError, match=r"is sick .* until the next update, .*rollout.transport=host keeps a copy"):
        generate(engine)
    assert servers.restarts == []


# -------------------------------------------------------------------- updates of sick servers

WEIGHTS = [("w", torch.ones(2))]


def current(handler: stand.Handler) -> None:
    """A good answer under the weights that the server was given last."""
    stand.say(handler, stand.frames(version=int(handler.server.version)))


@pytest.mark.parametrize(
    "sick",
    [
        stand.answer(b"EngineCore encountered an issue", 500),
        stand.answer(b"oops", 500),
        stand.hang,
        stand.trickle,
        stand.close_in_the_middle,
    ],
)
@pytest.mark.parametrize("route", ["/pause", "/update_weights", "/weight_info"])
def test_a_server_that_fails_at_an_update_is_restarted_and_gets_it_again(sick, route, start, engine_over, caplog):
    server, other = start(), start()
    server.sick_calls[route] = [sick]
    servers = StandInServers(server.url, other.url)
    engine = engine_over(servers, sync_timeout=1.0)
    servers.cures[0] = lambda: setattr(engine.config, "sync_timeout", 60.0)  # a busy machine may take its time
    engine.update_weights(WEIGHTS, 5)
    assert other.version == "5"
    assert wait_for(lambda: servers.restarts == [0])
    assert wait_for(lambda: server.version == "5")
    assert "restarting vLLM server 0 (pid 0, server_0.log)" in caplog.text
    if sick in (stand.hang, stand.trickle):
        assert re.search(
            rf"vLLM server 0 .*: it did not .* within rollout.(sync|progress)_timeout=1 s \({route} of ", caplog.text
        )


@pytest.mark.parametrize("route", ["/pause", verify.ROUTE])
def test_a_server_that_stands_still_before_an_update_does_not_hold_it_up_for_as_long_as_weights_may_take(
    route, start, engine_over, caplog
):
    """With that limit, an hour, this test would not end."""
    server, other = start(), start()
    server.sick_calls[route] = [stand.hang]
    servers = StandInServers(server.url, other.url)
    engine = engine_over(servers, sync_timeout=3600.0, progress_timeout=1.0)
    engine.update_weights(WEIGHTS, 5)
    assert other.version == "5"
    assert "within rollout.progress_timeout=1 s" in caplog.text


def stop_listening(handler: stand.Handler) -> None:
    """As vLLM's API server does when its engine is gone while a call still waits for it."""
    handler.server.socket.close()
    stand.hang(handler)


@pytest.mark.parametrize("route", ["/pause", "/update_weights", "/sleep", "/init_weight_transfer_engine"])
@pytest.mark.parametrize(
    ("sick", "health", "said"),
    [
        (stand.hang, stand.answer(b"", 503), r"its engine process is gone \(/health answers 503\)"),
        (stop_listening, stand.good, "it refused 3 connections in a row"),
    ],
)
def test_a_call_that_a_dead_engine_never_answers_is_not_waited_for(
    route, sick, health, said, start, engine_over, caplog, monkeypatch
):
    """With limits of an hour, this test would not end else."""
    monkeypatch.setattr(calls_module, "PULSE_SECONDS", 0.02)
    server, fresh = start(), start()
    server.sick_calls = {route: [sick], "/health": [health] * 9}
    servers = StandInServers(server.url)
    servers.cures[0] = lambda: setattr(servers.servers[0], "url", fresh.url)
    engine = engine_over(servers, sync_timeout=3600.0, vllm={"enable_sleep_mode": True})
    if route == "/init_weight_transfer_engine":
        with pytest.raises(ConnectionError, match=said):
            engine.upkeep.prepare(0)
        return
    engine.sleep()
    engine.wake_weights()
    engine.update_weights(WEIGHTS, 5)
    engine.wake_up()
    assert (servers.restarts, fresh.version) == ([0], "5")
    assert re.search(said, caplog.text)


def test_a_server_whose_process_ends_during_a_call_is_not_waited_for(start, engine_over, caplog, monkeypatch):
    monkeypatch.setattr(calls_module, "PULSE_SECONDS", 0.02)
    server = start()
    servers = StandInServers(server.url)
    servers.cures[0] = lambda: None

    def die(handler: stand.Handler) -> None:
        servers.dead = {0}
        stand.hang(handler)

    server.sick_calls["/update_weights"] = [die]
    engine = engine_over(servers, sync_timeout=3600.0, progress_timeout=3600.0)
    engine.update_weights(WEIGHTS, 5)
    assert (servers.restarts, server.version) == ([0], "5")
    assert "vLLM server 0 ended" in caplog.text


def test_a_slow_call_of_a_server_that_is_well_is_waited_for(start, engine_over, monkeypatch):
    monkeypatch.setattr(calls_module, "PULSE_SECONDS", 0.02)
    server = start()
    looks = [stand.answer(b"", 500), stand.close_in_the_middle, stand.answer(b"")]

    def be_slow(handler: stand.Handler) -> None:
        assert wait_for(lambda: not server.sick_calls["/health"])  # for as long as three looks at it
        stand.say(handler, b"{}")

    server.sick_calls = {"/update_weights": [be_slow], "/health": looks}
    servers = StandInServers(server.url)
    engine_over(servers).update_weights(WEIGHTS, 5)
    assert (servers.restarts, server.version) == ([], "5")


def test_no_answer_of_the_old_weights_is_refused_or_called_new_while_servers_pause(start, engine_over):
    """Requests that are sent until the last server has paused are answered under the weights that they expect."""
    first, last = start(current), start(current)
    engine = engine_over(StandInServers(first.url, last.url))
    seen: list[tuple[VersionSpan, ...]] = []

    def ask_before_pausing(handler: stand.Handler) -> None:
        assert wait_for(lambda: "/pause" in first.calls)
        for _ in range(2):  # one on each server
            seen.extend(one.versions for one in generate(engine)[0])
        stand.say(handler, b"{}")

    def see_version(handler: stand.Handler) -> None:
        assert engine.version == 5
        stand.say(handler, b"{}")

    last.sick_calls = {"/pause": [ask_before_pausing], "/update_weights": [see_version]}
    engine.update_weights(WEIGHTS, 5)
    assert seen == [(VersionSpan(0, 0, 3),)] * 2
    assert (first.requests + last.requests, engine.restarts) == (2, 0)
    assert generate(engine)[0][0].versions == (VersionSpan(5, 0, 3),)


def test_weights_that_even_a_fresh_server_refuses_end_the_run_after_one_restart(start, engine_over):
    server = start()
    server.sick_calls["/update_weights"] = [stand.answer(b"size mismatch of w", 500)] * 9
    servers = StandInServers(server.url)
    with pytest.raises(RuntimeError, match=r"server 0 .*a fresh server refuses the weights: .*size mismatch of w"):
        engine_over(servers).update_weights(WEIGHTS, 5)
    assert servers.restarts == [0]


def test_damaged_weights_are_found_before_a_server_pauses(start, engine_over):
    server = start()
    server.sick_calls[verify.ROUTE] = [stand.answer(b"parameter w has other bytes than were sent", 422)]
    engine = engine_over(StandInServers(server.url))
    expected = r"no serving node received the weights of version 5: here: parameter w has other bytes than were sent"
    with pytest.raises(RuntimeError, match=expected):
        engine.update_weights(WEIGHTS, 5)
    assert server.calls == [verify.ROUTE]
    assert (engine.version, engine.restarts) == (0, 0)


def test_weights_that_change_between_the_look_and_the_load_are_not_loaded_again_and_the_next_ones_are(
    start, engine_over, caplog
):
    first, last = start(current), start(current)
    damaged = stand.answer(b"parameter w has other bytes than were sent", 422)
    first.sick_calls = {verify.ROUTE: [stand.answer(b""), damaged], "/update_weights": [stand.answer(b"", 500)]}
    engine = engine_over(StandInServers(first.url, last.url))
    engine.update_weights(WEIGHTS, 5)
    states = lambda: [engine.upkeep.fleet.state(member) for member in engine.upkeep.fleet.members]  # noqa: E731
    assert wait_for(lambda: states() == ["stale", "serving"])
    assert first.calls.count("/update_weights") == 1
    assert "serves again after the next weight update: parameter w has other bytes than were sent" in caplog.text
    assert {span.version for (one,) in generate(engine, groups=4) for span in one.versions} == {5}
    engine.update_weights(WEIGHTS, 6)
    assert {span.version for (one,) in generate(engine, groups=4) for span in one.versions} == {6}
    assert (first.version, last.version, engine.restarts) == ("6", "6", 1)


def test_a_run_ends_where_the_only_weights_that_there_are_were_changed(start, engine_over):
    server = start()
    damaged = stand.answer(b"parameter w has other bytes than were sent", 422)
    server.sick_calls = {verify.ROUTE: [stand.answer(b""), damaged], "/update_weights": [stand.answer(b"", 500)]}
    with pytest.raises(SickError, match=r"server 0 .*there are no weights for a server of node here"):
        engine_over(StandInServers(server.url)).update_weights(WEIGHTS, 5)
    assert server.calls.count("/update_weights") == 1


def test_a_server_that_cannot_look_is_restarted_and_one_of_an_older_plugin_loads_without(start, engine_over):
    for answer, restarts in ((stand.answer(b"", 404), []), (stand.answer(b"", 500), [0])):
        server = start()
        server.sick_calls[verify.ROUTE] = [answer]
        servers = StandInServers(server.url)
        engine = engine_over(servers)
        engine.update_weights(WEIGHTS, 5)
        assert (server.version, servers.restarts) == ("5", restarts)


def test_servers_lose_their_weights_in_sleep_and_resume_only_with_new_ones_and_their_cache(start, engine_over):
    server = start()
    engine = engine_over(StandInServers(server.url), vllm={"enable_sleep_mode": True})
    for version in (1, 2):
        engine.sleep()
        engine.sleep()
        engine.wake_weights()
        engine.update_weights(WEIGHTS, version)
        engine.wake_up()
        engine.wake_up()
    about = [call for call in server.asked if call.startswith(("/sleep", "/wake_up", "/update_weights", "/resume"))]
    once = ["/sleep?level=2", "/wake_up?tags=weights", "/update_weights", "/wake_up?tags=kv_cache", "/resume"]
    assert about == 2 * once


@pytest.mark.parametrize("route", ["/sleep", "/wake_up", "/update_weights", "/resume"])
def test_a_server_that_fails_while_the_trainer_is_on_its_device_is_restarted_once_it_has_left(
    route, start, engine_over, caplog
):
    sick, well = start(current), start(current)
    sick.sick_calls[route] = [stand.answer(b"EngineCore encountered an issue", 500)]
    servers = StandInServers(sick.url, well.url)
    engine = engine_over(servers, vllm={"enable_sleep_mode": True})
    engine.sleep()
    assert servers.ended == ([0] if route == "/sleep" else [])
    engine.wake_weights()
    engine.update_weights(WEIGHTS, 1)
    assert servers.restarts == []
    engine.wake_up()
    assert well.version == "1"
    assert wait_for(lambda: servers.restarts == [0])
    assert wait_for(lambda: sick.version == "1")
    assert "restarted when the" in caplog.text
    assert generate(engine)


def test_falling_asleep_waits_for_a_restart_under_way(start, engine_over):
    """A fresh server is awake: it would take the device while the trainer is on it."""
    server = start()
    servers = StandInServers(server.url)
    engine = engine_over(servers, progress_timeout=0.4, vllm={"enable_sleep_mode": True})
    ready = threading.Event()
    servers.cures[0] = lambda: ready.wait(20)
    servers.dead = {0}
    assert wait_for(lambda: servers.restarts == [0])
    sleeping = threading.Thread(target=engine.sleep)
    sleeping.start()
    sleeping.join(0.3)
    assert sleeping.is_alive()
    assert "/sleep" not in server.calls
    ready.set()
    sleeping.join(20)
    assert server.calls[-1] == "/sleep"


def test_an_answer_under_older_weights_than_the_request_s_is_not_trained_on(start, engine_over):
    stale, current = start(stand.answer(stand.frames(version=6))), start(stand.answer(stand.frames(version=7)))
    engine = engine_over(StandInServers(stale.url, current.url))
    engine.update_weights(WEIGHTS, 7)
    versions = {span.version for group in generate(engine, groups=4) for s in group for span in s.versions}
    assert versions == {7}
    assert stale.requests


def test_an_update_does_not_wait_for_a_restart_under_way_which_ends_with_the_new_weights(start, engine_over):
    sick, well = start(current), start(current)
    servers = StandInServers(sick.url, well.url)
    engine = engine_over(servers, progress_timeout=0.4)
    engine.update_weights(WEIGHTS, 1)
    ready = threading.Event()
    servers.cures[0] = lambda: ready.wait(20)
    servers.dead = {0}
    assert generate(engine, n=2, groups=4)
    assert wait_for(lambda: servers.restarts == [0])
    engine.update_weights(WEIGHTS, 2)
    assert (sick.version, well.version) == ("1", "2")
    assert len(generate(engine)) == 1  # with the server that is up
    ready.set()
    assert wait_for(lambda: sick.version == "2")
    assert wait_for(lambda: not engine.upkeep.fleet.members[0].is_down)
    assert not engine.upkeep.fleet.members[0].given_up


@pytest.mark.parametrize("others", [0, 1])
def test_an_update_waits_for_the_restart_of_a_server_that_died_under_it_only_where_nobody_else_serves(
    others, start, engine_over
):
    all_of_them = [start(current) for _ in range(1 + others)]
    servers = StandInServers(*(server.url for server in all_of_them))
    engine = engine_over(servers)
    ready = threading.Event()
    servers.cures[0] = lambda: ready.wait(20)
    servers.dead = {0}  # nobody asks it for anything: the update is the first to notice
    update = threading.Thread(target=engine.update_weights, args=(WEIGHTS, 1))
    update.start()
    assert wait_for(lambda: servers.restarts == [0])
    update.join(20 if others else 0.5)
    assert update.is_alive() == (not others)
    if others:
        assert len(generate(engine, n=2)[0]) == 2
    ready.set()
    update.join(20)
    assert wait_for(lambda: all_of_them[0].version == "1")


def test_an_update_does_not_wait_for_the_restart_of_a_server_that_dies_with_open_requests_while_others_are_paused(
    start, engine_over
):
    dying, well = start(stand.begin(then=stand.close)), start(current)
    servers = StandInServers(dying.url, well.url)
    engine = engine_over(servers, max_staleness=1)
    ready, member = threading.Event(), engine.upkeep.fleet.members[0]
    servers.cures[0] = lambda: ready.wait(60)

    def die_first(handler: stand.Handler) -> None:
        servers.dead = {0}
        dying.go_on.set()
        assert wait_for(lambda: member.is_down)
        stand.say(handler, b"{}")

    well.sick_calls["/pause"] = [die_first]

    async def scenario() -> Sample:
        task = asyncio.create_task(engine.generate(PROMPT, 1, PARAMS))
        assert await asyncio.to_thread(wait_for, lambda: dying.requests == 1)
        await asyncio.wait_for(asyncio.to_thread(engine.update_weights, WEIGHTS, 1), 10)
        (sample,) = await asyncio.wait_for(task, 10)
        return sample

    try:
        assert asyncio.run(scenario()).versions == (VersionSpan(1, 0, 3),)
        assert wait_for(lambda: servers.restarts == [0])
        assert dying.version == "0"
    finally:
        ready.set()
    assert wait_for(lambda: dying.version == "1" and not member.is_down)
    assert (member.is_stale, member.given_up) == (False, "")


def test_an_update_reaches_a_server_whose_restart_ended_with_the_weights_before(start, engine_over):
    server = start(current)
    servers = StandInServers(server.url)
    engine = engine_over(servers, progress_timeout=0.4)
    for version in range(1, 6):
        servers.cures[0] = lambda: None
        servers.dead = {0}
        assert wait_for(lambda: len(servers.restarts) == version)  # noqa: B023
        engine.update_weights(WEIGHTS, version)  # at whatever point of the restart
        assert generate(engine)
        assert server.version == str(version)


def test_what_a_server_has_open_whose_node_got_no_weights_goes_elsewhere_at_once(start, engine_over):
    frozen, well = start(stand.hang), start(current)
    servers = StandInServers(frozen.url, well.url)
    servers.servers[0].node = "there"  # nobody sends anything to it
    engine = engine_over(servers, max_staleness=1)

    async def scenario() -> Sample:
        task = asyncio.create_task(engine.generate(PROMPT, 1, PARAMS))
        assert await asyncio.to_thread(wait_for, lambda: frozen.requests == 1)
        await asyncio.to_thread(engine.update_weights, WEIGHTS, 1)
        (sample,) = await asyncio.wait_for(task, 20)  # rollout.progress_timeout is 300 s
        return sample

    assert asyncio.run(scenario()).versions == (VersionSpan(1, 0, 3),)
    assert frozen.dropped.wait(20)
    assert (frozen.requests, frozen.calls[-1], engine.restarts) == (1, "/pause", 0)
    assert [engine.upkeep.fleet.state(member) for member in engine.upkeep.fleet.members] == ["stale", "serving"]


def test_a_server_without_weights_is_asked_nothing_and_those_who_wait_are_served_once_it_has_some():
    async def scenario() -> None:
        restarts: list[int] = []
        fleet = Fleet(1, 4, StandInServers(*"a"), lambda i, f: restarts.append(i))
        member = await fleet.take(1)
        life = member.life
        fleet.outdate(member, "it got no weights")
        assert life.lost.result() == "it got no weights"
        with pytest.raises(LostServerError, match="old weights until the next update"):
            await fleet.ready(member)
        for _ in range(MAX_FAULTS + 1):
            member.life.fault_at = -1.0
            await fleet.attend(member, member.life, "not asked")
        fleet.give(member)
        waiting = asyncio.create_task(fleet.take(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        fleet.renew(member, 7)
        assert (await asyncio.wait_for(waiting, 10)).version == 7
        assert (await fleet.ready(member), restarts) == (member.life, [])

    asyncio.run(scenario())


# -------------------------------------------------------------------- restarts


def test_a_server_that_dies_while_it_is_told_what_a_fresh_one_must_know_is_restarted_again_and_watched_on(
    start, engine_over, caplog
):
    server = start()
    server.sick_calls["/init_weight_transfer_engine"] = [stand.close]
    servers = StandInServers(server.url)
    engine = engine_over(servers, progress_timeout=0.4)
    servers.cures[0] = lambda: None
    for deaths in (1, 2):
        servers.dead = {0}  # nobody asks it for anything: the watch is the one to notice
        assert wait_for(lambda: len(servers.restarts) == deaths + 1)  # noqa: B023
        assert wait_for(lambda: not engine.upkeep.fleet.members[0].is_down)
    assert re.search(
        r"restarting vLLM server 0 \(pid 0, server_0.log\), try 2 of 3 .*: RemoteProtocolError", caplog.text
    )
    assert generate(engine)


def test_a_server_that_hangs_at_a_start_is_named_with_its_log_and_at_what(start, engine_over):
    server = start()
    server.sick_calls["/weight_info"] = [stand.hang]
    engine = engine_over(StandInServers(closed_url(), server.url), sync_timeout=0.5)
    named = r"vLLM server 1 \(pid 0, server_1.log\): it did not take what a fresh server needs within "
    with pytest.raises(TimeoutError, match=named + r"rollout.sync_timeout=0.5 s \(/weight_info of http"):
        engine.upkeep.prepare(1)
    with pytest.raises(
        ConnectionError, match=r"vLLM server 0 \(pid 0, server_0.log\): it was to take what a fresh server"
    ):
        engine.upkeep.prepare(0)


def test_the_watch_goes_on_whatever_a_restart_raises(caplog):
    async def scenario() -> int:
        servers, raised = StandInServers(*"a"), []

        def restart(index: int, fault: str) -> None:
            raised.append(fault)
            if len(raised) == 1:
                raise ValueError("a defect of ours")
            servers.dead.clear()

        fleet = Fleet(1, 4, servers, restart)
        servers.dead = {0}
        watch = asyncio.create_task(fleet.watch(lambda index: asyncio.sleep(0), 0.04, []))
        await asyncio.wait({watch}, timeout=0.5)
        watch.cancel()
        return len(raised)

    assert asyncio.run(scenario()) == 2
    assert "a defect of ours" in caplog.text


def test_a_server_that_dies_while_nobody_asks_is_restarted_before_it_is_needed(start, engine_over, caplog):
    servers = StandInServers(start().url)
    engine = engine_over(servers, progress_timeout=0.4)
    servers.cures[0] = lambda: None
    servers.dead = {0}
    assert wait_for(lambda: servers.restarts == [0])
    assert generate(engine)
    assert re.search(
        r"restarting vLLM server 0 \(pid 0, server_0.log\), try 1 of 3 .*: vLLM server 0 ended", caplog.text
    )


def test_a_server_that_dies_asleep_is_restarted_once_the_trainer_has_left_the_device(start, engine_over):
    servers = StandInServers(start().url)
    engine = engine_over(servers, progress_timeout=0.1, vllm={"enable_sleep_mode": True})
    servers.cures[0] = lambda: None
    engine.sleep()
    servers.dead = {0}
    time.sleep(0.5)  # twenty looks at it
    engine.wake_weights()
    engine.update_weights(WEIGHTS, 1)
    assert servers.restarts == []
    engine.wake_up()
    assert servers.restarts == [0]


def test_requests_of_a_server_that_is_restarted_go_elsewhere_meanwhile(start, engine_over):
    sick, well = start(stand.hang), start()
    servers = StandInServers(sick.url, well.url)
    engine = engine_over(servers, progress_timeout=0.4)
    ready = threading.Event()
    servers.cures[0] = lambda: ready.wait(20)
    try:
        assert [len(group) for group in generate(engine, n=2, groups=4)] == [2] * 4
        assert servers.restarts == [0]
        assert engine.upkeep.fleet.members[0].is_down
    finally:
        ready.set()


def test_a_request_that_is_cancelled_does_not_end_the_restart_it_began(start, engine_over):
    servers = StandInServers(start().url)
    engine = engine_over(servers)
    ready = threading.Event()
    servers.cures[0] = lambda: ready.wait(20)
    servers.dead, servers.servers[0].url = {0}, closed_url()
    engine.upkeep.asked[0] = client.Server(servers.servers[0].url)

    async def begin_and_cancel() -> None:
        task = asyncio.create_task(engine.generate(PROMPT, 1, PARAMS))
        assert await asyncio.to_thread(wait_for, lambda: servers.restarts == [0])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(begin_and_cancel())
        assert engine.upkeep.fleet.members[0].is_down
    finally:
        ready.set()


def test_a_prompt_that_servers_die_of_is_named_after_a_bound(start, engine_over):
    deadly = [start(), start()]
    servers = StandInServers(*(one.url for one in deadly))
    engine = engine_over(servers)

    def die(handler: stand.Handler) -> None:
        servers.dead = {0, 1}
        stand.close_in_the_middle(handler)
        for member in engine.upkeep.fleet.members:
            member.restarts = -9  # as after good answers to others

    for index, server in enumerate(deadly):
        servers.cures[index] = lambda: None
        server.otherwise = die
    with pytest.raises(
        RuntimeError, match=rf"restarted {MAX_LOST + 1} times while they sampled prompt p-17 \(2 tokens\)"
    ):
        generate(engine)


@pytest.mark.parametrize("status", [302, 401, 404, 500])
def test_a_status_that_is_about_the_server_is_no_fault_of_the_prompt(status, start, engine_over):
    sick, well = start(stand.answer(b"what\x07", status)), start()
    assert len(generate(engine_over(StandInServers(sick.url, well.url)), n=2, groups=4)) == 4
    assert sick.requests


# -------------------------------------------------------------------- admission


def test_requests_go_to_the_least_loaded_server_within_the_limit():
    async def scenario() -> None:
        fleet = Fleet(2, 8, StandInServers(*"ab"), lambda i, f: None)
        assert [(await fleet.take(4)).index for _ in range(4)] == [0, 1, 0, 1]
        waiting = asyncio.create_task(fleet.take(4))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        fleet.give(fleet.members[1], 4)
        assert (await asyncio.wait_for(waiting, 10)).index == 1
        fleet.give(fleet.members[0], 4)
        fleet.members[0].is_down = True
        fleet.give(fleet.members[1], 4)
        assert (await fleet.take(4)).index == 1  # the other one is being restarted

    asyncio.run(scenario())


def test_a_group_larger_than_the_limit_runs_alone():
    async def scenario() -> None:
        fleet = Fleet(1, 8, StandInServers(*"a"), lambda i, f: None)
        assert (await fleet.take(16)).index == 0
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(fleet.take(1), 0.05)
        assert not fleet.waiters

    asyncio.run(scenario())


def test_whoever_came_first_is_served_first_but_for_retries_and_those_who_gave_up_waiting():
    async def scenario() -> list[str]:
        fleet = Fleet(1, 4, StandInServers(*"a"), lambda i, f: None)
        served: list[str] = []

        async def wait(name: str, n: int, is_retry: bool = False) -> None:
            await fleet.take(n, is_retry=is_retry)
            served.append(name)

        member = await fleet.take(4)
        waiting = [asyncio.create_task(wait(*one)) for one in (("a", 3), ("b", 3), ("c", 1), ("d", 1, True))]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        fleet.give(member, 4)  # in the same turn, before those who were cancelled could say so
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (member.load, len(fleet.waiters)) == (2, 0)
        late = asyncio.create_task(wait("e", 3))
        await asyncio.sleep(0)
        fleet.give(member, 2)
        late.cancel()  # it has its place, but has not run since
        await asyncio.gather(late, return_exceptions=True)
        assert member.load == 0
        return served

    assert asyncio.run(scenario()) == ["d", "c"]


def test_the_tokens_of_an_answer_are_arrays_from_the_wire_on(start):
    received = Received(4)

    async def scenario() -> None:
        async with client.session({}) as http:
            body = client.request_body(PROMPT, PARAMS, [1])
            expected = client.Expected("p-17", 4, frozenset({1}))
            await client.sample(http, client.Server(start().url), body, expected, on_tokens)

    def on_tokens(ids: wire.Ids, logprobs: wire.Logprobs) -> None:
        assert (ids.dtype, logprobs.dtype) == (np.int32, np.float32)
        received.add(ids, logprobs)

    asyncio.run(scenario())
    assert received.size


def test_requests_begin_a_few_at_a_turn_of_the_event_loop(engine_over: Callable[..., VLLMEngine]) -> None:
    engine = engine_over(StandInServers("http://127.0.0.1:9"))
    begun = 0

    async def begin() -> None:
        nonlocal begun
        await engine.requests.turn()
        begun += 1

    async def begun_each_turn() -> list[int]:
        waiting = [asyncio.ensure_future(begin()) for _ in range(10 * requests_module.STARTS_AT_ONCE)]
        counts = [0]
        while not all(one.done() for one in waiting):
            await asyncio.sleep(0)
            counts.append(begun)
        return [after - before for before, after in pairwise(counts)]

    each_turn = engine._run(begun_each_turn())
    assert sum(each_turn) == 10 * requests_module.STARTS_AT_ONCE
    assert 0 < max(each_turn) <= requests_module.STARTS_AT_ONCE


@pytest.mark.parametrize(("hard", "allowed"), [(20_000, 8_704), (4_096, 4_096)])
def test_every_sample_in_flight_may_have_a_connection(hard, allowed, monkeypatch, caplog):
    limits = [(1_024, hard)]
    monkeypatch.setattr(client.resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(client.resource, "setrlimit", lambda which, pair: limits.append(pair))
    for _ in range(2):
        client.allow_open_files(8_192)
    assert limits[-1] == (allowed, hard)
    assert ("ulimit -Hn" in caplog.text) == (allowed < 8_704)


@pytest.mark.parametrize("turns", range(8))
def test_a_call_that_is_cancelled_as_its_answer_comes_ends_there(turns, monkeypatch):
    """Else what looks at servers for ever would go on after the run."""

    async def answered(*_: object) -> control.Reply:
        await asyncio.sleep(0)
        return control.Reply(200, b"")

    async def scenario() -> bool:
        http = control.client("http://127.0.0.1:9")
        call = asyncio.create_task(control.ask(http, "GET", "/metrics", time.monotonic() + 60))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = not call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return was_done or call.cancelled()

    monkeypatch.setattr(control, "_ask", answered)
    assert asyncio.run(scenario())


def test_a_server_that_resets_a_connection_as_soon_as_it_is_open_is_one_that_cannot_be_reached(start, monkeypatch):
    """The socket of such a connection is None in libuv's loop, and anyio asks it for its other end's address."""
    connect, loop = anyio.connect_tcp, LoopThread("control")

    async def connect_and_lose(*where: Any, **options: Any) -> object:
        stream: Any = await connect(*where, **options)
        stream._transport.abort()
        await asyncio.sleep(0)
        return stream

    async def scenario() -> None:
        async with control.client(start().url) as http:
            await control.ask(http, "GET", "/health", time.monotonic() + 60)

    monkeypatch.setattr(anyio, "connect_tcp", connect_and_lose)
    with contextlib.closing(loop), pytest.raises(httpx.ConnectError, match="closed the connection at once"):
        loop.submit(scenario()).result()
