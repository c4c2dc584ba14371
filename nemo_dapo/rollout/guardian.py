"""Runs one command, and ends it with all it started once the process that asked for it stops or dies.

    python -I -S guardian.py PARENT_PID GRACE_SECONDS SESSION SCRATCH -- COMMAND...

The supervisor starts every server through this file. It needs the standard library alone and has a single thread, so that
the kernel's parent-death signal, which follows the parent's *thread*, means what it says here.

- stdin is a pipe whose write end only the supervisor holds: closing it, on purpose or by dying, ends the command; KILL
  before that ends it by SIGKILL at once, for one that is stopped or hangs and would sit out the grace.
  A fork of the supervisor may hold a copy of that end, therefore the parent's process id is watched as well.
- The guardian is a child subreaper: a descendant that left the process group or lost its own parent is still found.
- SESSION, a file, says which session the command leads: with it `processes.kill_session` ends what a killed guardian left.
- SCRATCH, the folder with the weights in host memory, is removed when the supervisor died; '' means there is none.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # -I leaves it out

from nemo_dapo.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    descendants,
    kill_descendants,
    prctl,
    reap,
    record_session,
)

LOOK_SECONDS = 0.2
KILL = b"k"


def end_all(pid: int, ended: dict[int, int], grace: float) -> None:
    """SIGTERM to the command's group, SIGKILL to whatever is alive after `grace` seconds; adds to the statuses `ended`."""
    if pid not in ended and grace:
        os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and descendants():
        time.sleep(0.02)
        ended |= reap()
    if pid not in ended and pid in descendants():
        os.kill(pid, signal.SIGKILL)
        ended[pid] = os.waitpid(pid, 0)[1]
    kill_descendants()


def main(parent: int, grace: float, session: str, scratch: str, command: list[str]) -> int:
    """Run `command` to its end or to the parent's; returns its exit status, negative for a signal."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    if session:
        record_session(session, child.pid)
    ended: dict[int, int] = {}
    asked_to_end = False
    while child.pid not in ended and not asked_to_end:
        readable, _, _ = select.select([0], [], [], LOOK_SECONDS)
        asked = os.read(0, 1) if readable else None
        if asked == KILL:
            grace = 0.0
        asked_to_end = os.getppid() != parent or asked is not None
        ended |= reap()
    # A server that died by itself leaves children that cannot serve: they get no grace.
    end_all(child.pid, ended, grace if asked_to_end else 0.0)
    if scratch and os.getppid() != parent:
        shutil.rmtree(scratch, ignore_errors=True)
    return os.waitstatus_to_exitcode(ended[child.pid]) if child.pid in ended else 1


if __name__ == "__main__":
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The pipe is the only way to ask. A handler and not SIG_IGN, which the command would inherit.
        signal.signal(handled, lambda *_: None)
    code = main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[6:])
    os._exit(code if code >= 0 else 128 - code)
