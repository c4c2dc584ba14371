"""The agent of this very node, where the run starts it: started again when its lease is lost, ended with this process.

The agent runs below a guardian (`guardian.py`), as its servers do below theirs, so that neither it nor they outlive this
process. It shows a pulse on its standard output: one that is stopped, or hangs, is killed and started anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_dapo.rollout import guardian
from nemo_dapo.rollout.agent import ENDED, REFUSED
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.hub import TOKEN_VARIABLE
from nemo_dapo.rollout.servers import END_GRACE_SECONDS, log_excerpt
from nemo_dapo.rollout.weights.store import WeightStore

log = logging.getLogger(__name__)

GRACE_SECONDS = 2 * END_GRACE_SECONDS + 5.0  # what the agent may need to end its servers
START_SECONDS = 120.0  # to the first pulse: imports from a network file system
RETRY_SECONDS = 2.0
LEAVE_SECONDS = 15.0  # for rank 0 to tell the agents of its end before their own ranks do
AGENT_LOG = "agent.log"
MAX_SILENT_ENDS = 3  # in a row, of an agent that never showed a pulse


@dataclass(frozen=True)
class Door:
    """How an agent that the run starts finds the hub and is recognised, and what it will have to hold."""

    addresses: list[str]
    token: str
    lease: float
    weight_bytes: int  # of one version


class AgentKeeper:
    """Keeps one agent that serves the hub behind `door`; `start` returns at once, `close` when it has ended.

    The weights' folder is the keeper's: the next agent finds in it what the one before it was given.
    """

    def __init__(self, door: Door, log_path: Path) -> None:
        self.door, self.log_path = door, log_path
        self.store = WeightStore(door.weight_bytes, node_name())
        self.failed = ""  # why it is not started any more
        self._closing = threading.Event()
        self._spawning = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._thread = threading.Thread(target=self._keep, name="agent", daemon=True)

    def start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def close(self, patience: float = 0.0) -> None:
        """End the agent, and by it its servers, unless the hub tells it to end within `patience`; safe to call twice."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(patience)
        with self._spawning:
            self._ask_to_end(kill=False)
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS + END_GRACE_SECONDS)
        if self._process and self._process.poll() is None:
            log.error("the guardian of the agent (pid %d) did not end; killing it", self._process.pid)
            self._process.kill()
        self.store.close()

    def _keep(self) -> None:
        silent_ends = 0
        while (process := self._spawn()) is not None:
            had_pulse = self._watch(process)
            code = process.wait()
            silent_ends = 0 if had_pulse else silent_ends + 1
            if self._closing.is_set() or code == ENDED:
                return
            if code == REFUSED or silent_ends == MAX_SILENT_ENDS:
                self.failed = f"the agent of this node ended with exit code {code}. {self.log_path}:\n{self._excerpt()}"
                return
            log.error(
                "the agent of this node ended with exit code %d and is started again; see %s", code, self.log_path
            )
            self._closing.wait(RETRY_SECONDS)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        agent = [sys.executable, "-m", "nemo_dapo.rollout.agent", "--controller", ",".join(self.door.addresses)]
        agent += ["--pulse", "--folder", str(self.store.folder)]
        wrapper = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), str(GRACE_SECONDS)]
        command = [*wrapper, "", str(self.store.folder), "--", *agent]
        with self._spawning, self.log_path.open("ab") as log_file:
            if self._closing.is_set():
                return None
            self._log_start = log_file.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                bufsize=0,
                env={**os.environ, TOKEN_VARIABLE: self.door.token},
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone
            )
            return self._process

    def _watch(self, process: subprocess.Popen[bytes]) -> bool:
        """Until the agent ends, or is killed because it shows no pulse any more; whether it ever did."""
        assert process.stdout is not None
        limit, had_pulse = START_SECONDS, False
        with process.stdout as pulse:
            while True:
                readable, _, _ = select.select([pulse], [], [], limit)
                if not readable:
                    if not self._closing.is_set():
                        log.error("the agent of this node shows no sign of life for %.0f s; killing it", limit)
                    with self._spawning:
                        self._ask_to_end(kill=True)
                    return had_pulse
                if not os.read(pulse.fileno(), 4096):
                    return had_pulse
                limit, had_pulse = self.door.lease, True
                self.store.require_folder()

    def _ask_to_end(self, *, kill: bool) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or was asked before
            if kill:
                process.stdin.write(guardian.KILL)
            process.stdin.close()

    def _excerpt(self) -> str:
        return log_excerpt(self.log_path, self._log_start)


def keep_agent(door: Mapping[str, Any] | None, run_dir: Path, hosts: Sequence[str], stack: ExitStack) -> None:
    """Keep the agent of this rank's host until `stack` is left, where this rank is the first there; `hosts` are all ranks'.

    `door` is rank 0's `VLLMEngine.door`, None where the run has no servers.
    """
    rank = int(os.environ.get("RANK", "0"))
    host = hosts[rank]
    if door is None or hosts.index(host) != rank:
        return
    log_path = run_dir / "servers" / host / AGENT_LOG
    keeper = AgentKeeper(Door(**door), log_path)
    stack.callback(keeper.close, LEAVE_SECONDS)
    keeper.start()
