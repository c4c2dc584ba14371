"""One reward worker as the trainer sees it: started below a keeper, spoken to within deadlines, ended with its children."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import IO, Any

from nemo_dapo.types import Verdict

_READ_SIZE = 1 << 16
_SETUP_TIMEOUT = 10.0  # seconds
_KEEPER_TIMEOUT = 5.0  # seconds until a keeper has ended all that is below it
_OWN_END = 1.0  # seconds for a worker whose output has ended to be seen ending


class WorkerLostError(Exception):
    """The worker is gone or was killed; the message says why (`timeout: …`, `died: …`)."""


class ItemTimeoutError(WorkerLostError):
    """The worker was killed because one item took too long."""


class WorkerProcess:
    """A `nemo_dapo.rewards.pool.worker`, ready once `wait_ready` has returned; what it prints goes to the file `log`.

    It inherits the open file `inherited`, which `setup` names by its number.
    """

    def __init__(self, setup: dict[str, Any], log: str = "", inherited: IO[str] | None = None) -> None:
        # The same import path as here: the user's function may lie beside the script that was started.
        path = os.pathsep.join([os.getcwd() if entry == "" else entry for entry in sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nemo_dapo.rewards.pool.worker", str(os.getpid()), log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=() if inherited is None else (inherited.fileno(),),
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._input, self._output = self.process.stdin, self.process.stdout
        os.set_blocking(self._input.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._input, select.POLLOUT)
        self._readable.register(self._output, select.POLLIN)
        self._buffer = bytearray()
        # Written at once, so that a spare gets ready while nobody waits for it; it fits the pipe's buffer.
        self.send(json.dumps(setup).encode() + b"\n", _SETUP_TIMEOUT)

    def wait_ready(self, timeout: float) -> bool:
        """Wait until the worker can score; True when one call of its function scores a whole group.

        Raises ValueError for a function it refuses, WorkerLostError when it dies or takes longer than `timeout` seconds.
        """
        answer = json.loads(self._line(timeout, WorkerLostError, "to start"))
        if "refused" in answer:
            self.kill()
            raise ValueError(answer["refused"])
        return bool(answer["group"])

    def send(self, data: bytes, timeout: float) -> None:
        """Write `data` whole. Raises WorkerLostError when the worker does not take it within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        view = memoryview(data)
        while view:
            if not self._writable.poll(max(deadline - time.monotonic(), 0) * 1000):
                self.kill()
                raise WorkerLostError(f"timeout: the worker took no input for {timeout:g} s and was killed")
            try:
                view = view[os.write(self._input.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise WorkerLostError(self._how_it_died()) from None

    def receive(self, timeout: float) -> list[Verdict]:
        """The verdicts of the next unit. Raises WorkerLostError, the worker killed, after `timeout` seconds without."""
        return [Verdict(*fields) for fields in json.loads(self._line(timeout, ItemTimeoutError, "for one item"))]

    def _line(self, timeout: float, late: type[WorkerLostError], purpose: str) -> bytes:
        deadline = time.monotonic() + timeout
        while (end := self._buffer.find(b"\n")) < 0:
            if not self._readable.poll(max(deadline - time.monotonic(), 0) * 1000):
                self.kill()
                raise late(f"timeout: more than {timeout:g} s {purpose}; the worker was killed")
            piece = os.read(self._output.fileno(), _READ_SIZE)
            if not piece:
                raise WorkerLostError(self._how_it_died())
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _how_it_died(self) -> str:
        self.kill()
        code = self.process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"died: the worker ended {how}"

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, by itself or by another's hand."""
        return self.process.poll() is not None

    def abort(self) -> None:
        """Ask the keeper to end everything, from any thread: whoever waits for the worker finds that, and clears up."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # one that was stopped hears it too

    def kill(self) -> None:
        """End the worker and whatever it started; returns once they are gone. Harmless when they are."""
        if self.process.poll() is None:
            # A worker whose output has ended is ending itself: its own exit status says more than our signal.
            if not self._output_ended() or not self._ends_within(_OWN_END):
                self.abort()
            if not self._ends_within(_KEEPER_TIMEOUT):
                self.process.kill()  # the kernel then kills the worker
                self.process.wait()
        self._input.close()
        self._output.close()

    def _ends_within(self, timeout: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.returncode is not None

    def _output_ended(self) -> bool:
        if self._output.closed:
            return False
        return bool(self._readable.poll(0))

    def close(self, timeout: float) -> None:
        """End of input, which ends an idle worker; killed after `timeout` seconds."""
        if not self._input.closed:
            self._input.close()
        self._ends_within(timeout)
        self.kill()
