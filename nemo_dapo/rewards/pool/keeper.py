"""The parent of one worker: whatever the worker starts ends with it, and what it prints is escaped into a log.

    trainer ── requests, replies ──────────┐
       └ keeper (subreaper, a copy of the  ▼
         fresh interpreter) ───────────── worker ── children of the reward function, theirs, daemons …

Without it a child outlives a worker that ended itself, or a trainer that was killed, and one that holds the worker's pipe
hides the worker's death. The keeper ends everything below it when the worker ends, when the trainer asks (SIGTERM) and when
the trainer dies; then it ends itself in the way the worker did, so that the trainer sees the worker's own exit status.
"""

from __future__ import annotations

import os
import select
import signal
import sys

from nemo_dapo.processes import PR_SET_CHILD_SUBREAPER, die_with_parent, kill_descendants, prctl, reap
from nemo_dapo.telemetry.escape import printable

_READ_SIZE = 1 << 16
_MAX_LINE = 4096  # bytes of output after which a line is cut
_MAX_LOG = 64 << 20  # bytes of the log, which all workers of a run share: what comes after is dropped
_SECONDS_OF_LAST_WORDS = 1.0  # for what is still in the pipe when everything has ended


def become_worker(trainer: int, log: str) -> None:
    """Fork: returns in the worker, a session of its own whose output goes to the file `log` ('' = standard error).

    The calling process becomes its keeper and never returns. Standard input and output stay the worker's.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake = _wake_on_signals()
    die_with_parent(trainer, signal.SIGTERM)
    output, printed = os.pipe()
    keeper, worker = os.getpid(), os.fork()
    if worker == 0:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(signal.set_wakeup_fd(-1))
        os.close(wake)
        os.close(output)
        os.setsid()
        os.dup2(printed, 2)
        os.close(printed)
        die_with_parent(keeper)
        return
    os.close(printed)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    _end_like(_keep(worker, wake, _Log(output, log)))


def _wake_on_signals() -> int:
    """A pipe to wait on: SIGCHLD and SIGTERM write their number into it."""
    wake, alarm = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle: it closes the pool
    return wake


def _keep(worker: int, wake: int, log: _Log) -> int:
    """Copy the worker's output until it ends or shall; then end all that is left. Returns the worker's wait status."""
    status = None
    asked = False
    while status is None and not asked:
        ready, _, _ = select.select([wake, *log.sources], [], [])
        log.copy(ready)
        if wake in ready:
            asked = signal.SIGTERM in os.read(wake, _READ_SIZE)
            status = reap().get(worker)
    kill_descendants()
    log.finish()
    return signal.SIGKILL if status is None else status


def _end_like(status: int) -> None:
    """End this process as one with wait status `status` did."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


class _Log:
    """Lines from the pipe `output`, made printable, appended to the file `path` ('' = standard error)."""

    def __init__(self, output: int, path: str) -> None:
        self.sources = [output]
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if path else os.dup(2)
        self._bounded = bool(path)
        self._rest = b""

    def copy(self, ready: list[int]) -> None:
        for source in [one for one in self.sources if one in ready]:
            piece = os.read(source, _READ_SIZE)
            if not piece:
                self.sources.remove(source)
            *lines, self._rest = (self._rest + piece).split(b"\n")
            if len(self._rest) > _MAX_LINE or not piece:
                lines, self._rest = [*lines, self._rest], b""
            self._write(lines)

    def finish(self) -> None:
        while self.sources and (ready := select.select(self.sources, [], [], _SECONDS_OF_LAST_WORDS)[0]):
            self.copy(ready)
        self._write([self._rest])

    def _write(self, lines: list[bytes]) -> None:
        text = "".join(printable(line.decode(errors="backslashreplace"), _MAX_LINE) + "\n" for line in lines if line)
        try:
            if text and not (self._bounded and os.fstat(self._file).st_size > _MAX_LOG):
                os.write(self._file, text.encode())
        except OSError as error:  # a full disk must not end the worker: its verdicts are what counts
            self._file = os.open(os.devnull, os.O_WRONLY)
            if self._bounded:
                print(f"what reward functions print is no longer recorded: {error}", file=sys.stderr, flush=True)
