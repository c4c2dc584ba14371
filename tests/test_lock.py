"""A folder belongs to one run; its lock goes with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_dapo import lock
from nemo_dapo.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from nemo_dapo.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_in_a_line_that_names_the_first_until_that_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        try:
            with pytest.raises(ValueError, match="is in use") as refused, RunLock(tmp_path / "run"):
                pass
        finally:
            first.kill()
            first.wait()
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    for part in (f"process {first.pid} on {socket.gethostname()}", "Slurm job 4711", f"output_dir={tmp_path / 'run'}"):
        assert part in message
    with RunLock(tmp_path / "run"):  # the kernel released it
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_is_free_again_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path):
            pass


def test_a_file_system_that_cannot_lock_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path):
        assert "cannot be locked (Function not implemented)" in caplog.text


def test_a_lock_that_is_being_written_names_nobody() -> None:
    assert lock.describe("") == "a run that has just started"
