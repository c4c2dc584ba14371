"""A hub in this process and agents as processes of their own, on one machine under names of their own: for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.hf_folder import fingerprint
from nemo_dapo.rollout.agreement import Terms
from nemo_dapo.rollout.hub import Hub, Node
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.messages import Plan, options_said
from nemo_dapo.rollout.nodes import ServingNodes, Weights
from nemo_dapo.rollout.run_file import TOKEN_VARIABLE, Door, write_run_file
from nemo_dapo.rollout.weights.store import WeightStore
from tests.stand_in_vllm import ROOT, interpreter

TOKEN = "t0ken"
LEASE = 3.0  # the shortest silence that a busy machine does not make by itself


def model_folder(folder: Path, weights: bytes = b"weights") -> Path:
    """As much of a model as an agent looks at."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").write_bytes(weights)
    return folder


class Nodes:
    """A hub with `slots` places and the agents, or their keepers, that a test starts; all are ended with it."""

    def __init__(
        self, folder: Path, slots: int = 1, *, servers: int = 1, lease: float = LEASE, probe: str = ""
    ) -> None:
        self.folder, self.model = folder, model_folder(folder / "model")
        self.rollout = RolloutConfig(
            python=interpreter(folder / "interpreter", probe), num_servers=servers, lease_seconds=lease
        )
        self.agents: list[subprocess.Popen[str]] = []
        self.store = WeightStore(8, "here")  # of the agents that have no keeper
        self.loop = LoopThread("hub")
        self.open(slots, TOKEN)

    def open(self, slots: int, token: str) -> None:
        terms = Terms(str(self.model), fingerprint(self.model))
        self.hub = Hub(terms, slots, self.plan, token=token, lease=self.rollout.lease_seconds)
        self.do(self.hub.open("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.hub.port}"
        door = Door([self.address], token, self.rollout.lease_seconds, 8)
        self.run_file = write_run_file(self.folder, door)

    def kill_hub(self) -> None:
        """As the death of rank 0 does: the connections break, and nobody is told to stop."""
        assert self.hub._runner is not None
        self.do(self.hub._runner.cleanup())

    def plan(self, slot: int, node: str) -> Plan:
        servers = self.rollout.num_servers
        return Plan(
            slot=slot,
            first=slot * servers,
            total=len(self.hub.nodes) * servers,
            rollout=options_said(self.rollout),
            model_path=str(self.model),
            precision="fp32",
            seed=7,
            api_key="k",
            log_dir=str(self.folder / "servers" / node),
            run_file=str(self.run_file),
            spans_hosts=False,
        )

    def set_terms(self, **changes: Any) -> None:
        self.hub.terms = replace(self.hub.terms, **changes)

    def do(self, work: Any, seconds: float = 60.0) -> Any:
        return self.loop.submit(work).result(seconds)

    def agent(self, name: str, address: str = "", token: str = TOKEN) -> subprocess.Popen[str]:
        where = ["--controller", address or self.address, "--folder", str(self.store.folder)]
        self.agents.append(started(name, "agent", *where, token=token))
        return self.agents[-1]

    def keeper(self, name: str, *options: str) -> subprocess.Popen[str]:
        self.agents.append(start_keeper(name, self.run_file, *options))
        return self.agents[-1]

    def ready(self, slot: int = 0, seconds: float = 60.0) -> Node:
        """The node in `slot` once it is there, its servers started."""
        node = self.do(self.hub.node_at(slot), seconds)
        self.do(node.call("start"), seconds)
        return node

    def close(self) -> None:
        self.do(self.hub.close())
        self.loop.close()
        for agent in self.agents:
            agent.kill()
            agent.wait()
        self.store.close()


def start_keeper(name: str, run_file: Path, *options: str) -> subprocess.Popen[str]:
    """What a user starts on a node that only serves; it believes its host to be called `name`."""
    return started(name, "keeper", "--run-file", str(run_file), *options)


def started(name: str, module: str, *options: str, token: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"nemo_dapo.rollout.{module}", *options],
        cwd=ROOT,
        env={**os.environ, "SLURMD_NODENAME": name, TOKEN_VARIABLE: token, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,  # an agent's pulse
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def agent_of(keeper: subprocess.Popen[str]) -> psutil.Process:
    """The agent that a keeper has at this moment, below its guardian."""
    (guardian,) = psutil.Process(keeper.pid).children()
    (agent,) = guardian.children()
    return agent


def family(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The agent and all below it."""
    parent = psutil.Process(agent.pid)
    return [parent, *parent.children(recursive=True)]


def end_of(agent: subprocess.Popen[str], seconds: float = 60.0) -> tuple[int, str]:
    """(exit code, what it said)."""
    _, said = agent.communicate(timeout=seconds)
    return agent.returncode, said


class Link:
    """Carries bytes between an agent and the hub until it is cut: then neither hears of the other, nor of the cut."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.is_whole = threading.Event()
        self.is_whole.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self.listener.accept()
            except OSError:  # closed
                return
            other = socket.create_connection(self.target)
            for source, sink in ((one, other), (other, one)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        while data := _received(source):
            self.is_whole.wait()
            sink.sendall(data)
        with contextlib.suppress(OSError):  # the other way has seen to it
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


def serving(folder: Path, **options: object) -> ServingNodes:
    """Rank 0's side of a run in `folder` whose servers are stand-ins; the caller closes it."""
    python = interpreter(folder / "interpreter", str(options.pop("probe", "")))
    config = RolloutConfig(python=python, **{"lease_seconds": LEASE, **options})  # type: ignore[arg-type]
    model = folder / "model"
    if not model.exists():
        model_folder(model)
    return ServingNodes(config, model, Precision.fp32, folder / "run", 0, Weights(1 << 20, TOKEN))
