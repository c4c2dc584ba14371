"""The agent of this node, kept: started again when its lease is lost, and ended with this process.

    python -m nemo_dapo.rollout.keeper --run-file runs/x/rollout.json

On nodes that only serve this is what a user, or a second `srun` step, starts; where trainer and servers share nodes the run
does it itself. The agent runs below a guardian (`guardian.py`), as its servers do below theirs, so that neither it nor they
outlive this process. It shows a pulse on its standard output: one that is stopped, or hangs, is killed and started anew.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_dapo.rollout import guardian
from nemo_dapo.rollout.agent import CONNECT_SECONDS, ENDED, LOST, REFUSED
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.run_file import TOKEN_VARIABLE, Door, read_run_file
from nemo_dapo.rollout.servers import END_GRACE_SECONDS, log_excerpt
from nemo_dapo.rollout.weights.store import WeightStore

log = logging.getLogger(__name__)

GRACE_SECONDS = 2 * END_GRACE_SECONDS + 5.0  # what the agent may need to end its servers
START_SECONDS = 120.0  # to the first pulse: imports from a network file system
RETRY_SECONDS = 2.0
SECONDS_BETWEEN_WORDS = 15.0
LEAVE_SECONDS = 15.0  # for rank 0 to tell the agents of its end before their own ranks do
AGENT_LOG = "agent.log"
MAX_SILENT_ENDS = 3  # in a row, of an agent that never showed a pulse

Find = Callable[[threading.Event], Door | None]


class AgentKeeper:
    """Keeps one agent that serves the hub behind `door`; `start` returns at once, `close` when it has ended.

    The weights' folder is the keeper's: the next agent finds in it what the one before it was given. Before an agent is
    started again, `find` says where the run's hub is now: behind another door is another run, which the next keeper serves.
    """

    def __init__(self, door: Door, log_path: Path, find: Find | None = None) -> None:
        self.door, self.log_path = door, log_path
        self.find = find or (lambda _: door)
        self.store = WeightStore(door.weight_bytes, node_name())
        self.failed = ""  # why it is not started any more
        self.code = LOST  # the agent's last
        self.next_door: Door | None = None  # where `find` has found another
        self._closing = threading.Event()
        self._spawning = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._thread = threading.Thread(target=self._keep, name="agent", daemon=True)

    def start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no agent is started any more: the run has ended, refuses it for good, or is another."""
        self._thread.join()

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
            log.error(
                "the guardian of the agent of node %s (pid %d) did not end within %.0f s; killing it",
                *(self.store.node, self._process.pid, GRACE_SECONDS + END_GRACE_SECONDS),
            )
            self._process.kill()
        self.store.close()

    def _keep(self) -> None:
        silent_ends = 0
        while (process := self._spawn()) is not None:
            had_pulse = self._watch(process)
            self.code = process.wait()
            silent_ends = 0 if had_pulse else silent_ends + 1
            if self.code == ENDED or self._closing.wait(RETRY_SECONDS):
                return
            found = self.find(self._closing)
            if found != self.door:
                self.next_door = found
                return
            how = f"the agent of node {self.store.node} ended with exit code {self.code}"
            if self.code == REFUSED or silent_ends == MAX_SILENT_ENDS:
                self.failed = f"{how}. {self.log_path}:\n{self._excerpt()}"
                return
            log.error("%s and is started again; see %s", how, self.log_path)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        agent = [sys.executable, "-m", "nemo_dapo.rollout.agent", "--controller", ",".join(self.door.addresses)]
        agent += ["--folder", str(self.store.folder)]
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
                        log.error(
                            "the agent of node %s shows no sign of life for %.0f s; killing it", self.store.node, limit
                        )
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


# -------------------------------------------------------------------- on a node that only serves


def keep(run_file: Path, patience: float) -> int:
    """Keep an agent for the run of `run_file`, and for the one that takes its place; returns the exit code.

    The run may start later, and may go away for `patience` seconds.
    """
    log_path = run_file.parent / "servers" / node_name() / AGENT_LOG
    find = functools.partial(find_hub, run_file, patience)
    door, code = find(threading.Event()), LOST
    while door is not None:
        with contextlib.closing(AgentKeeper(door, log_path, find)) as keeper:
            keeper.start()
            keeper.wait()
        if keeper.failed:
            log.error("%s", keeper.failed)
        door, code = keeper.next_door, keeper.code
    return code if code in (ENDED, REFUSED) else LOST


def find_hub(run_file: Path, patience: float, closing: threading.Event) -> Door | None:
    """What `run_file` says once the hub that it names listens; None, aloud, after `patience` seconds or at the end."""
    started = said = time.monotonic()
    while not closing.is_set():
        try:
            door = read_run_file(run_file)
            require_listener(door.addresses)
            return door
        except (OSError, ValueError) as problem:
            now, trouble = time.monotonic(), f"{type(problem).__name__}: {problem}"
        if now - started > patience:
            log.error("no run was found in %.0f s; is rank 0 running? The last attempt: %s", patience, trouble)
            return None
        if now - said > SECONDS_BETWEEN_WORDS:
            said = now
            log.info("looking for the hub for %.0f s; the last attempt: %s", now - started, trouble)
        closing.wait(RETRY_SECONDS)
    return None


def require_listener(addresses: Sequence[str]) -> None:
    """Raise OSError unless somebody listens at one of `addresses`."""
    trouble = OSError("it names no address")
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            return
        except OSError as problem:
            trouble = OSError(f"{address}: {problem}")
    raise trouble


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_dapo.rollout.keeper",
        description="Serves a run from this node, as long as that runs. Ends with 0 when it has ended, 2 when it refuses.",
    )
    parser.add_argument(
        "--run-file", type=Path, required=True, help="rollout.json in the run's folder, which rank 0 writes"
    )
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds to look for the run, each time")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {node_name()}: %(message)s", stream=sys.stderr)
    for asked in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(asked) is not signal.SIG_IGN:  # as examples/slurm/server.sh has the first one
            signal.signal(asked, lambda *_: sys.exit(ENDED))
    return keep(options.run_file, options.patience)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
