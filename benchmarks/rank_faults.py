"""Ranks, torchrun or everything killed or stopped in each phase of a real job: seconds, what is said, what is left.

    python benchmarks/rank_faults.py [--only rank1:STOP:update …] [--real] [--markdown docs/faults.md]

Two ranks train a tiny model; each job is held in one phase of step 2 while the fault is set. Samples come from a script,
except where everything is killed, or with --real: there a vLLM server runs. About 22 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tiny import save_tiny_model  # noqa: E402

PHASES = ("rollout", "sync", "update", "save", "eval")
CULPRITS = {"rank0": "rank 0", "rank1": "rank 1", "torchrun": "", "everything": ""}
FAULTS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}
HEARTBEAT_TIMEOUT = 10  # seconds
LINGER = 5.0  # seconds in the phase, within which the fault is set
PATIENCE = 240.0  # seconds until a job is held, and for it to end
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Case:
    victim: str
    fault: str
    phase: str

    def __str__(self) -> str:
        return f"{self.victim}:{self.fault}:{self.phase}"


@dataclass(frozen=True)
class Outcome:
    seconds: float
    said: str
    named: str
    orphans: int
    shm: int


def cases() -> list[Case]:
    """KILL of each victim in each phase; STOP of the ranks, since a stopped torchrun or job is no fault of a rank."""
    stopped = [Case(rank, "STOP", phase) for rank in ("rank0", "rank1") for phase in PHASES]
    return [Case(victim, "KILL", phase) for victim in CULPRITS for phase in PHASES] + stopped


def options(folder: Path) -> list[str]:
    return [
        "experiment=demo",
        f"model.path={folder.parent / 'model'}",
        f"output_dir={folder / 'run'}",
        "data.train.arithmetic.num_problems=20",
        "data.eval.arithmetic.num_problems=4",
        "reward.function=tests.end_to_end_rewards:even_length",
        "reward.timeout=300",
        "reward.overlong.buffer=0",
        "rollout.max_response_length=16",
        "rollout.max_logprob_gap=100",
        "rollout.vllm.max_model_len=64",
        "algorithm.prompts_per_step=4",
        "algorithm.group_size=4",
        "algorithm.minibatch_size=8",
        "algorithm.dynamic_sampling=false",
        "trainer.max_steps=3",
        "evaluation.every=1",
        "evaluation.at_start=false",
        "evaluation.samples=1",
        "checkpoint.every=1",
        "checkpoint.export=false",
        "logger.tensorboard=false",
        f"parallel.heartbeat_timeout={HEARTBEAT_TIMEOUT}",
    ]


def descendants_of_job(mark: str, started: float) -> list[psutil.Process]:
    """Everything alive that carries the job's mark, or, where a process wiped its environment, lies below one that does."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if process.create_time() >= started - 1 and process.environ().get("FAULTS_MARK") == mark:
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue
    return alive(found)


def run(case: Case, folder: Path, *, real: bool) -> Outcome:
    """One job, one fault."""
    folder.mkdir()
    before, started, mark = set(os.listdir(SHM)), time.time(), uuid.uuid4().hex
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [
        str(ROOT / "benchmarks" / "held_job.py"),
        str(folder),
        case.phase,
        str(LINGER),
        "real" if real else "scripted",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAULTS_MARK": mark, "OMP_NUM_THREADS": "1"}
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(
            [*launcher, *job, *options(folder)], cwd=ROOT, env=environment, stdout=console, stderr=console
        )
    known: list[psutil.Process] = []
    try:
        wait_until_held(process, folder)
        known = descendants_of_job(mark, started)
        set_fault(case, process, known)
        fault = time.monotonic()
        process.wait(timeout=PATIENCE)
        while (left := alive(known)) and time.monotonic() - fault < PATIENCE / 4:
            time.sleep(0.05)
        seconds = time.monotonic() - fault
        text = (folder / "console").read_text(errors="replace")
        orphans = len({*left, *descendants_of_job(mark, started)})
        shm = len({name for name in set(os.listdir(SHM)) - before if name.startswith(("nemo_dapo", "sem.", "psm_"))})
        return Outcome(seconds, last_words(text), culprit(case, text), orphans, shm)
    finally:
        for one in {*known, *descendants_of_job(mark, started)}:
            if one.is_running():
                one.kill()
        process.wait()


def wait_until_held(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all((folder / f"held_{rank}").exists() for rank in (0, 1)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the job was never held:\n{(folder / 'console').read_text(errors='replace')[-3000:]}")
        time.sleep(0.05)


def set_fault(case: Case, launcher: subprocess.Popen[bytes], known: list[psutil.Process]) -> None:
    if case.victim == "everything":
        for process in known:
            process.send_signal(FAULTS[case.fault])
    elif case.victim == "torchrun":
        launcher.send_signal(FAULTS[case.fault])
    else:
        ranks = {child.environ()["RANK"]: child for child in psutil.Process(launcher.pid).children()}
        ranks[case.victim.removeprefix("rank")].send_signal(FAULTS[case.fault])


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if _lives(one)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # ended while we looked
        return False


def last_words(text: str) -> str:
    """What the job itself said, or torchrun's root cause."""
    ours = [line for line in text.splitlines() if line.startswith(("error: ", "stopped by "))]
    if "Root Cause" in text:
        fields = dict(line.strip().split(":", 1) for line in text.split("Root Cause")[1].splitlines() if " : " in line)
        cause = next((value for key, value in fields.items() if key.startswith("rank")), "").split("(")[0].strip()
        exit_code = next((value for key, value in fields.items() if key.startswith("exitcode")), "").strip()
        ours.append(f"torchrun: root cause rank {cause}, exit code {exit_code}")
    return " · ".join(ours).replace("|", "/") or "–"


def culprit(case: Case, text: str) -> str:
    """Whether the rank at fault is named, and no other one."""
    name = CULPRITS[case.victim]
    if not name:
        return "–"
    if case.fault == "STOP":
        return "yes" if f"{name} is silent" in text and f"last in {case.phase} of step" in text else "no"
    cause = text.split("Root Cause")[-1] if "Root Cause" in text else ""
    return "yes" if f": {name.removeprefix('rank ')} " in cause and "SIGKILL" in cause else "no"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="VICTIM:FAULT:PHASE")
    parser.add_argument("--real", action="store_true", help="a vLLM server in every case")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    rows = [
        "| victim | fault | phase | seconds | said | named | orphans | /dev/shm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(rows))
    with tempfile.TemporaryDirectory(prefix="rank_faults_") as place:
        save_tiny_model(Path(place) / "model", hidden=128, heads=4)
        for case in cases():
            if arguments.only and str(case) not in arguments.only:
                continue
            real = arguments.real or case.victim == "everything"
            got = run(case, Path(place) / str(case).replace(":", "_"), real=real)
            said = got.said.replace(place, "…")
            seconds = f"{got.seconds:.1f}"
            rows.append(
                row(case.victim, case.fault, case.phase, seconds, said, got.named, str(got.orphans), str(got.shm))
            )
            print(rows[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
