"""Supervisor of the vLLM server processes of one run: start, watch, restart, end.

Each server (`command.py`) runs below a guardian (`guardian.py`) that outlives neither the server nor this process, so that
a trainer killed by SIGKILL leaves no server, engine or worker process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.processes import kill_session
from nemo_dapo.rollout import control, guardian
from nemo_dapo.rollout.challenge import NONCE_PARAMETER, proof
from nemo_dapo.rollout.command import choose_key, choose_ports, connect_host, server_command
from nemo_dapo.rollout.environment import server_environment

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for every request

END_GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
LOG_TAIL_LINES = 30
HEALTH_SECONDS = 5.0
SECONDS_BETWEEN_WORDS = 15.0


def log_excerpt(path: Path, start: int) -> str:
    """The first error lines and the last lines of a log from byte `start` on: vLLM's root cause is rarely its last."""
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    # vLLM warns of an exception of its chat warm-up at every start with token ids alone: warnings are no causes.
    causes = [line for line in lines if re.search(r"\b\w*(Error|Exception): ", line) and " WARNING " not in line][:3]
    tail = lines[-LOG_TAIL_LINES:]
    earlier = [line for line in causes if line not in tail]
    return "\n".join(earlier + (["…"] if earlier else []) + tail)


class ServersClosedError(RuntimeError):
    """The run ends: no server is started any more."""


@dataclass
class Server:
    """One server: its address, its guardian process and where its log of this start begins."""

    index: int
    port: int
    url: str
    log_path: Path
    seed: int
    process: subprocess.Popen[bytes] | None = None
    log_start: int = 0
    is_ready: bool = False  # has answered since it was started

    @property
    def session_path(self) -> Path:
        return self.log_path.with_suffix(".session")

    def exit_code(self) -> int | None:
        """Exit code of the server, None while it runs (or before it was started)."""
        return self.process.poll() if self.process else None

    def describe_exit(self) -> str:
        code = self.exit_code()
        how = f"was killed by signal {code - 128}" if code and code > 128 else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"ended with its guardian, which was killed by signal {-code}"
        return f"vLLM server {self.index} {how}. {self.log_path}:\n{log_excerpt(self.log_path, self.log_start)}"


@dataclass(frozen=True)
class Share:
    """Which of the fleet's servers these are, and what else their node decides."""

    seed: int = 0  # of the fleet's first server
    first: int = 0  # index in the fleet of the first of these
    total: int = 0  # servers in the fleet; 0 = these are all
    api_key: str = ""  # "" = by the configuration
    address: str = ""  # of this host for others; "" = nobody else asks
    scratch: str = ""  # folder for sockets and the like, which disappears with this process however that ends
    on_cpu: bool = True


class VLLMServers:
    """The servers of one node. `start` returns when all are healthy; `close` leaves no process behind.

    An `index` is that of a server in the whole fleet.
    """

    def __init__(
        self, config: RolloutConfig, model_path: Path, precision: Precision, log_dir: Path, share: Share
    ) -> None:
        if config.visible_devices and len(config.visible_devices) != config.num_servers:
            raise ValueError(
                f"rollout.visible_devices has {len(config.visible_devices)} entries, rollout.num_servers is "
                f"{config.num_servers}; give one entry a server, or none"
            )
        self.config = config
        self.model_path = model_path
        self.precision = precision
        self.share = share
        self.api_key = share.api_key or choose_key(config)
        self.closing = threading.Event()
        self._spawning = threading.Lock()
        log_dir.mkdir(parents=True, exist_ok=True)
        for session in sorted(log_dir.glob("server_*.session")):  # of an earlier run in this folder, which is dead
            if left := kill_session(str(session)):
                log.warning("ended processes %s, which a killed run had left (%s)", left, session)
        ports = choose_ports(config.host, config.port, config.num_servers)
        # Unseeded sampling draws from the process's generator: two servers with one seed give the same samples.
        host = connect_host(config.host, share.address)
        self.servers = [
            Server(i, p, f"http://{host}:{p}", log_dir / f"server_{i}.log", share.seed + i)
            for i, p in enumerate(ports, start=share.first)
        ]

    def __len__(self) -> int:
        return len(self.servers)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    def start(self) -> None:
        """Start every server and wait until all are healthy.

        Raises RuntimeError when one ends at start or another thread calls `close`, TimeoutError after
        `rollout.start_timeout` seconds; either way all of them are ended first.
        """
        try:
            for server in self.servers:
                self._spawn(server)
            deadline = time.monotonic() + self.config.start_timeout
            for server in self.servers:
                self._wait_healthy(server, deadline)
        except BaseException:
            self.close()
            raise

    def _server(self, index: int) -> Server:
        return self.servers[index - self.share.first]

    def alive(self, index: int) -> bool:
        server = self._server(index)
        return server.process is not None and server.exit_code() is None

    def describe(self, index: int) -> str:
        """What a message says of a server that may live: number, process and log."""
        server = self._server(index)
        return f"vLLM server {index} (pid {server.process.pid if server.process else '-'}, {server.log_path})"

    def describe_exit(self, index: int) -> str:
        return self._server(index).describe_exit()

    def restart(self, index: int) -> None:
        """Kill server `index` if it still runs, start it anew on its port and wait until it is healthy.

        The new one gets a new seed: with the old one it would draw the same samples once more.
        """
        server = self._server(index)
        self._end(server, kill=True)
        server.seed += self.share.total or len(self.servers)
        self._spawn(server)
        self._wait_healthy(server, time.monotonic() + self.config.start_timeout)

    def end(self, index: int) -> None:
        """Kill server `index`; `restart` brings it back."""
        self._end(self._server(index), kill=True)

    def close(self, *, kill: bool = False) -> None:
        """End all servers, in parallel, at once where they are still starting or `kill` says so; safe to call twice, and
        from any thread."""
        self.closing.set()
        with self._spawning:  # whoever was about to start one has done so, or will not
            started = [server for server in self.servers if server.process]
        for server in started:
            self._ask_to_end(server, kill=kill or not server.is_ready)
        for server in started:
            self._end(server, kill=kill or not server.is_ready)

    def _spawn(self, server: Server) -> None:
        config = self.config
        share = self.share
        command = server_command(config, self.model_path, self.precision, server.port, server.seed, on_cpu=share.on_cpu)
        wrapper = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), str(END_GRACE_SECONDS)]
        wrapper += [str(server.session_path), share.scratch]
        with self._spawning, server.log_path.open("ab") as log_file:
            if self.closing.is_set():
                raise ServersClosedError(f"vLLM server {server.index} is not started: the run ends")
            server.log_start, server.is_ready = log_file.tell(), False
            server.process = subprocess.Popen(
                [*wrapper, "--", *command],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=server_environment(
                    config, self.precision, server.index, self.api_key, os.environ, share.scratch, on_cpu=share.on_cpu
                ),
                start_new_session=True,  # Ctrl-C in the terminal reaches the trainer alone, which then ends the servers
            )

    def _wait_healthy(self, server: Server, deadline: float) -> None:
        started = said = time.monotonic()
        while (now := time.monotonic()) < deadline:
            if self.closing.is_set():
                raise ServersClosedError(f"vLLM server {server.index} was not ready yet when the run ended")
            if server.exit_code() is not None:
                raise RuntimeError(f"{server.describe_exit()}\n{remedy(server)}")
            if asyncio.run(is_healthy(server.url, self.api_key, server.port)):
                server.is_ready = True
                log.info("vLLM server %d is ready at %s", server.index, server.url)
                return
            if now - said > SECONDS_BETWEEN_WORDS:
                said = now
                waited = of_start_timeout(now - started, self.config)
                print(f"vLLM server {server.index}: starting for {waited}, {server.log_path}", flush=True)
            self.closing.wait(0.2)
        raise TimeoutError(
            f"vLLM server {server.index} was not healthy after {time.monotonic() - started:.0f} s; expected within "
            f"rollout.start_timeout={self.config.start_timeout:.0f} s: raise it, or see {server.log_path}:\n"
            f"{log_excerpt(server.log_path, server.log_start)}"
        )

    def _ask_to_end(self, server: Server, *, kill: bool) -> None:
        """Close the pipe, which makes the guardian end the server, or kill it where that is said before."""
        assert server.process is not None
        assert server.process.stdin is not None
        # It has ended, or another thread closed the pipe.
        with contextlib.suppress(BrokenPipeError, ValueError):
            if kill:
                server.process.stdin.write(guardian.KILL)
            server.process.stdin.close()

    def _end(self, server: Server, *, kill: bool) -> None:
        """End the server by its guardian; kill the guardian only when it does not."""
        process = server.process
        if process is None:
            return
        self._ask_to_end(server, kill=kill)
        try:
            process.wait(timeout=2 * END_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            log.error(
                "the guardian of vLLM server %d (pid %d) did not end within %.0f s; killing it",
                *(server.index, process.pid, 2 * END_GRACE_SECONDS),
            )
            process.kill()
            process.wait()
        kill_session(str(server.session_path))  # a guardian that was killed leaves the process with the model


def of_start_timeout(seconds: float, config: RolloutConfig) -> str:
    """How long servers have been waited for, and of what."""
    return f"{seconds:.0f} s of rollout.start_timeout={config.start_timeout:.0f} s"


async def is_healthy(url: str, key: str, port: int) -> bool:
    """Whether our server answers /health with 200; a refused or failed connection is a no.

    The key itself is not sent: whoever took the port before our server would get it. Ours answers a challenge. Raises
    RuntimeError for another's 200.
    """
    nonce = secrets.token_hex(16)
    try:
        async with control.client(url) as http:
            reply = await control.ask(
                http, "GET", "/health", time.monotonic() + HEALTH_SECONDS, params={NONCE_PARAMETER: nonce}
            )
    except (httpx.HTTPError, RuntimeError, TimeoutError):
        return False
    if reply.status == 200 and not secrets.compare_digest(reply.body, proof(key, nonce, port)):
        raise RuntimeError(
            f"what answers at {url} is not our server: another program took the port (free it, or set rollout.port=0 for "
            "any free one), or the environment of rollout.python holds another version of this package (`pip install "
            "--no-deps` it there again)"
        )
    return reply.status == 200


def remedy(server: Server) -> str:
    """What a user can do about a server that ended at start, judged by its log."""
    text = log_excerpt(server.log_path, server.log_start)
    if "No module named 'vllm'" in text or "No module named vllm" in text:
        return "remedy: install vLLM, or name the interpreter of its environment in rollout.python"
    if "nemo_dapo" in text and ("No module named 'nemo_dapo'" in text or "Invalid weight transfer backend" in text):
        return "remedy: `pip install --no-deps` this package into the environment of rollout.python as well"
    if "address already in use" in text.lower():
        return "remedy: free the port, or set rollout.port=0"
    return "remedy: the log above names the cause; options of vLLM are set under rollout.vllm"
