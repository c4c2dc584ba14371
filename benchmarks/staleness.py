"""What sampling ahead costs in accuracy and saves in time: the tasks of tasks.py with several `rollout.max_staleness`.

    python benchmarks/staleness.py --task demo tail --staleness 0 1 2 4 --uncorrected 4 --seeds 0 1 2 --steps 60

Each contestant trains a task's model from the same start, with the importance correction that m > 0 asks for, those of
`--uncorrected` without any, which the trainer itself refuses. Contestants take turns within a seed, each with the whole
machine. A run is judged once, after its last step, by eight answers a held-out problem. Its seconds are those of its steps,
from the first wait for answers to the last push of weights; starting and judging are not in them.

A table a task, means over seeds with the smallest and the largest accuracy; the last line is JSON, by task and contestant
each seed's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tasks import SCRIPT, TASKS, Task, sampling_ahead  # noqa: E402

BUILD = ROOT / "build" / "staleness"
SAMPLES = 8
HEAD = """| | accuracy | seconds | seconds a step | mean age | oldest |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Contestant:
    staleness: int
    corrected: bool = True

    def __str__(self) -> str:
        return f"m={self.staleness}" + ("" if self.corrected else " without correction")

    @property
    def script(self) -> str:
        return SCRIPT if self.corrected else "benchmarks/uncorrected_job.py"


@dataclass(frozen=True)
class Result:
    """Of one run. Ages are in pushes of weights: the mean over its tokens, and the largest of any."""

    accuracy: float
    seconds: float
    steps: int
    mean_age: float
    oldest: float


def train(contestant: Contestant, task: Task, folder: Path, seed: int, steps: int) -> Result:
    options = {"seed": seed, "evaluation.every": steps, "evaluation.samples": SAMPLES}
    options |= sampling_ahead(contestant.staleness, corrected=contestant.corrected)
    records = task.train(folder, steps, options, contestant.script)
    trained = [one for one in records if one["rollout/kept_tokens"]]
    tokens = [one["rollout/kept_tokens"] for one in trained]
    return Result(
        accuracy=records[-1][f"eval/arithmetic/avg@{SAMPLES}"],
        seconds=sum(one["time/step"] for one in records),
        steps=len(records),
        mean_age=sum(n * one["rollout/age_mean"] for n, one in zip(tokens, trained, strict=True)) / sum(tokens),
        oldest=max(one["rollout/age_max"] for one in trained),
    )


def row(name: str, results: list[Result]) -> str:
    accuracies = [one.accuracy for one in results]
    seconds = mean(one.seconds for one in results)
    return (
        f"| {name} | {mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f}) | {seconds:.0f} "
        f"| {seconds / results[0].steps:.2f} | {mean(one.mean_age for one in results):.2f} "
        f"| {max(one.oldest for one in results):.0f} |"
    )


def compare(task: Task, contestants: list[Contestant], seeds: list[int], steps: int) -> dict[str, list[Result]]:
    task.prepare()
    place = BUILD / time.strftime(f"{task.name}-%Y%m%d-%H%M%S")
    found: dict[str, list[Result]] = {str(one): [] for one in contestants}
    for seed in seeds:
        for number, one in enumerate(contestants):
            found[str(one)].append(train(one, task, place / f"{number}_{seed}", seed, steps))
            print(f"{task.name}, seed {seed}, {one}: {found[str(one)][-1]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["demo"])
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2, 4], help="m, with correction above 0")
    parser.add_argument("--uncorrected", type=int, nargs="*", default=[4], help="m, without")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    contestants = [*map(Contestant, args.staleness), *(Contestant(m, corrected=False) for m in args.uncorrected)]
    found = {name: compare(TASKS[name], contestants, args.seeds, args.steps) for name in args.task}
    for name, by_contestant in found.items():
        print("\n".join([name, HEAD, *(row(one, results) for one, results in by_contestant.items())]))
    said = {
        name: {one: [*map(asdict, results)] for one, results in by_contestant.items()}
        for name, by_contestant in found.items()
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
