"""SIGTERM, SIGINT and SIGUSR1: a run ends within seconds by one line, or saves first where it was asked to.

Python runs a handler between two instructions of the main thread, which may sit in a collective for half an hour. So a
thread of its own reads the signals from a pipe that the interpreter's C handler writes to at once.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WAKE = signal.SIGUSR2  # from that thread to the main one, to raise there
# Of schedulers, by which one request comes several times: Slurm's daemon and its srun both send it, torchrun hands it on.
REPEATED, REPEAT_SECONDS = (signal.SIGTERM, signal.SIGUSR1), 10.0
END_SECONDS = 8.0  # for an orderly end, the servers' among it; then the process just exits
SAVED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Stopped(KeyboardInterrupt):
    """Raised in the main thread where a signal ends the run at once. No Exception, so that nothing takes it for a fault."""


class StopSignals:
    """Turns signals into an end of the run. Make it in the main thread, once; it stays until the process ends.

    `saves_first`, once set, has the first signal only set `asked`, which the training loop looks at between steps and
    during a rollout. The next one that is no repeat, or the first without it, raises `Stopped` in the main thread; a
    process that is still there END_SECONDS later, or is signalled once more, exits. A rank other than 0 has nothing to put
    in order and exits at once.
    """

    def __init__(self, say: Callable[[str], None], *, is_rank_zero: bool) -> None:
        self.say, self.is_rank_zero = say, is_rank_zero
        self.saves_first = False
        self.asked = threading.Event()
        self.name = ""  # of the signal that came first
        self._since = -math.inf  # time of the last one that was heeded
        self._ending = self._raises = False
        self._main = threading.get_ident()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in HANDLED:
            signal.signal(number, lambda *_: None)  # the pipe has it
        signal.signal(WAKE, self._raise)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended."""
        return 128 + signal.Signals[self.name]

    def _raise(self, *_: object) -> None:
        if self._raises:
            self._raises = False
            raise Stopped(self.name)

    def _read(self, reader: int) -> None:
        while True:
            number = signal.Signals(os.read(reader, 1)[0])
            if number not in HANDLED or self._is_repeat(number):
                continue
            self._since = time.monotonic()
            if not self.name and self.saves_first:
                self.name = number.name
                if self.is_rank_zero:
                    self.say(f"{self.name}: a checkpoint will be saved at the end of this step, then the run stops")
                self.asked.set()
                continue
            self.name = self.name or number.name
            if not self.is_rank_zero or self._ending:
                self._exit()
            self._ending = self._raises = True
            signal.pthread_kill(self._main, WAKE)
            threading.Timer(END_SECONDS, self._exit).start()

    def _is_repeat(self, number: int) -> bool:
        return number in REPEATED and time.monotonic() - self._since < REPEAT_SECONDS

    def _exit(self) -> None:
        if self.is_rank_zero:
            self.say(f"stopped by {self.name}")
        os._exit(self.exit_code())
