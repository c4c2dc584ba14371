"""Runs one command, and ends it with all it started once the process that asked for it stops or dies.

    python -I -S guardian.py PARENT_PID GRACE_SECONDS SCRATCH -- COMMAND...

The supervisor starts every server through this file. It uses the standard library alone and has a single thread, so that
the kernel's parent-death signal, which follows the parent's *thread*, means what it says here.

- stdin is a pipe whose write end only the supervisor holds: closing it, on purpose or by dying, ends the command.
  A fork of the supervisor may hold a copy of that end, therefore the parent's process id is watched as well.
- The guardian is a child subreaper: a descendant that left the process group or lost its own parent is still found.
- SCRATCH, the folder with the weights in host memory, is removed when the supervisor died; '' means there is none.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 0.2


def prctl(option: int, value: int) -> None:
    """The Linux call of that name; elsewhere nothing, and the pipe alone does the work."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Process ids of everything alive below this process, without zombies; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat:
                # The command's name may hold spaces and brackets: the fields start after the last bracket.
                state, parent = stat.read().rpartition(")")[2].split()[:2]
        except OSError:  # ended while we looked
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def reap(pid: int, status: int | None) -> int | None:
    """Collect every ended child; the exit status of `pid` once it is among them."""
    while True:
        try:
            ended, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if ended == 0:
            return status
        if ended == pid:
            status = os.waitstatus_to_exitcode(code)


def end_all(pid: int, status: int | None, grace: float) -> int | None:
    """SIGTERM to the command's group, SIGKILL to whatever is alive after `grace` seconds; the command's exit status."""
    if status is None:
        os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and descendants():
        time.sleep(0.02)
        status = reap(pid, status)
    while alive := descendants():
        for each in alive:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
        status = reap(pid, status)
    return reap(pid, status)


def main(parent: int, grace: float, scratch: str, command: list[str]) -> int:
    """Run `command` to its end or to the parent's; returns its exit status, negative for a signal."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    status: int | None = None
    asked_to_end = False
    while status is None and not asked_to_end:
        readable, _, _ = select.select([0], [], [], LOOK_SECONDS)
        asked_to_end = os.getppid() != parent or (bool(readable) and os.read(0, 1) == b"")
        status = reap(child.pid, status)
    # A server that died by itself leaves children that cannot serve: they get no grace.
    status = end_all(child.pid, status, grace if asked_to_end else 0.0)
    if scratch and os.getppid() != parent:
        shutil.rmtree(scratch, ignore_errors=True)
    return status if status is not None else 1


if __name__ == "__main__":
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The pipe is the only way to ask. A handler and not SIG_IGN, which the command would inherit.
        signal.signal(handled, lambda *_: None)
    code = main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[5:])
    os._exit(code if code >= 0 else 128 - code)
