"""Ranks that are stopped, killed, stuck or signalled, in a real job: what it says, whom it names, and that it ends.

Each case is a torchrun job of two ranks on gloo (small_job.py): the real heartbeat, leading, signals and last words.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from nemo_dapo.heartbeat import hosts_in_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds, on a busy machine; the limits of the job itself are 3 to 15 s


@dataclass
class Job:
    """torchrun and its two ranks, held in a phase of step 2."""

    folder: Path
    launcher: subprocess.Popen[bytes]
    ranks: list[psutil.Process] = field(default_factory=list)

    @property
    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")

    @property
    def said(self) -> list[str]:
        """What the ranks themselves said."""
        return [line for line in self.console.splitlines() if line.startswith(("error: ", "stopped by ", "SIG"))]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.console
            assert self.launcher.poll() is None, self.console
            time.sleep(0.05)

    def end(self) -> int:
        """Exit code of torchrun; every rank is gone, and so is what they started."""
        code = self.launcher.wait(timeout=PATIENCE)
        _, alive = psutil.wait_procs(self.ranks, timeout=PATIENCE)
        assert alive == [], self.console
        return code

    def stacks(self, rank: int) -> str:
        return (self.folder / "errors" / f"rank_{rank}.stacks").read_text()


def start(folder: Path, phase: str, *options: str) -> Job:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "small_job.py"), str(folder), phase, *options]
    with (folder / "console").open("wb") as console:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return Job(folder, subprocess.Popen(command, env=environment, stdout=console, stderr=console))


def wait_until_held(job: Job) -> None:
    job.wait_for(lambda: all((job.folder / f"held_{rank}").exists() for rank in (0, 1)))
    found = psutil.Process(job.launcher.pid).children()
    job.ranks = sorted(found, key=lambda process: int(process.environ()["RANK"]))
    assert len(job.ranks) == 2


def kill(job: Job) -> None:
    for process in [*job.ranks, psutil.Process(job.launcher.pid)] if job.launcher.poll() is None else job.ranks:
        if process.is_running():
            process.kill()
    job.launcher.wait()


@pytest.fixture
def job_in(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts one job that is held in a phase; it is gone after the test."""
    jobs: list[Job] = []

    def job_in(phase: str, *options: str) -> Job:
        jobs.append(start(tmp_path, phase, *options))
        wait_until_held(jobs[0])
        return jobs[0]

    yield job_in
    for job in jobs:
        kill(job)


STOPPED = [(0, "rollout"), (1, "rollout"), (1, "update"), (0, "save")]


@pytest.fixture(scope="module")
def stopped_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], Job]]:
    """The job of each case, side by side, with its rank stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    jobs = {(rank, phase): start(folder / f"{rank}_{phase}", phase) for rank, phase in STOPPED}
    try:
        for (rank, _), job in jobs.items():
            wait_until_held(job)
            job.ranks[rank].suspend()
        yield jobs
    finally:
        for job in jobs.values():
            kill(job)


@pytest.mark.usefixtures("stopped_jobs")  # torchrun gives a stopped rank 30 s: the tests between pass meanwhile
def test_a_rank_that_lives_but_stands_elsewhere_is_shown_where_it_is_when_a_collective_times_out(
    job_in: Callable[..., Job],
) -> None:
    job = job_in("update", "stuck")
    assert job.end() == 1
    (line,) = job.said
    assert line.startswith("error: rank 0: ")
    assert "silent" not in line
    host = socket.gethostname()
    assert f"rank 1 in sync of step 2 on {host} since" in line
    assert f"rank 0 in update of step 2 on {host} since" in line
    assert "in step" in job.stacks(1)
    waits = r"gloo:all_reduce \d+ of the test's group"
    (warning,) = [line for line in job.console.splitlines() if line.startswith("rank 0 waits since ")]
    assert re.search(rf" in {waits}, which PyTorch ends after 15 s \(parallel.timeout_minutes\): ", warning)
    assert re.search(rf"rank 1 in sync of step 2 on {host} since \S+, in no collective; ", warning)
    assert re.search(rf"rank 0 in update of step 2 on {host} since \S+, in {waits}; ", warning)
    for rank in (0, 1):
        assert job.stacks(rank).index("asked for by a rank that waits") < job.stacks(rank).index(line[20:60])
    assert re.search(rf"^not ended, since \S+: {waits}$", job.stacks(0), re.MULTILINE)
    assert "not ended" not in job.stacks(1)
    assert "in step" in (job.folder / "errors" / "rank_0.log").read_text()


@pytest.mark.parametrize(("killed", "phase"), [(0, "rollout"), (1, "update")])
def test_a_killed_rank_is_torchruns_root_cause_and_no_other_is_blamed(
    job_in: Callable[..., Job], killed: int, phase: str
) -> None:
    job = job_in(phase)
    job.ranks[killed].kill()
    assert job.end() == 1
    cause = job.console.split("Root Cause")[1]
    assert f"rank      : {killed} " in cause
    assert "SIGKILL" in cause
    assert all("silent" not in line for line in job.said)


def test_ranks_end_with_torchrun(job_in: Callable[..., Job]) -> None:
    job = job_in("update")
    job.launcher.kill()
    assert job.end() == -signal.SIGKILL


@pytest.mark.parametrize(("phase", "number"), [("rollout", signal.SIGINT), ("update", signal.SIGTERM)])
def test_a_signal_ends_the_job_with_one_line(job_in: Callable[..., Job], phase: str, number: signal.Signals) -> None:
    job = job_in(phase)
    job.launcher.send_signal(number)
    job.end()
    assert job.said == [f"stopped by {number.name} in {phase} of step 2"]


def test_a_signal_that_is_to_save_cancels_the_rollout_and_all_ranks_stop_at_the_same_step(
    job_in: Callable[..., Job],
) -> None:
    job = job_in("rollout", "save")
    job.ranks[0].send_signal(signal.SIGUSR1)
    assert job.end() == 1  # torchrun's own for any failure
    assert job.said == [
        "SIGUSR1: a checkpoint will be saved at the end of this step, then the run stops",
        "stopped by SIGUSR1 after step 1, which is saved: the same command goes on from there",
    ]
    assert "exitcode  : 75 " in job.console.split("Root Cause")[1]


def test_in_an_update_it_finishes_the_step_first(job_in: Callable[..., Job]) -> None:
    job = job_in("update", "save")
    for rank in job.ranks:
        rank.send_signal(signal.SIGUSR1)
    job.wait_for(lambda: len(job.said) > 0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):  # schedulers send one request by several ways
        job.ranks[0].send_signal(number)
        time.sleep(0.1)  # two that are pending at once are one to the kernel
    (job.folder / "go_on").touch()
    assert job.end() == 1
    assert job.said[-1] == "stopped by SIGUSR1 after step 2, which is saved: the same command goes on from there"


def test_a_second_signal_ends_it_at_once(job_in: Callable[..., Job]) -> None:
    job = job_in("update", "save")
    job.ranks[0].send_signal(signal.SIGTERM)
    job.wait_for(lambda: len(job.said) > 0)
    job.ranks[0].send_signal(signal.SIGINT)
    job.end()
    assert job.said[-1] == "stopped by SIGTERM in update of step 2"


@pytest.mark.parametrize(("stopped", "phase"), STOPPED)
def test_a_stopped_rank_is_named_with_host_and_phase_by_the_other_one(
    stopped_jobs: dict[tuple[int, str], Job], stopped: int, phase: str
) -> None:
    job = stopped_jobs[stopped, phase]
    assert job.end() == 1
    (line,) = job.said
    assert line.startswith(f"error: rank {1 - stopped}: no sign of life for ")
    assert f"rank {stopped} is silent, last in {phase} of step 2 on {socket.gethostname()}" in line
    assert "parallel.heartbeat_timeout=3" in line
    assert f"rank {1 - stopped} is silent" not in line
    stacks = job.stacks(1 - stopped)
    assert line.split(" (parallel")[0].split(": ", 2)[2] in stacks
    assert "small_job.py" in stacks
    assert not (job.folder / "errors" / f"rank_{stopped}.stacks").exists()
    assert line in job.console.split("Root Cause")[1], (
        "torchrun's summary, the last on the console, ends with that line"
    )


def test_the_ranks_of_each_host_are_said_in_short() -> None:
    assert hosts_in_words(["node1"] * 8 + ["node2"] * 8 + ["node3"]) == "node1 0 to 7, node2 8 to 15, node3 16"
