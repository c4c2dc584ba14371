"""Requests and their answers, and the engine's dispatch, against a stand-in HTTP server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from nemo_dapo.config import RolloutConfig
from nemo_dapo.rollout.client import Reader, read_samples, request_body, stop_tokens
from nemo_dapo.rollout.engine import MAX_DEATHS, Slots, VLLMEngine
from nemo_dapo.types import Prompt, SamplingParams, VersionSpan
from tests.tiny import save_tiny_tokenizer

PROMPT = Prompt(uid="p-17", token_ids=(5, 6), problem="", ground_truth="")
PARAMS = SamplingParams(max_tokens=4)


class Letters:
    """A tokenizer whose token 1 ends the text and is special."""

    eos_token_id = 1

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(96 + i) for i in ids if i != 1)


def choice(index: int = 0, tokens=(2, 3, 1), **changes) -> dict:
    content = [{"token_id": t, "logprob": -0.5 * t} for t in tokens]
    spans = [{"version": "7", "start": 0, "end": len(tokens)}]
    default = {"index": index, "token_ids": list(tokens), "logprobs": {"content": content}, "finish_reason": "stop"}
    return {**default, "weight_versions": spans, **changes}


def read(*choices: dict, n: int = 1, assumed: int | None = None):
    return read_samples({"choices": list(choices)}, PROMPT, n, Reader(Letters(), assumed))


def test_a_sample_keeps_tokens_logprobs_versions_and_its_end_token():
    spans = [{"version": "6", "start": 0, "end": 2}, {"version": "7", "start": 2, "end": 3}]
    (sample,) = read(choice(weight_versions=spans))
    assert sample.token_ids == (2, 3, 1)
    assert sample.logprobs == (-1.0, -1.5, -0.5)
    assert sample.text == "bc"
    assert sample.versions == (VersionSpan(6, 0, 2), VersionSpan(7, 2, 3))
    assert not sample.truncated


def test_samples_come_in_the_order_of_their_index():
    assert [s.text for s in read(choice(1, (3,)), choice(0, (2,)), n=2)] == ["b", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": None}, "0 log-probabilities for 3 tokens"),
        ({"logprobs": {"content": [{"logprob": -1.0}] * 2}}, "2 log-probabilities for 3 tokens"),
        ({"logprobs": {"content": [{"logprob": -1.0}, {"logprob": None}, {"logprob": -1.0}]}}, "position 1"),
        ({"logprobs": {"content": [{"logprob": -9999.0}] * 3}}, "NaN and -inf"),
        ({"weight_versions": None}, "weight versions None"),
        ({"weight_versions": [{"version": "1", "start": 0, "end": 2}]}, "not all covered"),
        ({"weight_versions": [{"version": "1", "start": 1, "end": 3}]}, "not all covered"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_an_error_that_names_the_prompt(changes, message):
    with pytest.raises(RuntimeError, match=message) as raised:
        read(choice(**changes))
    assert "p-17" in str(raised.value)


def test_a_wrong_number_of_samples_is_an_error():
    with pytest.raises(RuntimeError, match=r"returned 1 samples of prompt p-17, expected 2"):
        read(choice(), n=2)


def test_a_server_without_weight_versions_gets_the_assumed_one():
    (sample,) = read(choice(weight_versions=None), assumed=3)
    assert sample.versions == (VersionSpan(3, 0, 3),)


def test_a_request_carries_no_seed():
    body = request_body(PROMPT, 4, PARAMS, [1])
    assert "seed" not in json.dumps(body)
    assert body["sampling_params"]["stop_token_ids"] == [1]


def test_every_declared_end_token_stops_a_response(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert stop_tokens(tmp_path, Letters()) == [1, 8, 9]


def test_an_end_token_is_not_in_the_text_of_a_real_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    save_tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [*tokenizer.encode("2 + 2\n= 4 "), tokenizer.eos_token_id]
    (sample,) = read_samples({"choices": [choice(0, ids)]}, PROMPT, 1, Reader(tokenizer))
    assert sample.text == "2 + 2\n= 4 "


class StandIn(ThreadingHTTPServer):
    """Answers /inference/v1/generate by the statuses in `script`, then always 200; `hold` delays every answer."""

    daemon_threads = True

    def __init__(self, script: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.script = list(script)
        self.error = "x"
        self.requests = 0
        self.release = threading.Event()
        self.release.set()
        self.dropped = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests += 1
        if not server.release.is_set():
            self.connection.settimeout(20)
            if self.connection.recv(1) == b"":  # the client closed the connection
                server.dropped.set()
            return
        status = server.script.pop(0) if server.script else 200
        n = body["sampling_params"]["n"]
        payload = json.dumps(
            {"choices": [choice(i) for i in range(n)]} if status == 200 else {"error": server.error}
        ).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn([])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class FakeServers:
    """The part of VLLMServers that the engine's dispatch uses; `dead` servers come back when restarted."""

    def __init__(self, *urls: str) -> None:
        self.headers = {"Authorization": "Bearer k"}
        self.servers = [SimpleNamespace(url=url, log_path=Path("server.log")) for url in urls]
        self.dead: set[int] = set()
        self.cures: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.servers)

    def alive(self, index: int) -> bool:
        return index not in self.dead

    def describe_exit(self, index: int) -> str:
        return f"server {index} ended"

    def http(self, index: int, timeout: float) -> httpx.Client:
        return httpx.Client(base_url=self.servers[index].url, timeout=timeout, trust_env=False)

    def restart(self, index: int) -> None:
        if index in self.cures:
            self.dead.discard(index)
            self.servers[index].url = self.cures[index]


def engine_over(servers: FakeServers, **options: object) -> VLLMEngine:
    config = RolloutConfig(max_prompt_length=4, max_response_length=4, **options)  # type: ignore[arg-type]
    engine = VLLMEngine(config, servers, None, Letters(), [1])  # type: ignore[arg-type]
    engine._prepare = lambda index: None  # type: ignore[method-assign]
    return engine


def test_a_busy_server_is_asked_again(stand_in, caplog):
    stand_in.script = [503, 503]
    samples = asyncio.run(engine_over(FakeServers(stand_in.url)).generate(PROMPT, 3, PARAMS))
    assert len(samples) == 3
    assert stand_in.requests == 3
    assert caplog.text.count("prompt p-17 will be sent again") == 2


def test_a_server_whose_engine_died_is_asked_again(stand_in):
    stand_in.script = [500]
    stand_in.error = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    assert asyncio.run(engine_over(FakeServers(stand_in.url)).generate(PROMPT, 1, PARAMS))
    assert stand_in.requests == 2


def test_a_refused_request_is_not_repeated(stand_in):
    stand_in.script = [400]
    with pytest.raises(RuntimeError, match=r"refused prompt p-17 .* HTTP 400"):
        asyncio.run(engine_over(FakeServers(stand_in.url)).generate(PROMPT, 1, PARAMS))
    assert stand_in.requests == 1


def test_the_deadline_names_the_prompt(stand_in):
    stand_in.release.clear()
    with pytest.raises(TimeoutError, match=r"prompt p-17 within rollout.request_timeout=1 s"):
        asyncio.run(engine_over(FakeServers(stand_in.url), request_timeout=1.0).generate(PROMPT, 1, PARAMS))


def test_a_cancelled_request_closes_its_connection_and_gives_its_slots_back(stand_in):
    stand_in.release.clear()
    engine = engine_over(FakeServers(stand_in.url))

    async def cancel() -> list[int]:
        task = asyncio.create_task(engine.generate(PROMPT, 2, PARAMS))
        await asyncio.to_thread(lambda: wait_for(lambda: stand_in.requests == 1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine._slots is not None
        return engine._slots.load

    assert asyncio.run(cancel()) == [0]
    assert stand_in.dropped.wait(20)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_one_engine_serves_one_event_loop_after_another(stand_in):
    engine = engine_over(FakeServers(stand_in.url))
    for _ in range(3):
        assert len(asyncio.run(engine.generate(PROMPT, 1, PARAMS))) == 1


def test_proxy_variables_do_not_reach_a_server_of_our_own(stand_in, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert asyncio.run(engine_over(FakeServers(stand_in.url)).generate(PROMPT, 1, PARAMS))


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(stand_in):
    with pytest.raises(ValueError, match=r"p-17 has 2 tokens, with max_tokens=9 that is 11, but the servers hold 8"):
        asyncio.run(engine_over(FakeServers(stand_in.url)).generate(PROMPT, 1, SamplingParams(max_tokens=9)))
    assert stand_in.requests == 0


def closed_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_server_is_restarted_once_and_its_requests_are_sent_again(stand_in):
    servers = FakeServers(closed_url())
    servers.dead, servers.cures = {0}, {0: stand_in.url}
    engine = engine_over(servers)

    async def many():
        return await asyncio.gather(*[engine.generate(PROMPT, 2, PARAMS) for _ in range(5)])

    assert [len(samples) for samples in asyncio.run(many())] == [2] * 5
    assert engine.restarts == 1


@pytest.mark.parametrize("seen_dead", [True, False])
def test_a_server_that_died_asleep_is_passed_over_for_the_update_to_restart(seen_dead, monkeypatch):
    servers = FakeServers(closed_url())
    engine = engine_over(servers, vllm={"enable_sleep_mode": True})
    engine._asleep = True
    servers.dead = {0} if seen_dead else set()
    monkeypatch.setattr(engine, "_ends_soon", lambda index: True)
    engine.wake_up()
    assert not engine._asleep
    assert engine.restarts == 0


def test_a_living_server_that_cannot_be_woken_is_an_error(monkeypatch):
    engine = engine_over(FakeServers(closed_url()))
    engine._asleep = True
    monkeypatch.setattr(engine, "_ends_soon", lambda index: False)
    with pytest.raises(RuntimeError, match=r"server 0 broke the connection; it was to answer /wake_up"):
        engine.wake_up()


def test_a_server_that_keeps_dying_ends_the_run():
    servers = FakeServers(closed_url())
    servers.dead = {0}
    with pytest.raises(RuntimeError, match=rf"died {MAX_DEATHS + 1} times in a row: server 0 ended"):
        asyncio.run(engine_over(servers).generate(PROMPT, 1, PARAMS))


def test_a_server_is_not_restarted_with_weights_that_are_gone():
    servers = FakeServers(closed_url())
    servers.dead = {0}
    engine = engine_over(servers)
    engine._files = None
    with pytest.raises(RuntimeError, match="the last update failed, so it has no weights"):
        asyncio.run(engine.generate(PROMPT, 1, PARAMS))


def test_requests_go_to_the_least_loaded_server_within_the_limit():
    async def scenario():
        slots = Slots(asyncio.get_running_loop(), num_servers=2, limit=8)
        assert [await slots.take(4) for _ in range(4)] == [0, 1, 0, 1]
        waiting = asyncio.create_task(slots.take(4))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        slots.give(1, 4)
        assert await asyncio.wait_for(waiting, 10) == 1
        slots.give(0, 4)
        slots.down.add(0)
        slots.give(1, 4)
        assert await slots.take(4) == 1  # the other one is being restarted

    asyncio.run(scenario())


def test_a_group_larger_than_the_limit_runs_alone():
    async def scenario():
        slots = Slots(asyncio.get_running_loop(), num_servers=1, limit=8)
        assert await slots.take(16) == 0
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slots.take(1), 0.05)
        assert slots.waiters == []

    asyncio.run(scenario())
