"""This trainer and TRL's GRPOTrainer(loss_type="dapo") on the demo's task: `python benchmarks/versus_trl.py`.

The same warm-started model, problems, group and batch sizes, learning rate and reward (1 or -1), in turn, each with the
whole machine: two ranks and a vLLM server here; there one process, which generates by transformers, in an environment of
its own under build/, with the newest TRL that the package index has. What differs is the recipe: ours samples groups until
enough are informative, TRL trains on all of them.

A line a step is read from either: seconds since training began until the step's answers are there, completion tokens, share
of right answers among all that were sampled. Tokens a second leave the first step out. Accuracy 0.90 is reached where the
mean of three steps is. Starting up is in neither. The last line is JSON, medians over rounds: ours over TRL's tokens a
second and seconds until 0.90, null where one did not get there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_dapo.data.formats.arithmetic import generate  # noqa: E402

BUILD = ROOT / "build" / "versus_trl"
EXPERIMENT = OmegaConf.load(ROOT / "conf" / "experiment" / "demo.yaml")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
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
    """Of one run, a number a step: seconds until its answers were there, their tokens, share of right ones."""

    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """From one step's answers to the next one's: what lies between was generated, judged and trained on."""
        return sum(self.tokens[1:]) / (self.seconds[-1] - self.seconds[0])

    @property
    def until_goal(self) -> float | None:
        for last in range(WINDOW, len(self.accuracy) + 1):
            if mean(self.accuracy[last - WINDOW : last]) >= GOAL:
                return self.seconds[last - 1]
        return None

    def __str__(self) -> str:
        reached = "not reached" if self.until_goal is None else f"after {self.until_goal:.1f} s"
        steps = len(self.seconds)
        return (
            f"{self.tokens_per_second:6.0f} tokens/s, {(self.seconds[-1] - self.seconds[0]) / (steps - 1):.2f} s a step, "
            f"accuracy {self.accuracy[0]:.2f} to {self.accuracy[-1]:.2f}, {GOAL:.2f} {reached}"
        )


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ours(model: Path, folder: Path, seed: int, steps: int) -> Curve:
    """Two ranks on the demo's configuration, without evaluation, punishment of length or export."""
    options = {
        "model.path": model,
        "output_dir": folder,
        "seed": seed,
        "trainer.max_steps": steps,
        "optimizer.decay_steps": steps * updates(),
        "reward.overlong.buffer": 0,
        "evaluation.every": 0,
        "evaluation.at_start": "false",
        "checkpoint.every": 0,
        "checkpoint.export": "false",
    }
    run(
        [*TORCHRUN, "examples/train_dapo.py", "experiment=demo", *(f"{k}={v}" for k, v in options.items())],
        folder / "log.txt",
        threads=1,
    )
    records = rows(folder / "metrics.jsonl")
    print(f"where ours spent a step: {phases(records)}", flush=True)
    before = [0.0, *accumulate(one["time/step"] for one in records)]
    return Curve(
        tuple(start + one["time/rollout"] for start, one in zip(before, records, strict=False)),
        tuple(one["rollout/generated_tokens"] for one in records),
        tuple(one["rollout/accuracy"] for one in records),
    )


def phases(records: list[dict[str, float]]) -> str:
    """Mean seconds of each phase of a step, and what none of them has; the first step, which also warms up, left out."""
    spent = {name: mean(one.get(f"time/{name}", 0.0) for one in records[1:]) for name in PHASES}
    spent["rest"] = mean(one["time/step"] for one in records[1:]) - sum(spent.values())
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())


def updates() -> int:
    """Optimizer steps on one step's samples."""
    algorithm = EXPERIMENT.algorithm
    return int(algorithm.prompts_per_step * algorithm.group_size // algorithm.minibatch_size)


def theirs(model: Path, folder: Path, seed: int, steps: int) -> Curve:
    algorithm, optimizer = EXPERIMENT.algorithm, EXPERIMENT.optimizer
    options = {
        "steps": steps,
        "seed": seed,
        "updates": updates(),
        "lr": optimizer.lr,
        "warmup_steps": optimizer.warmup_steps,
        "group_size": algorithm.group_size,
        "minibatch_size": algorithm.minibatch_size,
        "max_tokens": EXPERIMENT.rollout.max_response_length,
        "threads": 2,
    }
    output = folder / "steps.jsonl"
    job = [str(BUILD / "venv" / "bin" / "python"), "benchmarks/trl_job.py", str(model), str(BUILD / "problems.jsonl")]
    run([*job, str(output), json.dumps(options)], folder / "log.txt", threads=2)
    records = rows(output)
    return Curve(*(tuple(one[name] for one in records) for name in ("seconds", "tokens", "accuracy")))


def run(command: list[str], log: Path, threads: int) -> None:
    """Raises CalledProcessError, after the end of its log, for a command that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        print(log.read_text()[-4000:], file=sys.stderr)
    done.check_returncode()


def prepare() -> Path:
    """TRL's environment, the problems and the model, each made once; returns the model."""
    BUILD.mkdir(parents=True, exist_ok=True)
    venv, ready = BUILD / "venv", BUILD / "venv" / ".complete"
    if not ready.exists():
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run(["sh", "-c", INSTALL, "sh", str(ROOT), str(venv)], check=True)
        ready.touch()
    data = EXPERIMENT.data.train.arithmetic
    template = EXPERIMENT.data.template
    with (BUILD / "problems.jsonl").open("w") as file:
        for item in generate(data.num_problems, 0, data.max_digits):
            print(json.dumps({"prompt": template.format(problem=item.problem), "answer": item.answer}), file=file)
    model = BUILD / "model"
    run([sys.executable, "examples/demo/prepare.py", "--output", str(model)], BUILD / "model.log", threads=2)
    return model


def ratio(ours: list[float | None], theirs: list[float | None]) -> float | None:
    """Of the medians; None where a run of either has none."""
    if None in ours or None in theirs:
        return None
    return round(median(x for x in ours if x is not None) / median(x for x in theirs if x is not None), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["demo"], nargs="+", default=["demo"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    args = parser.parse_args()
    model = prepare()
    runs, place = {"ours": ours, "TRL": theirs}, BUILD / time.strftime("%Y%m%d-%H%M%S")
    curves: dict[str, list[Curve]] = {name: [] for name in runs}
    for number in range(args.rounds):
        for name in sorted(runs, reverse=bool(number % 2)):  # each first in half of the rounds
            curves[name].append(runs[name](model, place / f"{name}_{number}", number, args.steps))
            print(f"round {number + 1}, {name:4}: {curves[name][-1]}", flush=True)
    speeds = [[one.tokens_per_second for one in curves[name]] for name in ("ours", "TRL")]
    goals = [[one.until_goal for one in curves[name]] for name in ("ours", "TRL")]
    print(json.dumps({"tokens_ratio": {"demo": ratio(*speeds)}, "time_to_090_ratio": {"demo": ratio(*goals)}}))


if __name__ == "__main__":
    main()
