"""A rank ends with its launcher, also one that is killed before the rank has asked the kernel for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

RANK = """
import os, sys, time
from nemo_dapo.launcher import end_with_launcher
print(os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
end_with_launcher()
print("tied", flush=True)
time.sleep(600)
"""
# Stands for torchrun, which too starts each rank in a session of its own; "{}" is a wrapper such as numactl, or nothing.
LAUNCHER = """
import subprocess, sys
rank = [*sys.argv[3:], sys.executable, "-c", sys.argv[1], sys.argv[2]]
subprocess.Popen(rank, start_new_session=True).wait()
"""
PATIENCE = 60.0  # seconds, on a busy machine


def start(delay: float, *wrapper: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    command = [sys.executable, "-c", LAUNCHER, RANK, str(delay), *wrapper]
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    launcher = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    return launcher, psutil.Process(int(launcher.stdout.readline()))


@pytest.mark.parametrize(
    ("delay", "wrapper"),
    [(0.0, ()), (1.0, ()), (0.0, ("/bin/sh", "-c", '"$@" & wait', "sh"))],
    ids=["tied", "killed before it was tied", "below a wrapper"],
)
def test_a_rank_is_gone_after_its_launcher_was_killed(delay: float, wrapper: tuple[str, ...]) -> None:
    launcher, rank = start(delay, *wrapper)
    try:
        if not delay:
            assert launcher.stdout is not None
            assert launcher.stdout.readline() == "tied\n", "a rank whose launcher lives goes on"
        if wrapper:  # the kernel's signal follows the parent alone: the wrapper is what must go
            psutil.Process(rank.ppid()).kill()
        launcher.kill()
        launcher.wait()
        gone, _ = psutil.wait_procs([rank], timeout=PATIENCE)
        assert gone
    finally:
        if rank.is_running():
            rank.kill()
        launcher.kill()
        launcher.communicate()


def test_a_rank_that_nobody_launched_is_left_alone() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    code = RANK.replace("time.sleep(600)", "")
    done = subprocess.run(
        ["setsid", sys.executable, "-c", code, "0"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.endswith("tied\n")
