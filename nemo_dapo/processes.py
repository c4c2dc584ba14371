"""What Linux lets a process do about those below it: the standard library alone, for whoever starts processes of others."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
_PAUSE = 0.005  # seconds between two looks at what is still alive
_TRACKER_SECONDS = 2.0  # for a resource tracker to remove what the killed processes left, then it is killed as well


def prctl(option: int, value: int) -> None:
    """The Linux call of that name; elsewhere nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(parent: int, how: int = signal.SIGKILL) -> None:
    """Ask for signal `how` when the thread that started this process ends; SystemExit where `parent` has ended before."""
    prctl(PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:
        raise SystemExit(f"process {parent} ended before {os.getpid()}, which it had started, was ready")


def _stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on: state, parent, group, session, …; None where it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            # The command's name may hold spaces and brackets: the fields start after the last bracket.
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return None


def _alive() -> dict[int, list[str]]:
    """The `_stat` of every process that is no zombie; empty where there is no /proc."""
    entries = [entry for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []
    found = {int(entry): _stat(entry) for entry in entries}
    return {pid: fields for pid, fields in found.items() if fields and fields[0] != "Z"}


def descendants() -> list[int]:
    """Process ids of everything alive below this process, without zombies; empty where there is no /proc.

    A subreaper finds among them also those that left their session or lost their own parent.
    """
    children: dict[int, list[int]] = {}
    for pid, fields in _alive().items():
        children.setdefault(int(fields[1]), []).append(pid)
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
    _kill_all(descendants)


def _kill_all(those: Callable[[], list[int]]) -> list[int]:
    """SIGKILL to `those()` until there are none; what was found.

    Python's resource trackers come last: they end by themselves once their users have, and unlink the shared memory and
    semaphores that these left in /dev/shm.
    """
    found: list[int] = []
    deadline = time.monotonic() + _TRACKER_SECONDS
    while alive := those():
        found += [each for each in alive if each not in found]
        spare = time.monotonic() < deadline
        for each in alive:
            if not (spare and _is_resource_tracker(each)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        time.sleep(_PAUSE)
        reap()
    return found


def _is_resource_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return b"resource_tracker" in line.read()
    except OSError:
        return False


_SESSION, _STARTED = 3, 19  # which of the fields of `_stat`


def record_session(path: str, leader: int) -> None:
    """Write to `path` what `kill_session` needs to find the session that process `leader` leads, also after its death."""
    fields = _stat(leader)
    with open(path, "w") as file:
        json.dump({"session": leader, "started": int(fields[_STARTED]) if fields else 0, "boot": _boot()}, file)


def kill_session(path: str) -> list[int]:
    """SIGKILL to what is left of the session recorded at `path`, whose leader is dead or ours to end; what was killed.

    A session outlives its leader, and a process that renames itself or wipes its environment still belongs to it. Nothing
    is touched when the machine was started anew since, or when the leader's number belongs to a younger process now.
    """
    try:
        with open(path) as file:
            said = json.load(file)
    except (OSError, ValueError):  # none was recorded, or its writer was killed at it
        return []
    leader = _stat(said["session"])
    if said["boot"] != _boot() or (leader and int(leader[_STARTED]) != said["started"]):
        return []

    def members() -> list[int]:
        return [
            pid
            for pid, fields in _alive().items()
            if int(fields[_SESSION]) == said["session"] and int(fields[_STARTED]) >= said["started"]
        ]

    return _kill_all(members)


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
