"""The engine over a real vLLM server on this machine: numbers, versions, cancellation, and what happens when things die.

Shapes: R response tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_dapo.rollout import client, control, wire
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.rollout.nodes import RemoteServer
from nemo_dapo.rollout.weights.direct import Direct
from nemo_dapo.rollout.weights.plan import Seat, Target
from nemo_dapo.rollout.weights.push import Held, damage, push_weights
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.rollout.weights.store import DATA, read_table
from nemo_dapo.types import Prompt, Sample, SamplingParams, VersionSpan
from tests.conftest import TINY_VLLM, tiny_engine
from tests.stand_in_devices import HostMemory, Neighbours

T = TypeVar("T")

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPT = Prompt(uid="p", token_ids=(20, 21, 22, 23, 24), problem="", ground_truth="")
# float32 on both sides, sums of some hundred terms in another order: differences around 1e-6, bounded by the 1e-4 that
# the project promises between trainer and rollout.
LOGPROB_TOLERANCE = 1e-4
END_TOKEN = 1


def hf_model(path: Path, change: float = 0.0) -> PreTrainedModel:
    """The Hugging Face model of `path` in float32; `change` scales every matrix, another one for each value."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2:
                parameter.mul_(1.0 + change * (1 + number % 3))
    return model


def hf_logprobs(
    model: PreTrainedModel, sample: Sample, temperature: float = 1.0, prompt: Prompt = PROMPT
) -> torch.Tensor:
    """Log-probability of each response token: [R] float32."""
    ids = torch.tensor([[*prompt.token_ids, *sample.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature  # [R, V]
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]


def gap(model: PreTrainedModel, samples: list[Sample], temperature: float = 1.0) -> float:
    """Mean absolute difference between vLLM's and Hugging Face's log-probabilities."""
    differences = [hf_logprobs(model, s, temperature) - torch.tensor(s.logprobs) for s in samples]
    return torch.cat(differences).abs().mean().item()


def sample(engine: VLLMEngine, n: int = 8, *, max_tokens: int = 48, **params: Any) -> list[Sample]:
    return asyncio.run(engine.generate(PROMPT, n, SamplingParams(max_tokens=max_tokens, **params)))


def push(engine: VLLMEngine, model: PreTrainedModel) -> int:
    """Give the engine the weights of `model` as its next version."""
    version = engine.version + 1
    engine.update_weights(model.named_parameters(), version)
    return version


def metric(engine: VLLMEngine, name: str) -> float:
    """Value of one of the server's metrics."""
    text = httpx.get(engine.servers.servers[0].url + "/metrics", timeout=30.0, trust_env=False).text
    return sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE))


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return reached


def check_update(engine: VLLMEngine, path: Path) -> None:
    """Logprobs equal Hugging Face's before and after an update, and the update really changed something."""
    before, after = hf_model(path), hf_model(path, change=0.1)
    push(engine, before)
    old = sample(engine)
    assert gap(before, old) < LOGPROB_TOLERANCE
    assert gap(after, old) > 100 * LOGPROB_TOLERANCE
    version = push(engine, after)
    new = sample(engine)
    assert gap(after, new) < LOGPROB_TOLERANCE
    assert {(s.versions[0].version, s.versions[0].end) for s in new} == {(version, len(s.token_ids)) for s in new}


def test_logprobs_equal_hugging_face_before_and_after_an_update_with_tied_embeddings(vllm_engine, tiny_models):
    check_update(vllm_engine, tiny_models["tied"])


@pytest.mark.parametrize("gpu", ["shared", "its own"])
def test_an_update_that_comes_in_pieces_to_the_server_s_devices_is_loaded_as_one(
    vllm_engine, tiny_models, monkeypatch, gpu
):
    """Devices and NCCL are stand-ins on both sides (`vllm_site`); vLLM, its routes and its loading of a model are not."""
    name, engine = "vLLM server 0", vllm_engine
    server = engine.servers.servers[0]
    monkeypatch.setattr(engine.upkeep, "target", lambda index: Target(name, server.url, (gpu,), "2.28.3", server.pid))
    direct = Direct(HostMemory(), Neighbours("here", 1).as_rank(0), "shared", 1 << 14)  # type: ignore[arg-type]
    sender = Sender(engine.sender.expected, direct=direct)
    for change in (0.1, 0.2):
        model = hf_model(tiny_models["tied"], change)
        plan = engine.begin_update(engine.version + 1, [Seat("here", "shared")])
        assert [target.host for target in plan.targets] == ["here" if gpu == "shared" else ""]
        sent = sender.send(model.named_parameters(), plan, 0)
        assert [(one.name, one.fault) for one in sent.outcomes] == [(name, "")]
        engine.finish_update([sent])
        samples = sample(engine)
        assert gap(model, samples) < LOGPROB_TOLERANCE
        assert {span.version for one in samples for span in one.versions} == {plan.version}
    sender.close()
    assert engine.restarts == 0


def test_logprobs_are_those_of_the_sampled_distribution_at_another_temperature(vllm_engine, tiny_models):
    model = hf_model(tiny_models["tied"])
    push(vllm_engine, model)
    samples = sample(vllm_engine, temperature=0.6)
    assert gap(model, samples, temperature=0.6) < LOGPROB_TOLERANCE
    assert gap(model, samples) > 100 * LOGPROB_TOLERANCE


def test_samples_of_one_prompt_differ_and_end_with_their_end_token(vllm_engine):
    samples = sample(vllm_engine, n=64, max_tokens=256)
    assert len({s.token_ids.tobytes() for s in samples}) == 64
    ended = [s for s in samples if s.finish_reason == "stop"]
    assert ended  # the chance that none of 64 x 256 tokens over 320 ids is the end token is nil
    for s in samples:
        assert len(s.logprobs) == len(s.token_ids)
        assert s.truncated == (s.token_ids[-1] != END_TOKEN and len(s.token_ids) == 256)
        assert (s.finish_reason == "stop") == (s.token_ids[-1] == END_TOKEN)
        assert END_TOKEN not in s.token_ids[:-1]


def sampled_across_a_push(
    engine: VLLMEngine, old: PreTrainedModel, new: PreTrainedModel
) -> list[tuple[Sample, torch.Tensor, torch.Tensor]]:
    """Samples that have tokens of both models, with the log-probabilities [R] of all of them under each."""
    first = push(engine, old)
    results: list[Sample] = []
    thread = threading.Thread(target=lambda: results.extend(sample(engine, n=128, max_tokens=384)))
    thread.start()
    assert wait_until(lambda: metric(engine, "num_requests_running") > 0)
    second = push(engine, new)
    thread.join()
    crossed = [s for s in results if len(s.versions) == 2]
    assert crossed  # else the update came before the first or after the last token
    assert {tuple(span.version for span in s.versions) for s in crossed} == {(first, second)}
    return [(s, hf_logprobs(old, s), hf_logprobs(new, s)) for s in crossed]


def test_tokens_sampled_across_an_update_know_their_version_and_its_logprobs(vllm_engine, tiny_models):
    old, new = hf_model(tiny_models["tied"]), hf_model(tiny_models["tied"], change=0.05)
    for s, under_old, under_new in sampled_across_a_push(vllm_engine, old, new):
        cut = s.versions[0].end
        # The key-value cache is recomputed after the update, so the new model's logprobs hold for the whole rest.
        expected = torch.cat([under_old[:cut], under_new[cut:]])
        assert (expected - torch.tensor(s.logprobs)).abs().mean() < LOGPROB_TOLERANCE
    assert vllm_engine.metrics()["server/pause_seconds"] > 0


def test_over_an_update_that_keeps_the_cache_tokens_are_of_the_new_weights_nearly(
    vllm_engine, tiny_models, monkeypatch
):
    monkeypatch.setattr(vllm_engine.upkeep, "keeps_cache", True)
    old, new = hf_model(tiny_models["tied"]), hf_model(tiny_models["tied"], change=0.05)
    to_old, to_new = [], []
    for s, under_old, under_new in sampled_across_a_push(vllm_engine, old, new):
        cut, said = s.versions[0].end, torch.tensor(s.logprobs)
        assert (under_old - said)[:cut].abs().mean() < LOGPROB_TOLERANCE
        to_old.append((under_old - said)[cut:].abs())
        to_new.append((under_new - said)[cut:].abs())
    gap_to_old, gap_to_new = torch.cat(to_old).mean(), torch.cat(to_new).mean()
    # They attend to keys and values of the old weights: the new model's log-probabilities, up to that.
    assert LOGPROB_TOLERANCE < gap_to_new < gap_to_old / 2


def test_a_new_request_never_meets_a_prefix_of_older_weights_though_the_cache_is_kept(
    vllm_engine, tiny_models, monkeypatch
):
    monkeypatch.setattr(vllm_engine.upkeep, "keeps_cache", True)
    old, new = hf_model(tiny_models["tied"]), hf_model(tiny_models["tied"], change=0.05)
    long = dataclasses.replace(PROMPT, token_ids=tuple(20 + i % 250 for i in range(300)))  # two blocks of the cache

    def ask() -> tuple[float, Sample]:
        """How many tokens of the prompt were found in the cache, and the answer."""
        before = metric(vllm_engine, "prefix_cache_hits_total")
        (answer,) = asyncio.run(vllm_engine.generate(long, 1, SamplingParams(max_tokens=64)))
        return metric(vllm_engine, "prefix_cache_hits_total") - before, answer

    def gap_after_a_push() -> tuple[float, float]:
        """Tokens found after a push of `new` over `old`, and the distance of the answer from `new`."""
        push(vllm_engine, old)
        ask()
        assert ask()[0] > 0, "requests of one version share it"
        push(vllm_engine, new)
        found, answer = ask()
        return found, (hf_logprobs(new, answer, prompt=long) - torch.tensor(answer.logprobs)).abs().mean().item()

    found, distance = gap_after_a_push()
    assert (found, distance < LOGPROB_TOLERANCE) == (0, True)
    monkeypatch.setattr(client, "with_salt", lambda body, version: body)
    found, distance = gap_after_a_push()
    assert (found > 0, distance > 10 * LOGPROB_TOLERANCE) == (True, True)


def test_an_incomplete_export_leaves_the_server_as_it_was(vllm_engine, tiny_models):
    model = hf_model(tiny_models["tied"])
    version = push(vllm_engine, model)
    with pytest.raises(ValueError, match="missing"):
        vllm_engine.update_weights(list(model.named_parameters())[1:], version + 1)
    assert vllm_engine.version == version
    assert gap(model, sample(vllm_engine)) < LOGPROB_TOLERANCE


def test_a_cancelled_request_stops_on_the_server(vllm_engine):
    params, n = SamplingParams(max_tokens=384), 200  # seconds of work
    complete = sample(vllm_engine, n=32, max_tokens=384)
    whole = n * sum(len(s.token_ids) for s in complete) / len(complete)
    before = metric(vllm_engine, "generation_tokens_total")

    async def cancel() -> None:
        task = asyncio.create_task(vllm_engine.generate(PROMPT, n, params))
        running = lambda: metric(vllm_engine, "num_requests_running") > 0  # noqa: E731
        assert await asyncio.to_thread(wait_until, running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert wait_until(lambda: metric(vllm_engine, "num_requests_running") == 0)
    # Half: room for the time that passes on a busy machine until the cancellation takes effect.
    assert metric(vllm_engine, "generation_tokens_total") - before < 0.5 * whole


@pytest.mark.parametrize(
    "route", ["/weight_info", "/inference/v1/generate", "/update_weights", "/collective_rpc", wire.ROUTE]
)
def test_every_route_that_matters_needs_the_key(vllm_engine, route):
    url = vllm_engine.servers.servers[0].url
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.request("POST", url + route, headers=headers, trust_env=False).status_code == 401


def test_our_route_gives_the_ids_and_log_probabilities_of_vllm_s_own_bit_for_bit_at_eight_bytes_a_token(vllm_engine):
    url, headers = vllm_engine.servers.servers[0].url, vllm_engine.servers.headers
    params = {"temperature": 0.0, "max_tokens": 384, "ignore_eos": True, "logprobs": 0}
    body = {"token_ids": PROMPT.token_ids, "sampling_params": params}
    with httpx.Client(base_url=url, headers=headers, timeout=300, trust_env=False) as http:
        (plain,) = http.post("/inference/v1/generate", json=body).json()["choices"]
        raw = http.post(wire.ROUTE, json=body).content
    reader = wire.FrameReader(384)
    frames = list(reader.feed(raw))
    reader.close()
    assert np.concatenate([f.token_ids for f in frames]).tolist() == plain["token_ids"]
    theirs = np.array([entry["logprob"] for entry in plain["logprobs"]["content"]], np.float32)
    assert np.array_equal(np.concatenate([f.logprobs for f in frames]), theirs)
    assert len(raw) < 9 * 384


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [1] * 9999},
        {"token_ids": []},
        {"token_ids": [10**6]},
        {"token_ids": ["x"]},
        {"sampling_params": None},
    ],
)
def test_a_request_that_the_engine_could_not_serve_is_refused_and_the_server_lives(changes, vllm_engine):
    url, headers = vllm_engine.servers.servers[0].url, vllm_engine.servers.headers
    body = {"token_ids": [5], "sampling_params": {"max_tokens": 2}} | changes
    assert httpx.post(url + wire.ROUTE, json=body, headers=headers, timeout=60, trust_env=False).status_code == 400
    assert sample(vllm_engine, n=1)


def engine_process(engine: VLLMEngine) -> psutil.Process:
    """The process in which the model runs, below the API server, below the guardian."""
    return next(
        p for p in psutil.Process(engine.servers.servers[0].pid).children(recursive=True) if "EngineCore" in p.name()
    )


def test_a_killed_server_is_restarted_with_the_newest_weights_and_goes_on_with_what_it_had_sent(
    vllm_engine, tiny_models, monkeypatch
):
    """At temperature 0, so that the whole must be what an undisturbed server answers; then it is killed."""
    model, request_body = hf_model(tiny_models["tied"], change=0.2), client.request_body

    def in_small_frames(*args: Any) -> bytes:
        body = json.loads(request_body(*args))
        body["sampling_params"] |= {"stream_interval": 32, "ignore_eos": True, "stop_token_ids": []}
        return json.dumps(body).encode()

    monkeypatch.setattr(client, "request_body", in_small_frames)
    monkeypatch.setattr(vllm_engine.requests, "stop_token_ids", [])
    version = push(vllm_engine, model)
    params = SamplingParams(max_tokens=384, temperature=0.0)  # seconds of work
    prompts = [dataclasses.replace(PROMPT, token_ids=(20 + i, 21, 22)) for i in range(24)]

    async def all_of_them(disturb: bool) -> list[Sample]:
        tasks = [asyncio.create_task(vllm_engine.generate(prompt, 1, params)) for prompt in prompts]
        if disturb:
            generated = metric(vllm_engine, "generation_tokens_total")
            halfway = lambda: metric(vllm_engine, "generation_tokens_total") - generated > 24 * 100  # noqa: E731
            assert await asyncio.to_thread(wait_until, halfway)
            engine_process(vllm_engine).kill()
        return [one for (one,) in await asyncio.gather(*tasks)]

    undisturbed = asyncio.run(all_of_them(disturb=False))
    vllm_engine.metrics()
    everything = asyncio.run(all_of_them(disturb=True))
    metrics = vllm_engine.metrics()
    assert metrics["server/restarts"] == 1
    assert (
        metrics["server/tokens_gone_on_with"] >= 24 * 32
    )  # at least a frame of each, as a hundred tokens of each came
    assert metrics["server/tokens_thrown_away"] == 0
    assert [s.token_ids.tolist() for s in everything] == [s.token_ids.tolist() for s in undisturbed]
    for one, other in zip(everything, undisturbed, strict=True):
        assert one.versions == (VersionSpan(version, 0, 384),)
        assert np.abs(one.logprobs - other.logprobs).mean() < LOGPROB_TOLERANCE


def test_the_route_sends_the_experts_that_an_engine_tells_before_the_end():
    """vLLM tells them on GPUs alone: a stand-in for its engine does here."""
    from vllm.sampling_params import SamplingParams as VLLMParams

    from nemo_dapo.rollout import vllm_route

    routes = np.arange(7 * 3 * 2, dtype=np.uint8).reshape(7, 3, 2)

    class Engine:
        async def generate(self, *_: object, **__: object):
            for ids, finished in (([5, 6], False), ([1], True)):
                logprobs = SimpleNamespace(logprobs=[-0.5] * len(ids))
                said = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop", weight_versions=None)
                said.routed_experts = routes if finished else None
                yield SimpleNamespace(finished=finished, outputs=[said])

    async def sent() -> bytes:
        return b"".join(
            [frame async for frame in vllm_route.frames(Engine(), {"prompt_token_ids": [1]}, VLLMParams(), 0)]
        )

    reader = wire.FrameReader(3, routes.nbytes)
    frames = list(reader.feed(asyncio.run(sent())))
    reader.close()
    assert [frame.kind for frame in frames] == [wire.TOKENS, wire.ROUTES, wire.FINAL]
    read_back = wire.routes_of(frames[1].extra, frames[2].final["routes"])
    assert read_back is not None
    assert np.array_equal(read_back, routes)


def test_of_requests_that_wait_the_earlier_group_s_is_served_first_though_it_came_last(vllm_engine):
    """The server runs 256 at once: of 288 some wait, and behind them 8 of a later and then 8 of an earlier group.

    They come while it pauses, so that none of them is served before all are there.
    """
    url, headers = vllm_engine.servers.servers[0].url, vllm_engine.servers.headers
    ended: list[int] = []

    async def ask(http: httpx.AsyncClient, priority: int, tokens: int) -> None:
        params = {"max_tokens": tokens, "ignore_eos": True}
        body = {"token_ids": PROMPT.token_ids, "sampling_params": params, "priority": priority}
        assert (await http.post(wire.ROUTE, json=body)).status_code == 200
        ended.append(priority)

    async def scenario() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=300, trust_env=False, limits=limits
        ) as http:
            assert (await http.post("/pause", params={"mode": "keep"})).status_code == 200
            # Lengths differ, so that places come free a few at a time.
            tasks = [asyncio.create_task(ask(http, 0, 320 + i % 64)) for i in range(288)]
            await asyncio.sleep(8)
            for priority in (9, 5):
                tasks += [asyncio.create_task(ask(http, priority, 1)) for _ in range(8)]
                await asyncio.sleep(1)
            assert (await http.post("/resume")).status_code == 200
            await asyncio.gather(*tasks)

    asyncio.run(scenario())
    places = [[at for at, one in enumerate(ended) if one == priority] for priority in (5, 9)]
    assert sum(places[0]) < sum(places[1])


def test_a_server_says_what_admission_reads(vllm_engine):
    seen = asyncio.run(vllm_engine.upkeep.look(0))
    assert None not in vars(seen).values()
    assert seen.longest_fit > 1
    vllm_engine.metrics()
    sample(vllm_engine, n=128, max_tokens=384)  # seconds of work, and a look each second
    metrics = vllm_engine.metrics()
    assert 0 < metrics["server/cache_use"] <= 1
    assert metrics["server/preemptions"] == 0


def test_a_server_sleeps_once_and_wakes_once(vllm_engine, monkeypatch):
    """vLLM's CPU engine has the routes and frees nothing; it refuses the option, which is therefore set afterwards."""
    log = vllm_engine.servers.servers[0].log_path
    start = log.stat().st_size
    vllm_engine.sleep()
    monkeypatch.setitem(vllm_engine.config.vllm, "enable_sleep_mode", True)
    wake = (vllm_engine.wake_weights, vllm_engine.wake_up)
    for act in (*wake, vllm_engine.sleep, vllm_engine.sleep, *wake, *wake):
        act()
    said = log.read_bytes()[start:].decode()
    assert said.count("seconds to fall asleep") == 1
    assert said.count("seconds to wake up") == 2  # the weights, then the cache
    assert "already sleeping" not in said
    assert sample(vllm_engine)


def check_refusal(engine: VLLMEngine) -> None:
    """A bit that flips in the node's memory is found, by the name of its tensor, while the server serves; later it is found
    at the load, and the server is not resumed."""
    folder, server = Path(engine.servers.places()[0].folder), engine.servers.servers[0]
    assert isinstance(server, RemoteServer)
    table = read_table(folder)
    victim = table.entries[len(table.entries) // 2]
    with (folder / DATA).open("r+b") as file:
        file.seek(victim.offset)
        (byte,) = file.read(1)
        file.seek(victim.offset)
        file.write(bytes([byte ^ 1]))

    def told(what: Callable[..., Coroutine[Any, Any, T]]) -> T:
        async def tell() -> T:
            async with control.client(server.url, engine.servers.headers) as http:
                return await what(http, Held(table.version, str(folder), table.digest), time.monotonic() + 60)

        return asyncio.run(tell())

    def is_paused() -> bool:
        answer = httpx.get(server.url + "/is_paused", headers=engine.servers.headers, trust_env=False)
        return bool(answer.json()["is_paused"])

    said = f"parameter {victim.name} has other bytes than were sent"
    assert said in told(damage)
    assert not is_paused()
    assert sample(engine)
    with pytest.raises(RuntimeError, match=r"/update_weights of .* failed"):
        told(push_weights)
    assert wait_until(lambda: said in server.log_path.read_text())
    assert is_paused()


def test_logprobs_equal_hugging_face_before_and_after_an_update_with_untied_embeddings(tiny_models, tmp_path):
    with tiny_engine(tiny_models["untied"], tmp_path) as engine:
        assert {span.version for s in sample(engine) for span in s.versions} == {0}
        check_update(engine, tiny_models["untied"])
        check_refusal(engine)  # last: a server that refuses is to be restarted


TRAINER = """
import sys
from pathlib import Path
from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.rollout.servers import Share, VLLMServers
config = RolloutConfig(max_prompt_length=16, max_response_length=16, vllm={options})
VLLMServers(config, Path(sys.argv[1]), Precision.fp32, Path(sys.argv[2]), Share()).start()
"""


def test_a_trainer_killed_by_sigkill_leaves_no_process_of_vllm(tiny_models, tmp_path):
    code = TRAINER.format(options=repr(TINY_VLLM))
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tiny_models["tied"]), str(tmp_path)])
    family: list[psutil.Process] = []

    def engine_has_started() -> bool:
        family[:] = psutil.Process(trainer.pid).children(recursive=True)
        return any("EngineCore" in p.name() for p in family)

    assert wait_until(engine_has_started, 300.0)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    _, remaining = psutil.wait_procs(family, timeout=60.0)
    assert remaining == []
