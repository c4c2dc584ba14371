"""What a rank owes to torchrun, which started it: to end with it.

Only the standard library is imported here: a script calls `end_with_launcher` before anything slow, since a launcher that
is killed while its ranks still import leaves them waiting for a rendezvous that nobody serves.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Under torchrun, let the kernel end this rank when torchrun dies, and end it now where that has happened already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    # SIGKILL: a rank without its launcher has nobody to finish a step with. What it started ends by itself.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not any(is_launcher(pid) for pid in ancestors()):
        os._exit(1)


def ancestors() -> Iterator[int]:
    """Process ids from the parent upwards; a wrapper such as numactl may stand between torchrun and its rank."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            with open(f"/proc/{pid}/stat") as stat:
                # The command's name may hold spaces and brackets: the fields start after the last bracket.
                pid = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:  # gone, or another user's
            return


def is_launcher(pid: int) -> bool:
    """Whether `pid` may be what started this rank: torchrun by its name, or a program of this Python that uses its library.

    An orphan's new parent is neither: init, a service manager or a container's supervisor.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            return b"torch" in command.read() or os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:  # gone, or another user's
        return False
