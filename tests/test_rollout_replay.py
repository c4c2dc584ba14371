"""A recorded run played back through the real sampler: the same groups, in the same order, or a word on what differs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dapo.batching import make_batch
from nemo_dapo.collected import Collected, DropReason
from nemo_dapo.interfaces import RolloutEngine
from nemo_dapo.rollout import replay
from nemo_dapo.rollout.replay import ReplayEngine
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.telemetry.rollouts import read_rollouts, rollouts_path, write_rollouts
from nemo_dapo.types import Draft, Group, Prompt, Sample, SamplingParams, Verdict, VersionSpan
from tests.fakes import FakeEngine, FakeLoader

N, G = 3, 4
BROKEN = 999


class Loader(FakeLoader):
    """Seven problems over and over: a step asks for the same one several times."""

    def prompt(self, i: int) -> Prompt:
        i %= 7
        return Prompt(f"p{i}", (i, i + 1), f"problem {i}", str(i % 3))


class Engine(FakeEngine):
    """Random tokens, lengths and times, another course with each seed; some calls are aborted, broken, right or wrong."""

    def __init__(self, seed: int) -> None:
        self.random, self.version, self.calls = random.Random(seed), 0, seed

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        self.calls += 1
        call, truth = self.calls, int(prompt.ground_truth)
        await asyncio.sleep(self.random.random() / 500)
        reason = "abort" if call % 11 == 3 else "stop"
        remainders = {1: [truth], 2: [(truth + 1) % 3]}.get(call % 6, [0, 1, 2])
        samples = [self._sample(reason, self.random.choice(remainders)) for _ in range(n)]
        return [Sample((BROKEN,), (0.0,), reason), *samples[1:]] if call % 9 == 2 else samples

    def _sample(self, reason: str, remainder: int) -> Sample:
        length = self.random.randrange(1, 9)
        tokens = (3 * self.random.randrange(300) + remainder, *(self.random.randrange(1000) for _ in range(length - 1)))
        logprobs = tuple(-self.random.random() * 3 for _ in range(length))
        return Sample(tokens, logprobs, reason, (VersionSpan(self.version, 0, length),))


class Judge:
    """Fails on the token BROKEN, so that errors are replayed too."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        broken = [s.token_ids[0] == BROKEN for s in samples]
        right = [int(s.token_ids[0]) % 3 == (int(prompt.ground_truth) + self.shift) % 3 for s in samples]
        return [
            Verdict(False, error="out of range") if bad else Verdict(good)
            for bad, good in zip(broken, right, strict=True)
        ]


def make(engine: RolloutEngine, judge: Judge | None = None) -> GroupSampler:
    return GroupSampler(engine, judge or Judge(), Loader(), group_size=G, params=SamplingParams())


def record(folder: Path, seed: int, steps: int = 5) -> tuple[list[Collected], list[dict[str, Any]]]:
    """What each step collected, and the states of sampler and loader before it."""
    engine = Engine(seed)
    sampler, found, states = make(engine), [], []
    for step in range(1, steps + 1):
        engine.version = step - 1
        states.append({"sampler": sampler.state_dict(), "loader": sampler.loader.state_dict()})
        found.append(asyncio.run(sampler.collect(N)))
        write(folder, step, found[-1].decisive)
    return found, states


def write(folder: Path, step: int, groups: list[Group], **options: Any) -> None:
    numbers = [[0.0] * G] * len(groups)
    usual: dict[str, Any] = {"tokens": True, "max_mb": 1, "decode": lambda responses: [""] * len(responses)}
    write_rollouts(rollouts_path(folder, step), groups, numbers, numbers, step=step, **(usual | options))


def essence(collected: Collected) -> tuple[Any, ...]:
    """All that a step is: what is trained on, bit for bit, and why the other groups were not."""
    batch = make_batch(collected.groups, torch.zeros(len(collected.groups), G))
    within = [(d.index, d.prompt.uid, d.reason) for d in collected.dropped if d.reason is not DropReason.surplus]
    verdicts = [g.verdicts for g in collected.groups]
    spans = [s.versions for g in collected.groups for s in g.samples]
    return within, verdicts, spans, batch.tokens.tolist(), batch.rollout_logprobs.tolist(), batch.lengths.tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("start", [0, 3])
def test_a_replay_takes_the_recorded_course_from_the_start_and_from_the_middle(
    start: int, seed: int, tmp_path: Path
) -> None:
    recorded, states = record(tmp_path, seed)
    engine = ReplayEngine(tmp_path)
    sampler = make(engine)
    sampler.load_state_dict(states[start]["sampler"])
    sampler.loader.load_state_dict(states[start]["loader"])
    for step in range(start, 5):
        engine.begin_update(step)
        assert essence(asyncio.run(sampler.collect(N))) == essence(recorded[step])
    engine.begin_update(5)  # as the trainer does after its last step; nothing is recorded of a sixth


def test_what_is_recorded_covers_every_reason_that_a_group_may_be_dropped_for(tmp_path: Path) -> None:
    reasons = {d.reason for seed in range(6) for c in record(tmp_path, seed)[0] for d in c.dropped}
    assert reasons == set(DropReason), "the courses above leave a case out"


def course(engine: ReplayEngine, judge: Judge | None = None, steps: int = 5) -> None:
    sampler = make(engine, judge)
    for step in range(steps):
        engine.begin_update(step)
        asyncio.run(sampler.collect(N))
    engine.begin_update(steps)


def test_another_reward_is_noticed_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SURPLUS_SECONDS", 0.2)
    record(tmp_path, seed=0)
    with pytest.raises(RuntimeError, match=r"the verdicts are not those of the recorded run|was of prompt"):
        course(ReplayEngine(tmp_path), Judge(shift=1))


def test_other_data_or_group_sizes_are_noticed_at_once(tmp_path: Path) -> None:
    record(tmp_path, seed=0)
    engine = ReplayEngine(tmp_path)
    sampler = make(engine)
    sampler.loader.next()  # one further than the recorded run began
    with pytest.raises(
        RuntimeError, match="step 1, group 0 was of prompt p0, the run asks for p1; replay with the options"
    ):
        asyncio.run(sampler.collect(N))
    sampler = make(ReplayEngine(tmp_path))
    sampler.group_size = G + 1
    with pytest.raises(RuntimeError, match=f"has {G} samples, the run asks for {G + 1}"):
        asyncio.run(sampler.collect(N))


def test_a_step_that_is_missing_or_not_whole_is_said(tmp_path: Path) -> None:
    recorded, _ = record(tmp_path, seed=0, steps=2)
    with pytest.raises(RuntimeError, match=r"step_000003\.parquet is missing: recorded are steps 1 to 2"):
        course(ReplayEngine(tmp_path), steps=3)
    groups = recorded[0].decisive
    write(tmp_path, 1, groups, tokens=False)
    with pytest.raises(RuntimeError, match=r"lacks .*record with logger.rollout_tokens=true"):
        course(ReplayEngine(tmp_path))
    long = tuple(random.Random(0).randrange(2**31) for _ in range(100_000))
    big = [Group(g.prompt, (Sample(long, (0.0,), "stop"),) * G, (Verdict(True),) * G, g.index) for g in groups[:2]]
    write(tmp_path, 1, big)
    with pytest.raises(RuntimeError, match=r"holds 0 of the step's 2 groups: record with logger.rollout_max_mb raised"):
        course(ReplayEngine(tmp_path))
    with pytest.raises(ValueError, match=r"holds no step_\*\.parquet"):
        ReplayEngine(tmp_path / "elsewhere")


def test_log_probabilities_come_back_as_the_batch_has_them(tmp_path: Path) -> None:
    values = (-0.1, -1e-8, -1 / 3, -123.456, 0.0)
    samples = (Sample((1, 2, 3, 4, 2**31 - 1), values, "length"),) * G
    write(tmp_path, 1, [Group(Prompt("u", (7, 8), "p", "1"), samples, (Verdict(True),) * G, 5)])
    (group,) = read_rollouts(rollouts_path(tmp_path, 1))
    assert (group.index, group.uid, group.prompt_token_ids) == (5, "u", (7, 8))
    assert group.samples == samples
