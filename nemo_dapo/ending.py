"""How a rank ends: by one line on standard error, said once for the job, and an exit code."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nemo_dapo.phase import Phase
from nemo_dapo.signals import SAVED_EXIT_CODE, Stopped, StopSignals

if TYPE_CHECKING:  # a rank can end before torch is imported, or because it is missing
    from nemo_dapo.heartbeat import Heartbeat

CONSEQUENCE_SECONDS = 60.0  # twice what ending the servers may take
ALIKE_SECONDS = 10.0  # for rank 0 to say what every rank finds in its options
LAST_WORD_SECONDS = 1.0  # for rank 0's, before the first exit has torchrun end all ranks
FAILED, BAD_OPTIONS = 1, 2  # exit codes


class Ending:
    """Of this rank. `output_dir` is known once the options are good, `heartbeat` once there are other ranks."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.signals = StopSignals(say, is_rank_zero=self.rank == 0)
        self.phase = Phase()
        self.output_dir: Path | None = None
        self.heartbeat: Heartbeat | None = None
        self.is_said = False

    @contextmanager
    def ends_the_process(self) -> Iterator[None]:
        """Whatever the block raises becomes a line and an exit: 2 for bad options, 1 for a failed run, 128 + a signal."""
        try:
            yield
        except Stopped:
            say(f"stopped by {self.signals.name} in {self.phase.name} of step {self.phase.step}")
            self.exit(self.signals.exit_code())
        except Exception as error:
            if self.output_dir is None:
                self.refuse(error)
            self.say(error)
            self.exit(FAILED)

    @contextmanager
    def says_at_once(self) -> Iterator[None]:
        """An error of the block is said before what surrounds it is closed, which may take a while, and raised on."""
        try:
            yield
        except Exception as error:
            self.say(error)
            raise

    def say(self, error: Exception) -> None:
        """One line for the whole job, its traceback in `errors/` of the run; silent where another rank has said it.

        A rank that fails because another one did is silent, or a thousand ranks would bury the cause, and waits: the
        launcher ends all ranks when the first one exits, and rank 0 has servers to end before that.
        """
        if self.is_said:
            return
        self.is_said = True
        self.signals.saves_first = False
        if getattr(error, "is_consequence", False):
            self._wait_for_the_cause()
            return
        place = self._write_traceback(error)
        if self.heartbeat is not None and self.heartbeat.can_explain(error):
            if self.signals.name and self.rank:  # the job is being ended, and another rank was faster
                self.exit(FAILED)
            self._find_the_rank_at_fault(error)
        message = f"{type(error).__name__}: {error}"
        if self.heartbeat is None or self.heartbeat.first_to_say(message):
            say_error(f"error: rank {self.rank}: {message} ({self._where()}; traceback in {place})")
        else:
            self._wait_for_the_cause()

    def refuse(self, error: Exception) -> NoReturn:
        """Bad options, which every rank finds alike: rank 0 says so, another one only where rank 0 does not end."""
        if self.rank:
            time.sleep(ALIKE_SECONDS)
        say_error(f"error: {error}")
        self.exit(BAD_OPTIONS)

    def end_job(self, message: str, speaks: bool) -> NoReturn:
        """For the heartbeat: this rank's main thread may never return."""
        if speaks:
            say_error(f"error: rank {self.rank}: {message}")
        else:
            time.sleep(CONSEQUENCE_SECONDS)
        self.exit(FAILED)

    def saved(self, step: int) -> NoReturn:
        """After a checkpoint that a signal asked for; every rank calls it at the same time."""
        self.signals.saves_first = False
        if self.rank:
            time.sleep(LAST_WORD_SECONDS)
        else:
            name = self.signals.name or "a signal to another rank"
            say(f"stopped by {name} after step {step}, which is saved: the same command goes on from there")
        self.exit(SAVED_EXIT_CODE)

    def exit(self, code: int) -> NoReturn:
        """Not sys.exit: other ranks may sit in a collective that this rank's orderly end would wait for."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _wait_for_the_cause(self) -> None:
        if self.rank:
            time.sleep(CONSEQUENCE_SECONDS)

    def _find_the_rank_at_fault(self, error: Exception) -> None:
        assert self.heartbeat is not None
        if self.signals.name:
            return
        try:
            self.heartbeat.accuse(f"{type(error).__name__}: {error}")  # ends the process
        except Stopped:  # torchrun has seen a rank end, and names it
            return

    def _write_traceback(self, error: Exception) -> Path:
        assert self.output_dir is not None
        place = self.output_dir / "errors" / f"rank_{self.rank}.log"
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a") as file:
            file.write(f"{time.strftime('%F %T')} {self._where()}\n{''.join(traceback.format_exception(error))}\n")
        return place

    def _where(self) -> str:
        """What this rank was at, and its host: `update of step 3 on node17`."""
        return f"{self.phase.name} of step {self.phase.step} on {socket.gethostname()}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say_error(line: str) -> None:
    """Also into torchrun's error file: its summary, the last thing on the console, then ends with this very line."""
    say(line)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
