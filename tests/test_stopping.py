"""A run that can learn nothing stops, through the real controller, sampler and reward workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_dapo.config import AlgorithmConfig, LoggerConfig, RewardConfig, RunConfig
from nemo_dapo.controller import Controller
from nemo_dapo.data.curriculum import Curriculum
from nemo_dapo.detokenizer import decoder_of
from nemo_dapo.rewards.pool import RewardPool
from nemo_dapo.telemetry.sinks import Sinks
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams
from tests.fakes import FakeEngine, FakeLoader
from tests.tiny import said, tiny_tokenizer

pytestmark = pytest.mark.slow


class Loader(FakeLoader):
    sets: tuple[Any, ...] = ()
    curriculum = Curriculum(0)

    def prompt(self, i: int) -> Prompt:
        return Prompt(f"p{i}", (1,), "1+1", "2")


class Engine(FakeEngine):
    """Every sample says the same."""

    text = "raise"

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        return [said(self.text)] * n


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool("reward_functions:misbehave", tiny_tokenizer(), workers=1) as pool:
        yield pool


def controller(folder: Path, pool: RewardPool, **reward: Any) -> Controller:
    config = RunConfig(
        reward=RewardConfig(**reward),
        algorithm=AlgorithmConfig(prompts_per_step=2, group_size=4, max_empty_steps=2),
        logger=LoggerConfig(rollout_every=1, rollout_tokens=True, progress=False),
    )
    config.reward.overlong.buffer = 0
    loader: Any = Loader()  # what a controller asks of it beyond the protocol, it has too
    return Controller(config, folder, Engine(), pool, loader, {}, Sinks(), decoder_of(tiny_tokenizer()))


def test_a_reward_that_always_raises_is_said_at_once_and_ends_the_run_in_its_first_step(
    tmp_path: Path, pool: RewardPool, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match=r"failed on 8 of 8 samples.*8 x exception: KeyError: 'missing'\. Mend the"):
        asyncio.run(controller(tmp_path, pool).collect(1))
    assert [r.getMessage() for r in caplog.records if "KeyError: 'missing'" in r.getMessage()] != []


def test_steps_without_a_group_are_counted_through_a_checkpoint_and_recorded_whole(
    tmp_path: Path, pool: RewardPool
) -> None:
    first = controller(tmp_path, pool, max_error_rate=1.0)
    rollout = asyncio.run(first.collect(1))
    assert (rollout.groups, rollout.batch.num_sequences) == ((), 0)
    assert rollout.metrics["rollout/verifier_errors"] == 20 * 4
    recorded = pq.read_table(tmp_path / "rollouts" / "step_000001.parquet")
    assert set(recorded["error"].to_pylist()) == {"exception: KeyError: 'missing'"}
    assert set(recorded["response"].to_pylist()) == {"raise"}
    assert recorded["logprobs"].to_pylist() == [[-0.5] * len("raise")] * 80
    second = controller(tmp_path, pool, max_error_rate=1.0)
    second.load_state_dict(first.state_dict())
    with pytest.raises(
        RuntimeError, match=r"2 steps in a row had no group to train on.*20 verifier error.*mend the reward"
    ):
        asyncio.run(second.collect(2))
