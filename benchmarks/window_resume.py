"""What a resume saves that goes on with the window of its checkpoint: `python benchmarks/window_resume.py [--steps 6]`.

Two ranks and a vLLM server train the demo with `rollout.max_staleness=4` and a checkpoint after each step. After so many
steps everything is killed with SIGKILL. The run is then gone on with twice, from copies of what is on disk: as it is, and
with `rollout.max_staleness=0`, which samples the open groups of the window again. Compared is the first step of either:
seconds until its groups are there.

The last line is JSON: tokens of finished groups and of unfinished answers in the checkpoint, seconds of either first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rank_faults  # noqa: E402
from benchmarks.tasks import SCRIPT, TASKS, TORCHRUN, sampling_ahead  # noqa: E402
from nemo_dapo import checkpoint  # noqa: E402
from nemo_dapo.types import Sample  # noqa: E402

BUILD = ROOT / "build" / "window_resume"
DEMO = TASKS["demo"]
STALENESS = 4
PATIENCE = 400.0  # seconds until the checkpoint that the kill waits for is there


def options(folder: Path, staleness: int) -> dict[str, Any]:
    """The first run and those that go on with it have the same schedule, however many steps they take."""
    return {
        "output_dir": folder,
        "optimizer.decay_steps": DEMO.experiment.optimizer.decay_steps,
        "evaluation.every": 0,
        "checkpoint.every": 1,
    } | sampling_ahead(staleness)


def killed(folder: Path, steps: int) -> None:
    """A run, until it has saved step `steps`."""
    mark, started = uuid.uuid4().hex, time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "FAULTS_MARK": mark}
    with (folder.parent / f"{folder.name}.log").open("w") as out:
        command = [*TORCHRUN, SCRIPT, *DEMO.arguments(10 * steps, options(folder, STALENESS))]
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        while (checkpoint.latest(folder / "checkpoints") or 0) < steps:
            assert job.poll() is None, f"the run ended by itself: {out.name}"
            assert time.time() - started < PATIENCE, f"no checkpoint of step {steps}: {out.name}"
            time.sleep(0.05)
    finally:
        for process in rank_faults.descendants_of_job(mark, started):
            with contextlib.suppress(psutil.NoSuchProcess):  # torchrun ends its ranks as soon as one is gone
                process.kill()
        job.wait()


def resumed(folder: Path, staleness: int, step: int) -> dict[str, float]:
    """The record of the first step after `step`."""
    return next(one for one in DEMO.train(folder, step + 1, options(folder, staleness)) if one["step"] == step + 1)


def tokens(samples: Iterable[Sample]) -> int:
    return sum(len(one.token_ids) for one in samples)


def held(folder: Path, step: int) -> dict[str, Any]:
    """What the checkpoint has of groups that no step has taken."""
    window = checkpoint.read_state(folder / "checkpoints", step)["window"]
    finished = [one.group for one in window if one.group]
    return {
        "step": step,
        "finished_groups": len(finished),
        "finished_tokens": sum(tokens(group.samples) for group in finished),
        "unfinished_groups": len(window) - len(finished),
        "unfinished_tokens": sum(tokens(one.drafted) for one in window if not one.group),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="until the kill")
    args = parser.parse_args()
    place = BUILD / time.strftime("%Y%m%d-%H%M%S")
    place.mkdir(parents=True)
    DEMO.prepare()
    whole, over = place / "window", place / "over"
    killed(whole, args.steps)
    step = checkpoint.latest(whole / "checkpoints")
    assert step is not None
    shutil.copytree(whole, over)
    found = held(whole, step)
    print(found, flush=True)
    for name, folder, staleness in (("resumed", whole, STALENESS), ("started_over", over, 0)):
        record = resumed(folder, staleness, step)
        found[name] = {key: record[f"rollout/{key}"] for key in ("groups_sampled", "generated_tokens")}
        found[name]["seconds"] = record["time/rollout"]
        print(f"{name}: {found[name]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
