"""The job files of examples/slurm under a real Slurm: nodes are checked, and nobody who is sent back loses anything."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.checkpoints import tensors
from tests.cluster import Cluster, Job, slurm, why_not
from tests.cluster.host import ROOT
from tests.cluster.small_run import environment, options
from tests.tiny import save_tiny_model

FILES = sorted((ROOT / "examples" / "slurm").iterdir())
COLOCATED = "examples/slurm/colocated.sbatch"
STEPS = 6
ANY_GAP = "rollout.max_logprob_gap=100"  # the script's samples come with a log-probability of 0
PATIENCE = 300.0  # seconds; a start takes 30 on idle cores, and cores are not always idle

needs_slurm = [pytest.mark.slow, pytest.mark.timeout(1200)]
if reason := why_not():
    needs_slurm.append(pytest.mark.skip(reason=reason))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shell_files_are_free_of_what_shellcheck_knows(path: Path) -> None:
    command = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([command, "--external-sources", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_slurm_or_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PATH", "/nowhere")
    assert why_not() == "needs a real Slurm: apt-get install slurm-wlm munge iproute2"
    monkeypatch.setattr(slurm, "NEEDED", {})
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert "root" in why_not()


@pytest.mark.skipif(bool(reason), reason=reason)
def test_a_container_that_may_not_make_namespaces_is_told_from_a_machine_that_may() -> None:
    ask = [sys.executable, "-c", "from tests.cluster import why_not; print(why_not())"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", *ask], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout.startswith("needs network and mount namespaces: "), done.stderr
    assert "not permitted" in done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(hosts=2) as cluster:
        yield cluster


def submit(cluster: Cluster, folder: Path, *arguments: str, run_dir: Path | None = None, **variables: str) -> Job:
    output = f"--output={folder / 'console'}"
    env = environment(folder, run_dir or folder / "run") | variables
    return cluster.sbatch(output, COLOCATED, *arguments, env=env)


class TestNodeCheck:
    pytestmark = needs_slurm

    @pytest.fixture(scope="class")
    def console(self, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
        """Of a job whose second host has lost the shared disk, and has little host memory left."""
        folder = tmp_path_factory.mktemp("bad_node")
        (folder / "run").mkdir()
        host = cluster["host2"]
        host.run("mount", "-t", "tmpfs", "tmpfs", str(folder / "run"))
        try:
            job = submit(cluster, folder, SHM_GIB="3", INTERFACE="eth0", VLLM_PYTHON="/nowhere/python")
            assert job.wait(60) == "FAILED"
            assert job.restarts == 0
            return job.console
        finally:
            host.run("umount", str(folder / "run"))

    def test_a_node_without_the_shared_disk_is_named(self, console: str) -> None:
        (line,) = [line for line in console.splitlines() if "does not see" in line]
        assert line.startswith("node host2: ")
        assert "which node host1 has written" in line

    def test_every_node_says_all_that_it_lacks(self, console: str) -> None:
        for node in ("host1", "host2"):
            assert f"node {node}: has 2 GiB free in /dev/shm, needs SHM_GIB=3" in console
            assert f"node {node}: VLLM_PYTHON=/nowhere/python is no program here" in console
        assert "INTERFACE" not in console

    def test_nothing_was_started_and_the_remedy_is_said(self, console: str) -> None:
        assert "sbatch --exclude=NODE" in console
        assert "importing" not in console


class TestFailure:
    pytestmark = needs_slurm

    def test_a_rank_that_fails_before_a_checkpoint_ends_the_job(self, cluster: Cluster, tmp_path: Path) -> None:
        """srun then ends the other node's ranks by the signal by which Slurm asks for a checkpoint."""
        script = tmp_path / "job.py"
        script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(600)\n")
        job = submit(cluster, tmp_path, SCRIPT=str(script))
        assert job.wait(PATIENCE) == "FAILED", job.console
        assert job.restarts == 0
        assert (tmp_path / "run" / ".failed").read_text() == "host2\n"


@dataclass
class Preempted:
    """A job that was sent back three times, and the run whose rollouts it played back, which nobody disturbed."""

    folder: Path
    restarts: list[int]
    steps_saved: list[int]  # the newest checkpoint when Slurm had taken the hosts away
    console: str
    left: list[str]


def record(folder: Path) -> None:
    """Two ranks on this machine, with samples from a script; their rollouts are written down."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = ["benchmarks/held_job.py", str(folder), "never", "0", "scripted", f"output_dir={folder / 'recorded'}"]
    done = subprocess.run(
        [*launcher, *job, *options(folder, steps=STEPS), ANY_GAP],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def preempt(cluster: Cluster, job: Job, hold: Path, grace: int) -> None:
    """Returns when a job of the higher partition has had both hosts; the next `hold` is the caller's."""
    cluster.slurm("scontrol", "update", "PartitionName=low", f"GraceTime={grace}")
    wait_until(job, hold.with_name("held").exists)
    urgent = cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    urgent.wait(PATIENCE)
    hold.with_name("held").unlink()


def let_time_run_out(cluster: Cluster, job: Job, hold: Path) -> None:
    """Returns when the job waits in the queue again, which it was asked to leave for ten minutes before its limit."""
    wait_until(job, hold.with_name("held").exists)
    restarts = job.restarts
    cluster.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")  # minutes: it is due at Slurm's next look
    wait_until(job, lambda: job.restarts > restarts)
    cluster.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    hold.with_name("held").unlink()


def wait_until(job: Job, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, job.console[-5000:]
        assert job.state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), job.console[-5000:]
        time.sleep(0.1)


def newest_step(run_dir: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_??????"))


class TestPreemption:
    pytestmark = needs_slurm

    @pytest.fixture(scope="class")
    def preempted(self, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preempted]:
        """Held in step 2 until its time has run out, and queues again by itself; held in step 4 and taken away by Slurm at
        once; held in step 6 and given time, then it queues again by itself."""
        folder = tmp_path_factory.mktemp("preempted")
        save_tiny_model(folder / "model", hidden=128, heads=4)
        record(folder)
        hold, restarts, saved = folder / "hold", [], []
        hold.write_text("2")
        replay = f"rollout.replay={folder / 'recorded' / 'rollouts'}"
        job = submit(cluster, folder, *options(folder, steps=STEPS), replay, ANY_GAP)
        at_once, in_time = (functools.partial(preempt, grace=seconds) for seconds in (0, 60))
        for send_back, next_hold in ((let_time_run_out, 4), (at_once, 6), (in_time, STEPS + 1)):
            send_back(cluster, job, hold)
            hold.write_text(str(next_hold))
            restarts.append(job.restarts)
            saved.append(newest_step(folder / "run"))
        assert job.wait(PATIENCE) == "COMPLETED", job.console[-5000:]
        left = [line for host in cluster.hosts for line in cluster.left_on(host)]
        yield Preempted(folder, restarts, saved, job.console, left)
        shutil.rmtree(folder / "run")

    def test_slurm_sends_it_back_to_the_queue_each_time(self, preempted: Preempted) -> None:
        assert preempted.restarts == [1, 2, 3]

    def test_it_saves_the_step_it_has_finished_at_its_limit_and_with_and_without_a_time_of_grace(
        self, preempted: Preempted
    ) -> None:
        assert preempted.steps_saved == [1, 3, 5]  # checkpoint.every=2 alone would have left 0, 2 and 4

    def test_its_final_state_is_that_of_the_undisturbed_run_bit_for_bit(self, preempted: Preempted) -> None:
        expected, got = (tensors(preempted.folder / name, STEPS) for name in ("recorded", "run"))
        assert expected.keys() == got.keys()
        assert len(expected) > 20, "weights, their copies and two moments of each"
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name

    def test_every_step_is_recorded_once(self, preempted: Preempted) -> None:
        metrics = (preempted.folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert len(metrics) == STEPS

    def test_each_rank_s_console_is_a_file_below_its_node(self, preempted: Preempted) -> None:
        logs = preempted.folder / "run" / "logs"
        assert {path.relative_to(logs).parts[0] for path in logs.rglob("stdout.log")} == {"host1", "host2"}
        assert "0: step 6/6" in preempted.console

    def test_nothing_of_it_is_left_on_the_hosts(self, preempted: Preempted) -> None:
        assert preempted.left == []
