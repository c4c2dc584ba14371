"""A run that is killed 20 times at random instants, also while a checkpoint is written behind it, against one that was not.

    python benchmarks/kill_resume.py [--kills 20] [--steps 80] [--seed 0]

Two ranks of examples/train_dapo.py train a small model on recorded rollouts, with an asynchronous checkpoint after every
second step. One run is left alone. The other is killed with SIGKILL (everything, torchrun, or one rank) while it starts,
anywhere in its next steps, or as a write begins, and started again by the same command, until it has taken all its steps.
Each start must go on from the newest complete checkpoint, and every checkpoint's weights and optimizer states must be the
same bytes, its options the same values, as the undisturbed run's of its step. The last line is JSON. About 7 minutes on
two idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rank_faults  # noqa: E402
from nemo_dapo import digests  # noqa: E402
from tests.checkpoints import differing  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

VICTIMS = ("everything", "torchrun", "rank0", "rank1")
INSTANTS = ("write", "step", "write", "step", "start")
EVERY = 2  # steps between checkpoints
MOST_STEPS = 6  # of a start, until it is killed
WRITE_SECONDS = 0.1  # within which a kill follows the beginning of a write
PATIENCE = 240.0  # seconds for a start, for a kill to end the job, and for a whole run
RECORDED = (
    "step",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "rollout/accuracy",
)  # that must be the undisturbed run's
HEAD = """| | killed | in | newest checkpoint | being written | seconds to end | orphans |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Kill:
    """`newest` is the last complete checkpoint at the kill, `writing` the one that was on its way, 0 for none."""

    victim: str
    instant: str
    newest: int
    writing: int
    orphans: int
    seconds: float

    def row(self, number: int) -> str:
        writing = self.writing or "–"
        cells = (number, self.victim, self.instant, self.newest, writing, f"{self.seconds:.1f}", self.orphans)
        return f"| {' | '.join(map(str, cells))} |"


class Run:
    """A run's folder below `folder`, and the job that is at work in it, if any."""

    def __init__(self, folder: Path, name: str, options: list[str]) -> None:
        self.folder = folder / name
        self.command = [*rank_faults.options(self.folder), *options]
        self.folder.mkdir()
        self.console = self.folder / "console"
        self.checkpoints = self.folder / "run" / "checkpoints"

    def start(self, *, records: bool = False) -> None:
        """`records` has random samples stand for vLLM's; else they are played back."""
        self.mark, self.started = uuid.uuid4().hex, time.time()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAULTS_MARK": self.mark, "OMP_NUM_THREADS": "1"}
        job = [str(ROOT / "benchmarks" / "held_job.py"), str(self.folder), "nowhere", "0", "scripted"]
        script = job if records else [str(ROOT / "examples" / "train_dapo.py")]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                [*launcher, *script, *self.command], cwd=ROOT, env=environment, stdout=console, stderr=console
            )

    def wait_for(self, condition: Callable[[], bool], between_looks: float = 0.03) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the job ended, or hangs:\n{self.console.read_text(errors='replace')[-3000:]}")
            time.sleep(between_looks)

    def finish(self) -> None:
        if self.process.wait(timeout=PATIENCE):
            raise RuntimeError(f"the job failed:\n{self.console.read_text(errors='replace')[-3000:]}")

    def records(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; the last one may be half written."""
        metrics = self.folder / "run" / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def newest(self) -> int:
        """Step of the newest complete checkpoint; 0 where there is none."""
        return max(map(_step, self.checkpoints.glob("step_*")), default=0)

    def writing(self) -> int:
        """Step of the one that this start is writing; 0 where it writes none."""
        found = 0
        for place in self.checkpoints.glob(".step_*.writing"):
            with contextlib.suppress(FileNotFoundError):  # complete by now
                if place.stat().st_mtime > self.started:
                    found = _step(place)
        return found

    def ranks(self) -> dict[str, psutil.Process]:
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                if rank := child.environ().get("RANK"):  # none yet between fork and exec
                    found[f"rank{rank}"] = child
        return found

    def trains(self, first: int) -> bool:
        """Whether it has begun, from the checkpoint of step `first`."""
        said = f"at Progress(rollout_steps={first}," if first else "no vLLM server"
        return said in self.console.read_text(errors="replace")

    def kill(self, victim: str, instant: str) -> Kill:
        known = rank_faults.descendants_of_job(self.mark, self.started)
        one = self.ranks() | {"torchrun": psutil.Process(self.process.pid)}
        killed = time.monotonic()
        end(known if victim == "everything" else [one[victim]])
        self.process.wait(timeout=PATIENCE)
        while (left := rank_faults.alive(known)) and time.monotonic() < killed + PATIENCE / 4:
            time.sleep(0.02)
        seconds = time.monotonic() - killed
        orphans = {*left, *rank_faults.descendants_of_job(self.mark, self.started)}
        end(orphans)
        return Kill(victim, instant, self.newest(), self.writing(), len(orphans), seconds)

    def policy(self, step: int) -> Path:
        """Weights, optimizer states and schedule of the checkpoint of `step`. Raises RuntimeError where it is damaged."""
        place = self.checkpoints / f"step_{step:06d}"
        _, listed = digests.parse((place / digests.NAME).read_text())
        if damage := digests.damage(place, listed):
            raise RuntimeError(f"{place}: {damage}")
        return place / "policy"

    def end(self) -> None:
        end(rank_faults.descendants_of_job(self.mark, self.started))


def end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with another one
            process.kill()


def _step(place: Path) -> int:
    found = re.search(r"step_(\d+)", place.name)
    assert found
    return int(found.group(1))


@dataclass(frozen=True)
class Pace:
    """Seconds of the undisturbed run: from its ranks' start to the first step, and of a step."""

    start: float
    step: float


def kill_once(run: Run, victim: str, instant: str, pace: Pace, chance: random.Random) -> Kill:
    """From a start to the death of the job: during the start, anywhere in the next steps, or as a write begins."""
    first = run.newest()
    run.start()
    run.wait_for(lambda: len(run.ranks()) == 2)
    if instant == "start":
        time.sleep(chance.uniform(0, pace.start))
        return run.kill(victim, instant)
    run.wait_for(lambda: run.trains(first))
    if instant == "write":
        due = first + EVERY * chance.randint(1, MOST_STEPS // EVERY)
        run.wait_for(lambda: run.writing() == due, between_looks=0.003)
        time.sleep(chance.uniform(0, WRITE_SECONDS))
    else:
        steps, share = divmod(chance.uniform(0, MOST_STEPS), 1)
        run.wait_for(lambda: len(run.records()) >= first + steps)
        time.sleep(share * pace.step)
    return run.kill(victim, instant)


def options(steps: int) -> list[str]:
    return [
        f"trainer.max_steps={steps}",
        "evaluation.every=0",
        f"checkpoint.every={EVERY}",
        "checkpoint.keep=0",
        "checkpoint.asynchronous=true",
        "logger.rollout_every=1",
        "logger.rollout_tokens=true",
    ]


def undisturbed(folder: Path, name: str, chosen: list[str], *, records: bool = False) -> tuple[Run, Pace]:
    run = Run(folder, name, chosen)
    try:
        run.start(records=records)
        run.wait_for(lambda: len(run.ranks()) == 2)
        begun = time.monotonic()
        run.wait_for(lambda: bool(run.records()))
        start = time.monotonic() - begun
        run.finish()
    finally:
        run.end()
    seconds = sorted(record["time/step"] for record in run.records())
    return run, Pace(start, seconds[len(seconds) // 2])


def killed(folder: Path, chosen: list[str], count: int, pace: Pace, chance: random.Random) -> tuple[Run, list[Kill]]:
    """One run, killed `count` times, and then left to its end."""
    run = Run(folder, "killed", chosen)
    plan = list(itertools.islice(itertools.cycle(itertools.product(INSTANTS, VICTIMS)), count))
    chance.shuffle(plan)
    kills = []
    try:
        for instant, victim in plan:
            kills.append(kill_once(run, victim, instant, pace, chance))
            print(kills[-1].row(len(kills)), flush=True)
        run.start()
        run.finish()
    finally:
        run.end()
    return run, kills


def measure(folder: Path, kills: int, steps: int, hidden: int, seed: int) -> dict[str, int]:
    save_tiny_model(folder / "model", hidden=hidden)
    chosen = options(steps)
    recorded, _ = undisturbed(folder, "recorded", [*chosen, "checkpoint.every=0"], records=True)
    chosen.append(f"rollout.replay={recorded.folder / 'run' / 'rollouts'}")
    alone, pace = undisturbed(folder, "alone", chosen)
    print(f"undisturbed: first step after {pace.start:.1f} s, then {pace.step:.2f} s a step\n\n{HEAD}", flush=True)
    run, found = killed(folder, chosen, kills, pace, random.Random(seed))
    compared = range(EVERY, steps + 1, EVERY)
    unequal = {step: files for step in compared if (files := differing(run.policy(step), alone.policy(step)))}
    for step, files in unequal.items():
        print(f"the checkpoint of step {step} differs from the undisturbed run's in {', '.join(files)}", flush=True)
    counts = Counter(record["step"] for record in run.records())
    records = zip(run.records(), alone.records(), strict=False)
    return {
        "kills": len(found),
        "during_save": sum(one.writing > 0 for one in found),
        "checkpoints": len(compared),
        "equal": len(compared) - len(unequal),
        "steps": steps,
        "equal_records": sum(all(one[key] == other[key] for key in RECORDED) for one, other in records),
        "lost": steps - len(counts),
        "doubled": counts.total() - len(counts),
        "orphans": sum(one.orphans for one in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs, which stay; else a temporary one")
    arguments = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as place:
        found = measure(arguments.pop("folder") or Path(place), **arguments)
    print(json.dumps(found))
    is_equal = found["equal"] == found["checkpoints"] and found["equal_records"] == found["steps"]
    sys.exit(0 if is_equal and not (found["lost"] or found["doubled"] or found["orphans"]) else 1)


if __name__ == "__main__":
    main()
