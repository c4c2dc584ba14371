"""Sampling ahead: groups that outlive the step, on a clock that jumps, and through the real trainer and its checkpoints."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nemo_dapo import checkpoint, window_file
from nemo_dapo.collected import Collected, DropReason, token_ages
from nemo_dapo.config import (
    AlgorithmConfig,
    EvaluationConfig,
    InflightCache,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
)
from nemo_dapo.controller import Controller
from nemo_dapo.data.curriculum import Curriculum
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.telemetry.sinks import Sinks
from nemo_dapo.trainer import DAPOTrainer
from nemo_dapo.types import (
    NOTHING_YET,
    Draft,
    Group,
    OpenGroup,
    Prompt,
    Sample,
    SamplingParams,
    Verdict,
    VersionSpan,
)
from tests.fakes import FakeLoader
from tests.test_sampling import Engine, G, dropped, indices, make, random_latency, run, scripted
from tests.test_trainer import OLDER_GAP, Stub, model_folder

ROOT = Path(__file__).parents[1]
SCRIPT = scripted("wkkrrkwrkwwkr")


async def steps(sampler: GroupSampler, number: int, groups: int = 4, update: float = 3.0) -> list[Collected]:
    """`number` steps, each followed by an update of so many seconds."""
    found = []
    for _ in range(number):
        found.append(await sampler.collect(groups))
        await asyncio.sleep(update)
    await sampler.stop()
    return found


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_steps_are_those_of_the_synchronous_recipe_where_the_answers_are(m: int, seed: int) -> None:
    ahead = run(steps(make(Engine(SCRIPT, random_latency(seed)), max_staleness=m), 6))
    synchronous = run(steps(make(Engine(SCRIPT)), 6))
    for one, other in zip(ahead, synchronous, strict=True):
        assert indices(one) == indices(other)
        assert [g.index for g in one.decisive] == [g.index for g in other.decisive]
        assert dropped(one, DropReason.all_wrong) == dropped(other, DropReason.all_wrong)
        assert one.count(DropReason.surplus) == 0


def test_generation_goes_on_while_the_trainer_updates_and_nothing_is_sampled_twice() -> None:
    engine = Engine(SCRIPT, latency=lambda i: 1.0)
    seen: list[int] = []

    async def course() -> None:
        sampler = make(engine, max_staleness=1)
        await sampler.collect(4)
        before = len(engine.finished)
        await asyncio.sleep(20.0)
        seen.append(len(engine.finished) - before)
        second = await sampler.collect(4)
        assert second.seconds == 0.0  # it was there when it was asked for
        assert second.metrics()["rollout/open_groups"] == 0  # it was decided: no more were begun until it was taken
        assert second.metrics()["rollout/steps_ahead"] == 1
        assert sampler.window.open == 4  # m N
        assert engine.cancelled == []
        await sampler.stop()

    run(course())
    assert seen[0] >= 4
    assert len(set(engine.started)) == len(engine.started)


def test_the_record_says_how_full_the_servers_were() -> None:
    async def course() -> tuple[Collected, Collected]:
        sampler = make(Engine(scripted("k"), latency=lambda i: 2.0), max_staleness=1)
        first = await sampler.collect(2)
        await asyncio.sleep(10.0)
        second = await sampler.collect(2)
        await sampler.stop()
        return first, second

    first, second = run(course())
    assert (first.flights.peak, first.flights.mean, first.metrics()["time/servers_idle"]) == (4, 4.0, 0.0)
    # Two places were left while the trainer updated, and both were taken.
    assert (second.flights.seconds, second.flights.idle_seconds, second.seconds) == (10.0, 10.0, 0.0)


def test_what_fails_while_nobody_waits_is_said_by_the_next_step() -> None:
    engine = Engine(scripted("k"), lambda i: 1.0 + i, fail=lambda i, n: ValueError("gone") if i == 2 else None)

    async def course() -> None:
        sampler = make(engine, max_staleness=1)
        await sampler.collect(2)
        await asyncio.sleep(5.0)
        await sampler.collect(2)

    with pytest.raises(RuntimeError, match="prompt p2 failed: ValueError: gone"):
        run(course())


def test_an_aborted_group_comes_again() -> None:
    engine = Engine(
        scripted("k"), finish_reason=lambda i: "abort" if (i, engine.started.count(i)) == (1, 1) else "stop"
    )
    found = run(steps(make(engine, max_staleness=1), 3, groups=2))
    assert dropped(found[0], DropReason.aborted) == [1]
    assert engine.started.count(1) == 2
    assert sorted(i for one in found for i in indices(one)).count(1) == 1


def test_a_resumed_run_goes_on_with_the_finished_groups_and_asks_again_for_the_others_alone(tmp_path: Path) -> None:
    engine, loader = Engine(SCRIPT, random_latency(1)), FakeLoader()

    async def first() -> tuple[dict[str, Any], list[list[int]]]:
        sampler = make(engine, max_staleness=2, loader=loader)
        for _ in range(3):
            await sampler.collect(4)
        state = sampler.state_dict() | {"loader": loader.state_dict()}
        return state, [indices(one) for one in await steps(sampler, 4)]

    state, expected = run(first())
    window_file.write(tmp_path / window_file.NAME, state["window"])
    state["window"] = window_file.read(tmp_path / window_file.NAME)
    finished = [one.group.prompt.metadata["i"] for one in state["window"] if one.group]
    assert finished
    assert len(finished) < len(state["window"]), "the test needs both kinds"
    again = Engine(SCRIPT, random_latency(2))

    async def second() -> list[list[int]]:
        later = FakeLoader()
        later.load_state_dict(state["loader"])
        sampler = make(again, max_staleness=2, loader=later)
        sampler.load_state_dict(state)
        return [indices(one) for one in await steps(sampler, 4)]

    assert run(second()) == expected
    assert not set(finished) & set(again.started), "finished groups were sampled again"


def test_what_unfinished_samples_have_is_saved_and_handed_to_the_engine_that_goes_on_with_them(tmp_path: Path) -> None:
    """The engine has half of two samples of each group when the run is saved, and one whole one."""
    has = [Sample((5, 5), (-0.5, -0.25), "abort", (VersionSpan(1, 0, 2),)), Sample((5, 1), (-0.5, -0.5), "stop")]
    given: dict[int, list[Sample]] = {}

    class Drafting(Engine):
        async def generate(
            self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
        ) -> list[Sample]:
            given[prompt.metadata["i"]] = [draft.sample for draft in drafts]
            for draft, sample in zip(drafts, has, strict=False):
                draft.sample = sample
            return await super().generate(prompt, n, params)

    async def save() -> dict[str, Any]:
        sampler = make(Drafting(scripted("k"), latency=lambda i: 1.0 if i < 2 else 1e6), max_staleness=1)
        await sampler.collect(2)
        state = sampler.state_dict()
        await sampler.stop()
        return state

    state = run(save())
    assert {tuple(one) for one in given.values()} == {(NOTHING_YET,) * G}
    window_file.write(tmp_path / "w", state["window"])
    state["window"] = window_file.read(tmp_path / "w")
    given.clear()

    async def resume() -> None:
        sampler = make(Drafting(scripted("k")), max_staleness=1)
        sampler.load_state_dict(state)
        await sampler.collect(2)
        await sampler.stop()

    run(resume())
    assert given[2] == given[3] == [*has, NOTHING_YET, NOTHING_YET]


def test_a_run_that_no_longer_samples_ahead_samples_the_open_groups_again() -> None:
    async def first() -> tuple[dict[str, Any], list[int]]:
        loader = FakeLoader()
        sampler = make(Engine(scripted("k")), max_staleness=1, loader=loader)
        found = await sampler.collect(3)
        await sampler.stop()
        return sampler.state_dict() | {"loader": loader.state_dict()}, indices(found)

    state, taken = run(first())
    loader = FakeLoader()
    loader.load_state_dict(state["loader"])
    sampler = make(Engine(scripted("k")), loader=loader)
    sampler.load_state_dict(state)
    assert taken + indices(run(sampler.collect(5))) == list(range(8))


def saved_window(engine: Engine, m: int = 2, groups: int = 4) -> dict[str, Any]:
    """The state of a run, and of its loader, after the third step."""

    async def course() -> dict[str, Any]:
        loader = FakeLoader()
        sampler = make(engine, max_staleness=m, loader=loader)
        for _ in range(3):
            await sampler.collect(groups)
        state = sampler.state_dict() | {"loader": loader.state_dict()}
        await sampler.stop()
        return state

    return run(course())


def gone_on_with(state: dict[str, Any], engine: Engine, number: int, groups: int, **options: Any) -> list[Collected]:
    loader = FakeLoader()
    loader.load_state_dict(state["loader"])
    sampler = make(engine, loader=loader, **options)
    sampler.load_state_dict(state)
    return run(steps(sampler, number, groups))


def test_a_resumed_run_with_other_sizes_takes_the_same_groups_and_samples_those_anew_that_do_not_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = scripted("wkkwkwwk")  # what is all right of G is not of 2 G
    first = Engine(script, random_latency(1), length=lambda i: 3 + i % 2)
    state = saved_window(first)
    finished = {one.prompt.metadata["i"] for one in state["window"] if one.group}
    assert {i % 2 for i in finished} == {0, 1}
    expected = [indices(one) for one in gone_on_with(state, Engine(script), 3, 4, max_staleness=2)]
    assert not caplog.records

    larger = Engine(script)
    found = gone_on_with(state, larger, 3, 4, max_staleness=2, group_size=2 * G)
    assert [indices(one) for one in found] == expected
    assert {len(group.samples) for one in found for group in one.judged} == {2 * G}
    assert finished <= set(larger.started)

    shorter = Engine(script)
    found = gone_on_with(state, shorter, 3, 4, max_staleness=2, params=SamplingParams(max_tokens=3))
    assert [indices(one) for one in found] == expected
    assert finished & set(shorter.started) == {i for i in finished if i % 2}
    assert "open groups are sampled anew: they are not of algorithm.group_size=8, or an answer is longer" in caplog.text


class Dated(Engine):
    """Each answer is of the weights that served when it was begun."""

    version = 0

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        version = self.version
        samples = await super().generate(prompt, n, params)
        return [dataclasses.replace(one, versions=(VersionSpan(version, 0, len(one.token_ids)),)) for one in samples]


async def dated_steps(sampler: GroupSampler, engine: Dated, number: int, groups: int) -> tuple[float, list[int]]:
    """The largest age of a token that is trained on, and the groups that decided the steps; each is followed by a push."""
    oldest, decisive = 0.0, []
    for _ in range(number):
        engine.version = sampler.window.taken
        collected = await sampler.collect(groups)
        oldest = max(oldest, token_ages(collected.groups, engine.version).get("rollout/age_max", 0.0))
        decisive += [group.prompt.metadata["i"] for group in collected.decisive]
        await asyncio.sleep(3.0)
    return oldest, decisive


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("m", "groups"), [(4, 4), (2, 4), (1, 4), (4, 2), (4, 1), (1, 1), (1, 8), (8, 4)])
def test_no_token_is_too_old_for_a_resumed_run_that_allows_less(m: int, groups: int, seed: int) -> None:
    engine = Dated(SCRIPT, random_latency(seed))

    async def first() -> dict[str, Any]:
        loader = FakeLoader()
        sampler = make(engine, max_staleness=4, loader=loader)
        assert (await dated_steps(sampler, engine, 8, 4))[0] <= 4
        engine.version = sampler.window.taken
        state = sampler.state_dict() | {"loader": loader.state_dict()}
        await sampler.stop()
        return state

    state = run(first())
    again = Dated(SCRIPT, random_latency(seed + 100))
    finished = {one.prompt.metadata["i"] for one in state["window"] if one.group}

    async def second() -> tuple[float, list[int]]:
        loader = FakeLoader()
        loader.load_state_dict(state["loader"])
        sampler = make(again, max_staleness=m, loader=loader)
        sampler.load_state_dict(state)
        found = await dated_steps(sampler, again, 24, groups)
        await sampler.stop()
        return found

    oldest, decisive = run(second())
    assert oldest <= m
    assert decisive == list(range(state["next_index"], state["next_index"] + len(decisive)))
    assert len(set(again.started)) == len(again.started), "a group was sampled twice"
    if m >= 4 and groups >= 4:
        assert not finished & set(again.started), "groups that are young enough were sampled anew"


# ------------------------------------------------------------------ on disk


def test_a_window_on_disk_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    prompt = Prompt("u", (3, 4), "1+1", "2", "source", {"a": 1})
    samples = (
        Sample((5, 6, 1), (-0.1, -1e-7, -3.0), "stop", (VersionSpan(1, 0, 2), VersionSpan(2, 2, 3))),
        Sample((7,), (-0.25,), "length", (VersionSpan(2, 0, 1),)),
    )
    verdicts = (Verdict(True, "2", None, 0.5), Verdict(False, error="late"))
    window = [
        OpenGroup(4, prompt, Group(prompt, samples, verdicts, 4)),
        OpenGroup(5, dataclasses.replace(prompt), None),
    ]
    window_file.write(tmp_path / "w", window)
    assert window_file.read(tmp_path / "w") == window
    window_file.write(tmp_path / "none", window[1:])
    assert window_file.read(tmp_path / "none") == window[1:]


def test_what_is_said_of_groups_may_be_longer_than_a_header_of_safetensors(tmp_path: Path) -> None:
    window = [OpenGroup(0, Prompt("u", (3,), "x" * 100_000_001, ""), None)]
    window_file.write(tmp_path / "w", window)
    assert window_file.read(tmp_path / "w") == window


def test_a_window_of_long_answers_takes_eight_bytes_a_token(tmp_path: Path) -> None:
    prompt = Prompt("u", (3, 4), "1+1", "2")
    sample = Sample(np.arange(20_000), np.zeros(20_000), "length", (VersionSpan(1, 0, 20_000),))
    group = Group(prompt, (sample,) * 4, (Verdict(True),) * 4, 0)
    window_file.write(tmp_path / "w", [OpenGroup(0, prompt, group)])
    assert (tmp_path / "w").stat().st_size < 8.1 * 4 * 20_000


def test_the_ages_of_tokens_are_counted_from_the_weights_that_train_on_them() -> None:
    prompt = Prompt("u", (1,), "", "")
    spans = (VersionSpan(3, 0, 2), VersionSpan(5, 2, 8))
    group = Group(prompt, (Sample((1,) * 8, (0.0,) * 8, "stop", spans),), (Verdict(True),))
    assert token_ages([group], 5) == {
        "rollout/age_mean": 0.5,
        "rollout/age_max": 2.0,
        "rollout/age_0": 0.75,
        "rollout/age_1": 0.0,
        "rollout/age_2": 0.25,
    }
    assert token_ages([dataclasses.replace(group, samples=(Sample((1,), (0.0,), "stop"),))], 5) == {}


@pytest.mark.parametrize(
    ("m", "cache", "newest"),
    [
        (0, InflightCache.keep, None),
        (1, InflightCache.recompute, [False] * 3 + [True] * 6),
        (1, InflightCache.keep, [False] * 9),
    ],
)
def test_a_batch_of_a_window_tells_which_tokens_the_weights_sampled_that_train_on_them(
    m: int, cache: InflightCache, newest: list[bool] | None
) -> None:
    spans = (VersionSpan(3, 0, 2), VersionSpan(5, 2, 8))
    group = Group(Prompt("u", (1,), "", ""), (Sample((1,) * 8, (0.0,) * 8, "stop", spans),), (Verdict(True),))
    controller: Any = SimpleNamespace(config=RunConfig(rollout=RolloutConfig(max_staleness=m, inflight_cache=cache)))
    batch = Controller._batch(controller, 6, [group], torch.zeros(1, 1))
    assert (batch.newest if batch.newest is None else batch.newest.tolist()) == newest


# ------------------------------------------------------------------ through the trainer


HELD_OUT = 10_000  # problems from here on are evaluated


class Ahead(Stub):
    """Policy and engine; the engine answers of the newest weights, and each update waits until it has answered much."""

    def __init__(self) -> None:
        super().__init__()
        self.version = self.answered = 0
        self.asked: list[int] = []
        self.meanwhile: list[int] = []  # groups answered during each update
        self.evaluated: list[tuple[int, int]] = []  # weights before and after each answer

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        version, length = self.version, 2 + prompt.metadata["i"] % 5
        if prompt.metadata["i"] >= HELD_OUT:
            await asyncio.sleep(0.05)
            self.evaluated.append((version, self.version))
        else:
            self.asked.append(prompt.metadata["i"])
            await asyncio.sleep(0.002 * length)
            self.answered += 1
        return [Sample((5,) * length, (-0.5,) * length, "stop", (VersionSpan(version, 0, length),))] * n

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        right = {"w": 0, "k": 1, "r": len(samples)}["wkkr"[prompt.metadata["i"] % 4]]
        return [Verdict(k < right) for k in range(len(samples))]

    def begin_update(self, version: int, seats: Any) -> Any:
        self.pushed = version
        return super().begin_update(version, seats)

    def finish_update(self, everyone: Any) -> None:
        self.version = self.pushed

    def update(self, *args: Any) -> dict[str, Any]:
        before = self.answered
        threading.Event().wait(0.05)
        self.meanwhile.append(self.answered - before)
        return super().update(*args)

    def metrics(self) -> dict[str, float]:
        return {}


class Prompts(FakeLoader):
    sets: tuple[Any, ...] = ()
    curriculum = Curriculum(0)

    def __init__(self) -> None:
        super().__init__()
        self.judged: list[str] = []

    def record(self, uid: str, correct: int, attempts: int) -> None:
        self.judged.append(uid)


class Records(Sinks):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, float]] = []

    def log(self, step: int, metrics: Any) -> None:
        self.records.append({"step": step, **metrics})


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclasses.dataclass
class Trained:
    stub: Ahead
    records: list[dict[str, float]]
    judged: list[str]  # problems that a step consumed, in order


def trained(folder: Path, m: int, max_steps: int, resumed: int | None = None, *, evaluates: bool = False) -> Trained:
    """A run of the real trainer, controller and sampler to `max_steps`, with a checkpoint after each step."""
    config = RunConfig(
        model=ModelConfig(path=str(model_folder(folder))),
        algorithm=AlgorithmConfig(prompts_per_step=2, group_size=G, minibatch_size=2 * G, importance_cap=2.0),
        trainer=TrainerConfig(max_steps=max_steps),
        rollout=RolloutConfig(max_staleness=m),
        evaluation=EvaluationConfig(every=1 if evaluates else 0, samples=1),
    )
    held_out = [dataclasses.replace(FakeLoader(HELD_OUT + i).next(), uid=f"held out {i}") for i in range(3)]
    config.logger.progress, config.checkpoint.every, config.checkpoint.keep = False, 1, 0
    stub, sink, loader = Ahead(), Records(), Prompts()
    eval_sets = {"held_out": held_out}
    prompts: Any = loader  # what a controller asks of it beyond the protocol, it has too
    controller = Controller(config, folder, stub, stub, prompts, eval_sets, sink, lambda ids: [""] * len(ids))
    try:
        DAPOTrainer(config, folder, stub, controller, None, resumed=resumed).fit()
    finally:
        controller.close()
    return Trained(stub, sink.records, loader.judged)


@pytest.mark.usefixtures("_one_rank")
def test_the_trainer_updates_while_groups_are_sampled_and_no_token_is_older_than_allowed(tmp_path: Path) -> None:
    run = trained(tmp_path, 2, max_steps=6)
    assert sum(run.stub.meanwhile) > 4
    assert max(record["rollout/age_max"] for record in run.records) in (1.0, 2.0)
    for record in run.records:  # the pair is judged by the newest tokens alone, which the stub scores alike
        newest = record["rollout/age_0"]
        assert record["train/gap"] == pytest.approx(OLDER_GAP * (1 - newest), abs=1e-6)
        assert record.get("rollout/logprob_gap") == (0.0 if newest else None)
    assert all(record["rollout/groups_kept"] == 2 for record in run.records)
    assert len(set(run.stub.asked)) == len(run.stub.asked)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("m", [0, 2])
def test_an_update_holds_no_group_that_its_step_has_passed(
    m: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's answers are gigabytes: they are in the batch, and need not be in memory twice."""
    update, held = DAPOTrainer.update, []

    def looking(self: DAPOTrainer, *args: Any) -> None:
        gc.collect()
        assert self.controller is not None
        front = self.controller.sampler.window.front
        held.append([one.index for one in gc.get_objects() if type(one) is Group and one.index < front])
        update(self, *args)

    monkeypatch.setattr(DAPOTrainer, "update", looking)
    trained(tmp_path, m, max_steps=3)
    assert held == [[], [], []]


@pytest.mark.usefixtures("_one_rank")
def test_an_evaluation_is_of_one_version_and_no_group_is_asked_for_again_because_of_it(tmp_path: Path) -> None:
    stub = trained(tmp_path, 2, max_steps=4, evaluates=True).stub
    assert stub.evaluated == [(version, version) for version in (1, 2, 3, 4) for _ in range(3)]
    assert len(set(stub.asked)) == len(stub.asked)


@pytest.mark.usefixtures("_one_rank")
def test_the_trainer_without_staleness_samples_nothing_during_an_update(tmp_path: Path) -> None:
    run = trained(tmp_path, 0, max_steps=3)
    assert run.stub.meanwhile == [0, 0, 0]
    assert {record["rollout/age_max"] for record in run.records} == {0.0}


@pytest.mark.usefixtures("_one_rank")
def test_a_trainer_that_resumes_takes_the_groups_of_its_checkpoint_and_none_twice(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", 2, max_steps=5)
    first = trained(tmp_path, 2, max_steps=3)
    saved = checkpoint.read_state(tmp_path / "checkpoints", 3)
    finished = {one.prompt.metadata["i"] for one in saved["window"] if one.group}
    assert finished, "the trainer was stopped without anything in its window"
    assert checkpoint.verify(tmp_path / "checkpoints" / "step_000003", None) == []
    second = trained(tmp_path, 2, max_steps=5, resumed=3)
    assert not finished & set(second.stub.asked)
    assert first.judged + second.judged == whole.judged
    assert [record["step"] for record in second.records] == [4, 5]


@pytest.mark.usefixtures("_one_rank")
def test_a_trainer_killed_with_a_full_window_goes_on_with_its_groups_each_exactly_once(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", 2, max_steps=30)
    killed = subprocess.Popen([sys.executable, "-m", "tests.test_sampling_window", str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 120
    try:
        while (checkpoint.latest(tmp_path / "checkpoints") or 0) < 3 and killed.poll() is None:
            assert time.monotonic() < deadline, "no third checkpoint"
            time.sleep(0.01)
    finally:
        killed.kill()
    assert killed.wait() == -signal.SIGKILL
    step = checkpoint.latest(tmp_path / "checkpoints")
    assert step is not None
    saved = checkpoint.read_state(tmp_path / "checkpoints", step)
    finished = {one.prompt.metadata["i"]: one.group for one in saved["window"] if one.group}
    assert sum(len(s.token_ids) for group in finished.values() for s in group.samples) > 0, (
        "tokens that starting over loses"
    )
    resumed = trained(tmp_path, 2, max_steps=step + 3, resumed=step)
    judged = saved["sampler"]["counters"]["groups_judged"]
    assert resumed.judged == whole.judged[judged : judged + len(resumed.judged)]
    assert not finished.keys() & set(resumed.stub.asked)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        trained(Path(sys.argv[1]), 2, max_steps=1000)
