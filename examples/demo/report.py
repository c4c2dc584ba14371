"""The demo's report: a table of the course, a picture of the learning curve and a summary, from the run's metrics.

    python examples/demo/report.py --run runs/demo --started "$(date +%s)"

Reads `metrics.jsonl`: one flat JSON object a line, with the step and its metrics. Step 0 is the evaluation before training.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# What this report calls a metric -> its key in metrics.jsonl. The evaluation's key is eval/<set>/avg@<samples>.
KEYS = {
    "step": "step",
    "accuracy": "rollout/accuracy",
    "reward": "rollout/reward",
    "entropy": "train/entropy",
    "groups_sampled": "rollout/groups_sampled",
    "groups_kept": "rollout/groups_kept",
    "response_length": "rollout/mean_length",
    "generated_tokens": "rollout/generated_tokens",
    "logprob_gap": "rollout/logprob_gap",
    "seconds": "time/step",
}
BESIDE_THE_STEPS = ("time/eval", "time/save")  # seconds, in the same rows
EVALUATION = ("eval/", "/avg@")

Row = Mapping[str, float]
Series = list[tuple[int, float]]


@dataclass(frozen=True)
class Summary:
    """runs/demo/summary.json. Accuracies are shares of held-out problems answered right at temperature 1.

    `seconds_train` is the steps alone, `seconds_setup` what is neither step nor evaluation or saving between steps:
    environment, warm start, servers, the evaluation before training, this report. `completion_tokens_per_second` counts
    all sampled tokens, kept or not, over `seconds_train`, so updates and weight transfer are in it.
    `mean_abs_logprob_gap` is the mean over steps of |trainer - vLLM| in nats a token.
    """

    accuracy_before: float
    accuracy_after: float
    steps: int
    seconds_total: float
    seconds_setup: float
    seconds_train: float
    completion_tokens_per_second: float
    groups_sampled: int
    groups_kept: int
    mean_abs_logprob_gap: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--started", type=float, help="when the demo was started, in seconds since 1970")
    arguments = parser.parse_args()
    rows = read_metrics(arguments.run / "metrics.jsonl")
    summary = summarise(rows, started=arguments.started, now=time.time())
    print(table(rows))
    print()
    print(verdict(summary))
    (arguments.run / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    draw(rows, arguments.run / "learning_curve.png")
    print(f"Written: {arguments.run}/summary.json and {arguments.run}/learning_curve.png")


def read_metrics(path: Path) -> list[Row]:
    """The rows in order of step. Lines of one step are merged, later ones winning: a resumed run repeats some steps.

    Raises ValueError when the file is missing or has no training step.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run the training first (make demo)")
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        steps.setdefault(int(row[KEYS["step"]]), {}).update(row)
    rows: list[Row] = [steps[step] for step in sorted(steps)]
    if not any(KEYS["seconds"] in row for row in rows):
        raise ValueError(f"{path} has no row with {KEYS['seconds']!r}: the run ended before its first step")
    return rows


def series(rows: Sequence[Row], name: str) -> Series:
    """(step, value) of the rows that have the metric `name` of KEYS, NaN left out."""
    key = KEYS[name]
    return [(int(row[KEYS["step"]]), row[key]) for row in rows if key in row and math.isfinite(row[key])]


def evaluations(rows: Sequence[Row]) -> Series:
    """(step, accuracy on held-out problems), the mean over sets where there are several."""
    prefix, infix = EVALUATION
    found: Series = []
    for row in rows:
        # avg@8_low and avg@8_high are the interval's ends.
        values = [v for k, v in row.items() if k.startswith(prefix) and infix in k and k.split("@")[-1].isdigit()]
        if values:
            found.append((int(row[KEYS["step"]]), sum(values) / len(values)))
    return found


def summarise(rows: Sequence[Row], *, started: float | None, now: float) -> Summary:
    """Raises ValueError without an evaluation before and after training."""
    course = evaluations(rows)
    if len(course) < 2:
        raise ValueError(
            f"the report needs an evaluation before and after training, found {len(course)}: set evaluation"
        )
    # The row of step 0 holds an evaluation and nothing that was trained.
    trained = [row for row in rows if KEYS["seconds"] in row]
    train = _total(trained, "seconds")
    beside = sum(row.get(key, 0.0) for row in trained for key in BESIDE_THE_STEPS)
    total = train + beside if started is None else now - started
    return Summary(
        accuracy_before=course[0][1],
        accuracy_after=course[-1][1],
        steps=len(trained),
        seconds_total=total,
        seconds_setup=total - train - beside,
        seconds_train=train,
        completion_tokens_per_second=_total(trained, "generated_tokens") / train,
        groups_sampled=int(_total(trained, "groups_sampled")),
        groups_kept=int(_total(trained, "groups_kept")),
        mean_abs_logprob_gap=_mean([value for _, value in series(trained, "logprob_gap")]),
    )


def table(rows: Sequence[Row], lines: int = 16) -> str:
    """About `lines` stretches of the run: means of the metrics, and the last evaluation in each."""
    trained = [row for row in rows if KEYS["seconds"] in row]
    width = max(math.ceil(len(trained) / lines), 1)
    evaluated = dict(evaluations(rows))
    printed = ["    steps  accuracy   reward  entropy  kept/sampled  length  s/step  held-out accuracy"]
    if 0 in evaluated:
        printed.append(f"   before{'':58}{evaluated[0]:.3f}")
    for i in range(0, len(trained), width):
        printed.append(_table_line(trained[i : i + width], evaluated))
    return "\n".join(printed)


def _table_line(rows: Sequence[Row], evaluated: Mapping[int, float]) -> str:
    first, last = int(rows[0][KEYS["step"]]), int(rows[-1][KEYS["step"]])
    mean = {name: _mean([value for _, value in series(rows, name)]) for name in KEYS if name != "step"}
    held_out = [value for step, value in evaluated.items() if first <= step <= last]
    kept = f"{mean['groups_kept']:.1f}/{mean['groups_sampled']:.1f}"
    return (
        f"{f'{first}-{last}':>9}  {mean['accuracy']:8.3f} {mean['reward']:8.3f} {mean['entropy']:8.4f}  {kept:>12} "
        f"{mean['response_length']:7.1f} {mean['seconds']:7.2f}  {f'{held_out[-1]:.3f}' if held_out else ''}"
    ).rstrip()


def verdict(summary: Summary) -> str:
    return (
        f"Held-out accuracy {summary.accuracy_before:.3f} -> {summary.accuracy_after:.3f} in {summary.steps} steps\n"
        f"{summary.seconds_total:.0f} s in all: {summary.seconds_setup:.0f} s set-up, "
        f"{summary.seconds_train:.0f} s training, {summary.completion_tokens_per_second:,.0f} completion tokens/s\n"
        f"{summary.groups_kept} of {summary.groups_sampled} groups kept, "
        f"mean |trainer - vLLM| log-probability gap {summary.mean_abs_logprob_gap:.1e}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Small multiples over steps: accuracy, reward, entropy, groups, response length, seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, constrained_layout=True)
    panels = {
        "Accuracy": ["accuracy"],
        "Mean reward": ["reward"],
        "Entropy (nats a token)": ["entropy"],
        "Groups a step": ["groups_sampled", "groups_kept"],
        "Response length (tokens)": ["response_length"],
        "Seconds a step": ["seconds"],
    }
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            axis.plot(*_columns(series(rows, name)), linewidth=1.2, label=name.replace("_", " "))
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0, 0].plot(*_columns(evaluations(rows)), "o-", color="black", markersize=4, label="held-out problems")
    axes[0, 0].lines[0].set_label("sampled for training")
    axes[0, 0].set_ylim(0, 1.02)
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[1, 0].legend(frameon=False, fontsize=8)
    for axis in (axes[0, 2], *axes[1]):
        axis.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _columns(points: Series) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _total(rows: Sequence[Row], name: str) -> float:
    return sum(value for _, value in series(rows, name))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    main()
