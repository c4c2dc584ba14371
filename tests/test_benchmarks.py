"""The benchmarks that need neither GPU nor vLLM still run, at a small size; what they measure is no matter of a test."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import grown, heavy_tail, sampler, tasks, versus_trl
from examples.demo import prepare
from nemo_dapo import entry
from nemo_dapo.config import compose
from nemo_dapo.config.checks import validate
from nemo_dapo.data.formats.arithmetic import Sum, generate
from nemo_dapo.rewards import math
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams

ROOT = Path(__file__).parents[1]
RECIPE = prepare.Recipe(template="{problem}", max_digits=2, intermediate=64, layers=1)
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
    assert curve.__class__(curve.seconds, curve.tokens, curve.accuracy, skipped=2).tokens_per_second == 90 / 4
    assert versus_trl.ratio([2.0, 4.0, 9.0], [8.0, 8.0, 1.0]) == 0.5
    assert versus_trl.ratio([2.0, None], [1.0, 1.0]) is None


def test_ratios_are_over_trl_by_task_and_contestant() -> None:
    fast, slow = (versus_trl.Curve((1, 2, 2 + seconds), (0, 0, 60), (1.0,) * 3) for seconds in (3, 5))
    found = {"tail": {"ours": [fast], versus_trl.TRL: [slow]}}
    assert versus_trl.compared(found, lambda one: one.tokens_per_second) == {"tail": {"ours": 1.5}}


def test_the_command_runs_contestants_in_turn_and_says_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int, int, int]] = []

    def curve(task: tasks.Task, folder: Path, seed: int, *, steps: int, staleness: int = -1) -> versus_trl.Curve:
        assert "=" not in str(folder), "hydra takes the folder from the command line"
        ran.append((task.name, seed, staleness, steps))
        return versus_trl.Curve((1, 3, 3 + steps), (1, 1, 90), (0.9,) * 3, skipped=2)

    monkeypatch.setattr(versus_trl, "BUILD", tmp_path)
    monkeypatch.setattr(versus_trl, "ours", curve)
    monkeypatch.setattr(versus_trl, "theirs", curve)
    monkeypatch.setattr(versus_trl, "install", lambda: None)
    monkeypatch.setattr(tasks.Task, "prepare", lambda self: None)
    said = ["x", "--task", "tail", "--staleness", "0", "1", "--rounds", "2", "--steps", "6", "--trl-steps", "3"]
    monkeypatch.setattr(sys, "argv", said)
    versus_trl.main()
    first = [("tail", 0, 0, 6), ("tail", 0, 1, 6), ("tail", 0, -1, 3)]
    assert ran == first + [(name, 1, *rest) for name, _, *rest in reversed(first)]
    ratios = {"tail": {"ours": 0.5, "ours, m=1": 0.5}}  # 90 tokens in six seconds over 90 in three
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "tokens_ratio": ratios,
        "time_to_090_ratio": {"tail": {"ours": 1.5, "ours, m=1": 1.5}},  # nine seconds over six
    }
    monkeypatch.setattr(sys, "argv", [*said[:-4], "--steps", "2"])
    with pytest.raises(SystemExit):
        versus_trl.main()


def test_answers_of_the_heavy_tailed_task_are_right_and_as_long_as_it_says() -> None:
    recipe, rng = dataclasses.replace(heavy_tail.recipe(), forget_carry=0.0, miscount=0.0), random.Random(0)
    lengths = []
    for one in generate(2000, 0, recipe.max_digits):
        text = recipe.response(one, rng)
        lines, worked = text.split(one.solution)
        letters = {line[0] for line in lines.splitlines()}
        assert worked == ""
        assert math.verify(text, one.answer).correct
        assert len(letters) == 1  # one way
        assert set(lines.splitlines()) == {letters.pop() + heavy_tail.columns(one, 4)}
        lengths.append(len(text) - len("nswer") + 1)  # tokens: `Answer` is one, and the end is one
    low, middle, high, longest = heavy_tail.quantiles(lengths)
    assert min(lengths) < 25 <= low
    assert 55 <= middle <= 65  # the median's standard error is 1
    assert 280 <= high <= 420  # and of this quantile, 16
    assert 900 < longest <= recipe.max_response


def test_columns_are_written_down_from_the_right() -> None:
    assert heavy_tail.columns(Sum(372, 9805), 4) == "25703809"
    assert heavy_tail.columns(Sum(72, 5), 2) == "2570"


def test_a_grown_model_has_the_small_one_s_logits_and_a_gradient_wherever_it_grew() -> None:
    larger = dataclasses.replace(RECIPE, hidden=256, intermediate=96, heads=8, kv_heads=4, layers=2)
    small = prepare.build_model(RECIPE)
    config = prepare.model_config(larger)
    assert isinstance(small, Qwen2ForCausalLM)
    assert isinstance(config, Qwen2Config)
    large = grown.grown(small, config)
    tokens = torch.arange(2, 42).view(2, 20)
    expected = small(input_ids=tokens).logits
    logits = large(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # sums of other lengths round otherwise
    logits.square().sum().backward()
    written = large.model.layers[1].mlp.down_proj.weight.grad
    assert written.abs().amin(1).gt(0).any()  # by new neurons of a new layer
    assert large.model.layers[0].self_attn.o_proj.weight.grad[:, 128:].abs().amax(0).gt(0).all()  # by new heads


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_s_configuration_is_one_that_a_run_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "BUILD", tmp_path)
    task = tasks.TASKS[name]
    longest = task.experiment.rollout.vllm.max_model_len
    prepare.build_model(dataclasses.replace(RECIPE, max_positions=longest)).save_pretrained(task.model)
    compose.register()
    for steps, until in ((3, 11), (20, 40)):  # the rate decays to zero, or still rises when the run ends
        run = entry.composed(ROOT / "conf" / "config.yaml", task.arguments(steps, {"evaluation.every": 0}))
        assert run is not None
        validate(run, world_size=2)
        assert run.optimizer.decay_steps == until
        assert run.rollout.max_response_length == task.experiment.rollout.max_response_length
