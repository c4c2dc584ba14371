"""What Linux lets a process do about those below it: the standard library alone, for whoever starts processes of others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_PAUSE = 0.005  # seconds between two looks at what is still alive


def prctl(option: int, value: int) -> None:
    """The Linux call of that name; elsewhere nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(parent: int, how: int = signal.SIGKILL) -> None:
    """Ask for signal `how` when the thread that started this process ends; SystemExit where `parent` has ended before."""
    prctl(PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:
        raise SystemExit(f"process {parent} ended before {os.getpid()}, which it had started, was ready")


def descendants() -> list[int]:
    """Process ids of everything alive below this process, without zombies; empty where there is no /proc.

    A subreaper finds among them also those that left their session or lost their own parent.
    """
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


def reap() -> dict[int, int]:
    """Wait status (as of `os.waitpid`) of every child that has ended since the last call."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def kill_descendants() -> None:
    """SIGKILL to everything below this process, again and again until nothing is left."""
    while alive := descendants():
        for each in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        time.sleep(_PAUSE)
        reap()
