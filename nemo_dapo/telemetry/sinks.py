"""Where a step's record goes, and the line a human reads. A record is a flat dict of floats with namespaced keys."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from nemo_dapo.files import replacing, set_aside

# What belongs to one run: a run that starts anew in the folder must not go on with it.
RECORDS = (
    "metrics.jsonl", "tensorboard", "wandb_id", "manifest.json", "rollouts", "evaluation", "solve_statistics.jsonl",
    "rewards.log",
)  # fmt: skip


def start_anew(run_dir: Path) -> None:
    """Set the records of an earlier run in this folder aside, under a number of their own, and say so."""
    if n := set_aside(*(run_dir / name for name in RECORDS)):
        print(f"{run_dir} holds the records of an earlier run: they are now called *.previous{n}", flush=True)


class Sink(Protocol):
    def log(self, step: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Every sink in turn; with none, the null sink."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = tuple(sinks)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, record)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class MetricsJsonl:
    """One JSON object a line, `{"step": 3, "wall_time": 1795973521.046, "rollout/accuracy": 0.5, ...}`; a number that is
    not finite is `null`. `wall_time` is when the line was written, in seconds since 1970: so other logs can be laid beside.

    `resumed_step` is the checkpoint's step: later lines belong to steps that will be run again and are removed. None is a
    run that starts anew, after `start_anew`.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resumed_step is not None:
            keep_steps(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        # JSON has no NaN: with it, no other reader than Python's accepts the file.
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(
            json.dumps({"step": step, "wall_time": round(time.time(), 3)} | finite, allow_nan=False) + "\n"
        )
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def keep_steps(path: Path, last_step: int) -> None:
    """Remove the lines of steps after `last_step`, atomically, and a last line that a kill cut short.

    Raises ValueError when any other line is not JSON with a step.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = [line for number, line in enumerate(lines, 1) if _step_of(line, f"{path}, line {number}") <= last_step]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _step_of(line: str, where: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{where}: expected an object with "step", got {line[:80]!r}; move the file away') from error


class TensorBoardSink:
    """Scalars for TensorBoard; on resume, steps after `resumed_step` are purged from the curves."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import: only where it is wanted

        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; a resumed run goes on in the same one, whose id is kept in `directory/wandb_id`.

    Raises ValueError when wandb is not installed.
    """

    def __init__(self, *, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"logger.wandb_project={project!r} needs wandb, which is not installed: pip install wandb, "
                f"or set logger.wandb_project=''"
            ) from error
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        identity = directory / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=name,
            id=identity.read_text(),
            dir=str(directory),
            config=dict(config),
            resume="allow",
        )
        # Its own step only grows: the steps that a resumed run repeats would be thrown away.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({"step": step} | dict(record))

    def close(self) -> None:
        self._run.finish()


# The console line's parts, each left out where the record lacks one of its keys. No loss: a group's advantages sum to zero,
# so that it says little more than whether right answers are longer than wrong ones; metrics.jsonl has it.
CONSOLE = (
    "eval {eval/accuracy:.3f}",
    "acc {rollout/accuracy:.2f}",
    "reward {rollout/reward:.2f}",
    "kept {rollout/groups_kept:.0f}/{rollout/groups_sampled:.0f}",
    "len {rollout/mean_length:.0f}",
    "entropy {train/entropy:.2f}",
    "grad {train/grad_norm:.2f}",
    "lr {train/lr:.2e}",
    "gap {rollout/logprob_gap:.0e}",
    "{rollout/tokens_per_second:,.0f} tok/s",
)
# Said when it is not zero: what a reader must act on.
CONSOLE_TROUBLE = ("VERIFIER ERRORS {rollout/verifier_errors:.0f}", "REFUSED UPDATES {progress/refused_updates:.0f}")
CONSOLE_TIMES = ("rollout", "update", "sync", "eval", "save")
STEPS_AVERAGED = 20  # for the time that is left


class Console:
    """One line a step for a human. Seconds a step count from line to line: evaluation and saving among them.

    step 12/200 | acc 0.63 | reward 0.26 | kept 16/24 | len 41 | entropy 0.31 | grad 0.21 | lr 1e-6 | gap 3e-6 |
    5,012 tok/s | rollout 1.9s update 0.8s sync 0.1s | 2.9 s/step, 9 min left
    """

    def __init__(self, max_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_steps, self.clock = max_steps, clock
        self.said_at: float | None = None
        self.seconds: deque[float] = deque(maxlen=STEPS_AVERAGED)

    def line(self, step: int, record: Mapping[str, float]) -> str:
        now = self.clock()
        if "time/step" in record:  # not the evaluation before the first step
            self.seconds.append(record["time/step"] if self.said_at is None else now - self.said_at)
        self.said_at = now
        parts = [f"step {step}/{self.max_steps}"]
        parts += [part.format_map(record) for part in CONSOLE if _keys(part) <= record.keys()]
        parts += [part.format_map(record) for part in CONSOLE_TROUBLE if any(record.get(key) for key in _keys(part))]
        if times := [f"{name} {record[f'time/{name}']:.1f}s" for name in CONSOLE_TIMES if f"time/{name}" in record]:
            parts.append(" ".join(times))
        if "time/step" in record:
            parts.append(f"{self.seconds[-1]:.1f} s/step" + self._left(step))
        return _without_zeros(" | ".join(parts))

    def _left(self, step: int) -> str:
        steps = self.max_steps - step
        return f", {duration(steps * sum(self.seconds) / len(self.seconds))} left" if steps > 0 else ""


def _without_zeros(line: str) -> str:
    """1e-6 rather than 1.00e-06."""
    return re.sub(r"e([+-])0(\d)", r"e\1\2", re.sub(r"(\.\d*?)\.?0+(?=e[+-]\d)", r"\1", line).replace(".e", "e"))


def duration(seconds: float) -> str:
    """`45 s`, `9 min`, `3 h 20 min`, `2 d 4 h`"""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} d {minutes // 60 % 24} h"
    )


def _keys(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}
