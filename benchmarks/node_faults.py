"""Servers, agents, hosts and links killed, stopped and cut off while a job on three hosts runs: seconds, samples, words.

    python benchmarks/node_faults.py [--only agent:STOP:sync …]

One job under a real Slurm (tests/cluster): a trainer on host1, a vLLM server each on host2 and host3, weights over TCP.
Each fault strikes host3 in one phase; the next one comes when both servers serve the newest weights again. A host that is
killed is back before Slurm gives it up and stays in the job; one that is lost comes back by serve.sbatch, as a job of its
own. Needs root. About a minute a fault on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.node_jobs import DEDICATED, counted, install, submit, submit_serving  # noqa: E402
from benchmarks.rank_faults import Case  # noqa: E402
from nemo_dapo.telemetry.escape import printable  # noqa: E402
from tests.cluster import Cluster  # noqa: E402
from tests.cluster.host import Host  # noqa: E402
from tests.cluster.slurm import command_line  # noqa: E402
from tests.cluster.small_run import options  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

FAULTS = {"server": ("KILL", "STOP"), "agent": ("KILL", "STOP"), "host": ("KILL", "STOP", "LOST"), "link": ("DOWN",)}
PHASES = ("rollout", "sync", "update")
PROGRAM = {"server": "vllm.entrypoints", "agent": "nemo_dapo.rollout.agent"}
STRUCK = "host3"
AWAY_SECONDS = 40.0  # of a link, a frozen host or a frozen agent: longer than its lease
PATIENCE = 300.0  # seconds for both servers to serve again
LONG = (
    "rollout.max_response_length=256",
    "rollout.vllm.max_model_len=320",
    "algorithm.prompts_per_step=16",
    "algorithm.group_size=8",
    "algorithm.minibatch_size=64",
    "rollout.progress_timeout=15",
    "rollout.sync_timeout=60",
    "rollout.min_servers=1",
    "rollout.lease_seconds=20",
    "checkpoint.every=0",
)
SAMPLES_A_STEP = 16 * 8


def all_cases() -> list[Case]:
    return [Case(victim, fault, phase) for victim, faults in FAULTS.items() for fault in faults for phase in PHASES]


@dataclass
class Outcome:
    case: Case
    noticed: float | None
    serving: float | None
    steps: int  # taken between the fault and the return
    orphans: int
    said: str


class Watched:
    """The job, by what it writes."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.job = submit(cluster, DEDICATED, folder, *options(folder, steps=100_000), *LONG)

    @property
    def last(self) -> dict[str, Any]:
        """The newest step's record."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1]) if lines else {"step": 0}

    def all_serve(self, after: int) -> bool:
        """Whether both servers have served in a step later than `after`."""
        record = self.last
        served = [value for key, value in record.items() if re.fullmatch(r"servers/.*/serves", key)]
        return record["step"] > after and len(served) == 2 and all(served)

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.job.state != "RUNNING":
                raise SystemExit(f"the job is {self.job.state}:\n{self.job.console[-8000:]}")
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def bring_into(self, phase: str) -> None:
        (self.folder / "cue").write_text(phase)
        marker = self.folder / f"in_{phase}"
        if not self.wait(marker.exists):
            raise SystemExit(f"{phase} never came:\n{self.job.console[-3000:]}")
        marker.unlink()
        time.sleep(1.0)  # to be in the middle of it


def strike(watched: Watched, case: Case) -> float:
    """Set the fault and undo what a person would have to undo; returns when it came (time.monotonic)."""
    host, at = watched.cluster[STRUCK], time.monotonic()
    if case.victim == "link":
        host.link("down")
        time.sleep(AWAY_SECONDS)
        host.link("up")
    elif case.victim == "host" and case.fault == "STOP":
        host.freeze()
        time.sleep(AWAY_SECONDS)
        host.thaw()
    elif case.victim == "host":
        host.switch_off()
        if case.fault == "LOST":
            watched.cluster.wait_until_down(host, PATIENCE)
        else:
            time.sleep(5.0)
        watched.cluster.switch_on(host)
        watched.cluster.wait_for_hosts(PATIENCE)
        if case.fault == "LOST":
            submit_serving(watched.cluster, watched.folder)
    else:
        for pid in running(host, PROGRAM[case.victim]):
            os.kill(pid, signal.Signals[f"SIG{case.fault}"])
    return at


def running(host: Host, program: str) -> list[int]:
    """Process ids of a host whose command runs `program` itself, not a shell or a guardian in front of it."""
    command = re.compile(rf"\S*python\S* (-\S+ )*-m {re.escape(program)}")
    return [pid for pid in host.processes() if command.match(command_line(pid))]


class Words(threading.Thread):
    """The first line of the console, from now on, that speaks of the host that is struck."""

    def __init__(self, watched: Watched) -> None:
        super().__init__(daemon=True)
        self.watched, self.at, self.said = watched, 0.0, ""
        self._heard, self._over = len(watched.job.console), threading.Event()

    def run(self) -> None:
        while not self.said and not self._over.wait(0.1):
            for line in self.watched.job.console[self._heard :].splitlines():
                if STRUCK in line and not line.startswith(("srun: ", "slurmstepd")):
                    self.at, self.said = time.monotonic(), line
                    return

    def close(self) -> None:
        self._over.set()
        self.join()


def trial(watched: Watched, case: Case) -> Outcome:
    """One fault, from a run that is whole to a run that is whole again."""
    host, step = watched.cluster[STRUCK], watched.last["step"]
    if not watched.wait(lambda: watched.all_serve(step)):
        raise SystemExit(f"the servers never served both:\n{watched.job.console[-5000:]}")
    watched.bring_into(case.phase)
    words, step = Words(watched), watched.last["step"]
    words.start()
    at = strike(watched, case)
    returned = watched.wait(lambda: watched.all_serve(step + 1))
    serving = time.monotonic() - at
    words.close()
    extra = sum(max(0, len(running(host, program)) - 1) for program in PROGRAM.values())
    return Outcome(
        case,
        words.at - at if words.said else None,
        serving if returned else None,
        watched.last["step"] - step,
        extra,
        words.said,
    )


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def shown(one: Outcome) -> str:
    seconds = ("-" if each is None else f"{each:.1f}" for each in (one.noticed, one.serving))
    said = printable(one.said.removeprefix("0: "), 200).replace("|", "/")
    return row(one.case.victim, one.case.fault, one.case.phase, *seconds, str(one.steps), str(one.orphans), said)


def strike_all(cases: Sequence[Case]) -> tuple[list[Outcome], int, int]:
    """What each fault did; samples lost and doubled in all steps; the table is printed on the way."""
    print(row("victim", "fault", "phase", "noticed [s]", "serves again [s]", "steps meanwhile", "left", "said"))
    print(row(*["---"] * 8), flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="node_faults_") as place, Cluster(DEDICATED.hosts) as cluster:
        folder = Path(place)
        save_tiny_model(folder / "model", hidden=128, heads=4)
        (folder / "faults").touch()
        watched = Watched(cluster, folder)
        watched.job.wait(PATIENCE, "RUNNING")
        for case in cases:
            outcomes.append(trial(watched, case))
            print(shown(outcomes[-1]), flush=True)
        steps = watched.last["step"]
        cluster.slurm("scancel", str(watched.job.number))
        watched.job.wait(PATIENCE, "CANCELLED")
        lost, doubled = counted(folder / "run" / "rollouts", steps, SAMPLES_A_STEP)
    return outcomes, lost, doubled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="VICTIM:FAULT:PHASE")
    only = parser.parse_args().only
    install()
    outcomes, lost, doubled = strike_all([case for case in all_cases() if not only or str(case) in only])
    print(
        json.dumps(
            {"faults": len(outcomes), "lost": lost, "doubled": doubled, "left": sum(o.orphans for o in outcomes)}
        )
    )


if __name__ == "__main__":
    main()
