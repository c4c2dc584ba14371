"""This trainer and TRL's GRPOTrainer(loss_type="dapo") on the same tasks.

    python benchmarks/versus_trl.py --task demo tail 30m --staleness 0 1

The same warm-started model, problems, group and batch sizes, learning rate and reward (1 or -1), in turn, each with the
whole machine: two ranks and a vLLM server here; there one process, which generates by transformers, in an environment of
its own under build/, with the newest TRL that the package index has. What differs is the recipe: ours samples groups until
enough are informative, TRL trains on all of them. `ours, m=1` samples a step ahead while the ranks train
(rollout.max_staleness), with the importance correction that this asks for. tasks.py says what the tasks are.

A line a step is read from each: seconds since training began until the step's answers are there, completion tokens, share
of right answers among all that were sampled. Each group is counted once, in the step that passes it. Tokens a second leave
out the first step, which warms up, and m more, which fill the window: after them it is as full at the end as at the start.
Accuracy 0.90 is reached where the mean of three steps is. Starting up is in none. The last line is JSON, medians over
rounds, by task and contestant: over TRL's tokens a second and seconds until 0.90, null where one did not get there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tasks import TASKS, Record, Task, rows, run, sampling_ahead  # noqa: E402
from nemo_dapo.data.formats.arithmetic import generate  # noqa: E402

BUILD = ROOT / "build" / "versus_trl"
TRL = "TRL"
GOAL, WINDOW = 0.90, 3  # accuracy, and over how many steps
PHASES = ("rollout", "logprobs", "update", "sync")  # of a step of ours
INSTALL = """
set -eu
base=$(sh "$1/requirements/find_python.sh")
"$base" -m venv "$2"
"$2/bin/python" -m pip install --quiet --disable-pip-version-check uv
. "$1/requirements/torch_source.sh"
"$2/bin/uv" pip install --quiet --python "$2/bin/python" torch trl
"""


@dataclass(frozen=True)
class Curve:
    """Of one run, a number a step: seconds until its answers were there, their tokens, share of right ones.

    The first `skipped` steps are no part of its speed.
    """

    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    accuracy: tuple[float, ...]
    skipped: int = 1

    @property
    def span(self) -> float:
        """Seconds from the last skipped step's answers to the last step's: each has one step's training in it."""
        return self.seconds[-1] - self.seconds[self.skipped - 1]

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens[self.skipped :]) / self.span

    @property
    def until_goal(self) -> float | None:
        for last in range(WINDOW, len(self.accuracy) + 1):
            if mean(self.accuracy[last - WINDOW : last]) >= GOAL:
                return self.seconds[last - 1]
        return None

    def __str__(self) -> str:
        reached = "not reached" if self.until_goal is None else f"after {self.until_goal:.1f} s"
        step = self.span / (len(self.seconds) - self.skipped)
        return (
            f"{self.tokens_per_second:6.0f} tokens/s, {step:.2f} s a step, "
            f"accuracy {self.accuracy[0]:.2f} to {self.accuracy[-1]:.2f}, {GOAL:.2f} {reached}"
        )


Contestant = Callable[[Task, Path, int], Curve]  # a task, the run's folder, a seed


def ours(task: Task, folder: Path, seed: int, *, steps: int, staleness: int) -> Curve:
    """Two ranks on the task's configuration, without evaluation and punishment of length."""
    options = {"seed": seed, "reward.overlong.buffer": 0, "evaluation.every": 0} | sampling_ahead(staleness)
    records = task.train(folder, steps, options)
    print(f"where {called(staleness)} spent a step: {phases(records[1 + staleness :])}", flush=True)
    before = [0.0, *accumulate(one["time/step"] for one in records)]
    return Curve(
        tuple(start + one["time/rollout"] for start, one in zip(before, records, strict=False)),
        tuple(one["rollout/generated_tokens"] for one in records),
        tuple(one["rollout/accuracy"] for one in records),
        skipped=1 + staleness,
    )


def called(staleness: int) -> str:
    return "ours" + (f", m={staleness}" if staleness else "")


def phases(records: list[Record]) -> str:
    """Mean seconds of each phase of a step, and what none of them has; `rollout` is the wait for answers."""
    spent = {name: mean(one.get(f"time/{name}", 0.0) for one in records) for name in PHASES}
    spent["rest"] = mean(one["time/step"] for one in records) - sum(spent.values())
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())


def theirs(task: Task, folder: Path, seed: int, *, steps: int) -> Curve:
    experiment = task.experiment
    algorithm, optimizer = experiment.algorithm, experiment.optimizer
    options = {
        "steps": steps,
        "seed": seed,
        "updates": task.updates,
        "lr": optimizer.lr,
        "warmup_steps": optimizer.warmup_steps,
        "group_size": algorithm.group_size,
        "minibatch_size": algorithm.minibatch_size,
        "max_tokens": experiment.rollout.max_response_length,
        "threads": 2,
    }
    output = folder / "steps.jsonl"
    job = [str(BUILD / "venv" / "bin" / "python"), "benchmarks/trl_job.py", str(task.model), str(problems(task))]
    run([*job, str(output), json.dumps(options)], folder / "log.txt", threads=2)
    records = rows(output)
    seconds, tokens, accuracy = (tuple(one[name] for one in records) for name in ("seconds", "tokens", "accuracy"))
    return Curve(seconds, tokens, accuracy)


def problems(task: Task) -> Path:
    """A file of the task's prompts and answers."""
    experiment = task.experiment
    data, path = experiment.data.train.arithmetic, BUILD / f"problems_{task.name}.jsonl"
    with path.open("w") as file:
        for item in generate(data.num_problems, 0, data.max_digits):
            prompt = experiment.data.template.format(problem=item.problem)
            print(json.dumps({"prompt": prompt, "answer": item.answer}), file=file)
    return path


def install() -> None:
    """TRL's environment, once."""
    venv, ready = BUILD / "venv", BUILD / "venv" / ".complete"
    if not ready.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run(["sh", "-c", INSTALL, "sh", str(ROOT), str(venv)], check=True)
        ready.touch()


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Of the medians; None where a run of either has none."""
    if None in ours or None in theirs:
        return None
    return round(median(x for x in ours if x is not None) / median(x for x in theirs if x is not None), 2)


def measure(task: Task, contestants: dict[str, Contestant], rounds: int) -> dict[str, list[Curve]]:
    """Every contestant in each round; every other round the other way round."""
    task.prepare()
    place = BUILD / time.strftime(f"{task.name}-%Y%m%d-%H%M%S")
    curves: dict[str, list[Curve]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            folder = place / f"{name.replace(', m=', '_m')}_{number}"
            curves[name].append(contestants[name](task, folder, number))
            print(f"{task.name}, round {number + 1}, {name:9}: {curves[name][-1]}", flush=True)
    return curves


def compared(found: dict[str, dict[str, list[Curve]]], figure: Callable[[Curve], float | None]) -> dict[str, Any]:
    """By task and contestant: `figure` over TRL's."""
    return {
        task: {
            name: ratio([*map(figure, runs)], [*map(figure, curves[TRL])])
            for name, runs in curves.items()
            if name != TRL
        }
        for task, curves in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["demo"])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0], help="m of our contestants")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--trl-steps", type=int, help="of TRL's, where fewer are enough to know its speed")
    args = parser.parse_args()
    trl_steps = args.trl_steps or args.steps
    if min(args.steps - max(args.staleness), trl_steps) < 2:
        parser.error("1 + m steps of ours and one of TRL's are no part of the speed: a run needs one more at least")
    install()
    contestants: dict[str, Contestant] = {
        called(m): partial(ours, staleness=m, steps=args.steps) for m in args.staleness
    }
    contestants[TRL] = partial(theirs, steps=trl_steps)
    found = {name: measure(TASKS[name], contestants, args.rounds) for name in args.task}
    tokens, goals = (
        compared(found, figure) for figure in (lambda one: one.tokens_per_second, lambda one: one.until_goal)
    )
    print(json.dumps({"tokens_ratio": tokens, "time_to_090_ratio": goals}))


if __name__ == "__main__":
    main()
