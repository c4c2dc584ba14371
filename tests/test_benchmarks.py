"""The benchmarks that need neither GPU nor vLLM still run, at a small size; what they measure is no matter of a test."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import sampler, versus_trl
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams

ROOT = Path(__file__).parents[1]
SMALL = "--groups 4 --group 4 --tokens 3000 --in-flight 16 --replicas 3 --servers 2 --ranks 2 --frames-per-second 0"


def test_the_controller_s_cost_is_measured_from_socket_to_microbatches() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "controller.py"), *SMALL.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tokens"] == 4 * 4 * 3000
    assert (
        8 < said["bytes_per_token"] < 9
    )  # ids and log-probabilities are 8; frames of 1,024 tokens add a few bytes each
    assert min(said["cpu_seconds"], said["peak_gib"], said["longest_block_ms"]) > 0


class Instant:
    """An engine that answers at once, with as many tokens as asked for, and counts them."""

    def __init__(self, work: sampler.Work) -> None:
        self.work, self.made = work, 0

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        await asyncio.sleep(0)
        lengths = self.work.lengths(prompt.uid)[:n]
        self.made += sum(lengths)
        return [Sample([1] * length, [0.0] * length, "length") for length in lengths]

    def generated(self) -> float:
        return self.made


@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_the_recipe_and_our_sampler_train_on_the_same_groups_of_one_stream(rate: float) -> None:
    """Of a single batch: in a second one the recipe is further in the stream by what it threw away."""
    work = sampler.Work(groups=4, group_size=4, median=60, longest=1000)
    rounds = asyncio.run(sampler.in_rounds(Instant(work), work, 1, "seed", rate))  # type: ignore[arg-type]
    assert rounds.generated >= rounds.needed >= rounds.trained
    assert rate < 1 or rounds.needed == rounds.trained
    ours = asyncio.run(sampler.sampled(Instant(work), work, 1, "seed", rate, 0))  # type: ignore[arg-type]
    assert (ours.needed, ours.trained) == (rounds.needed, rounds.trained)
    assert ours.needed <= ours.generated <= rounds.generated


def test_a_window_is_filled_before_it_is_measured() -> None:
    work = sampler.Work(groups=4, group_size=4, median=60, longest=1000)
    whole, late = (
        asyncio.run(sampler.sampled(Instant(work), work, batches, "seed", 0.5, staleness))  # type: ignore[arg-type]
        for batches, staleness in ((3, 0), (2, 1))
    )
    first = asyncio.run(sampler.sampled(Instant(work), work, 1, "seed", 0.5, 0))  # type: ignore[arg-type]
    assert late.trained == whole.trained - first.trained  # the second and third batch
    assert late.needed == whole.needed - first.needed


def test_lengths_have_the_median_asked_for_and_a_heavy_tail() -> None:
    work = sampler.Work(groups=4, group_size=8, median=60, longest=1000)
    lengths = sorted(length for uid in range(2000) for length in work.lengths(str(uid)))
    assert 55 <= lengths[len(lengths) // 2] <= 65  # the median's standard error is 1.4, most of it the prompts'
    assert lengths[0] >= 8
    assert lengths[-1] == 1000
    longest_tenth = lengths[-len(lengths) // 10 :]
    assert sum(longest_tenth) > 0.35 * sum(lengths)  # of an exponential distribution: 0.33


def test_the_goal_is_reached_by_the_mean_of_three_steps() -> None:
    curve = versus_trl.Curve((1, 2, 3, 5, 6), (50, 10, 20, 30, 40), (0.5, 0.95, 0.92, 0.7, 1.0))
    assert curve.until_goal is None
    assert curve.tokens_per_second == 100 / 5  # the first step's tokens were there before the clock began
    assert versus_trl.Curve((1, 2, 3, 5), (1,) * 4, (0.5, 0.85, 0.95, 0.92)).until_goal == 5
    assert versus_trl.ratio([2.0, 4.0, 9.0], [8.0, 8.0, 1.0]) == 0.5
    assert versus_trl.ratio([2.0, None], [1.0, 1.0]) is None
