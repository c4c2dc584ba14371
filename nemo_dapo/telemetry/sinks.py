"""Where a step's record goes, and the line a human reads. A record is a flat dict of floats with namespaced keys."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from nemo_dapo.files import replacing


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
    """One JSON object a line, `{"step": 3, "rollout/accuracy": 0.5, ...}`; a number that is not finite is `null`.

    `resumed_step` is the checkpoint's step: later lines belong to steps that will be run again and are removed. None
    starts afresh, and sets an existing file aside as `<name>.previous`.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if resumed_step is None:
                path.replace(path.with_name(path.name + ".previous"))
            else:
                keep_steps(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        # JSON has no NaN: with it, no other reader than Python's accepts the file.
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
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


# The console line's parts, each left out where the record lacks one of its keys.
CONSOLE = (
    "eval {eval/accuracy:.3f}",
    "acc {rollout/accuracy:.2f}",
    "reward {rollout/reward:.2f}",
    "kept {rollout/groups_kept:.0f}/{rollout/groups_sampled:.0f}",
    "len {rollout/mean_length:.0f}",
    "entropy {train/entropy:.2f}",
    "loss {train/loss:.3f}",
    "grad {train/grad_norm:.2f}",
    "gap {rollout/logprob_gap:.0e}",
    "{rollout/tokens_per_second:,.0f} tok/s",
)
CONSOLE_TIMES = ("rollout", "update", "sync", "eval", "save")


def console_line(record: Mapping[str, float], *, step: int, max_steps: int) -> str:
    """One step for a human.

    step 12/200 | acc 0.63 | reward 0.26 | kept 16/24 | len 41 | entropy 0.31 | loss -0.012 | grad 0.21 | gap 3e-6 |
    5,012 tok/s | rollout 1.9s update 0.8s sync 0.1s | 2.9 s/step
    """
    parts = [f"step {step}/{max_steps}"]
    parts += [template.format_map(record) for template in CONSOLE if _keys(template) <= record.keys()]
    if times := [f"{name} {record[f'time/{name}']:.1f}s" for name in CONSOLE_TIMES if f"time/{name}" in record]:
        parts.append(" ".join(times))
    if "time/step" in record:
        parts.append(f"{record['time/step']:.1f} s/step")
    return re.sub(r"e([+-])0(\d)", r"e\1\2", " | ".join(parts))  # 3e-6 rather than 3e-06


def _keys(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}
