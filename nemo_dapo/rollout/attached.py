"""Servers that the user started and looks after: asked and given weights like others, never started, restarted or ended.

They run on rank 0's host, whose memory the weights go through, with our plugin and the run's key:

    VLLM_SERVER_DEV_MODE=1 VLLM_PLUGINS=nemo_dapo VLLM_API_KEY=… python -m vllm.entrypoints.openai.api_server --model …
      --seed … --tokens-only --logprobs-mode processed_logprobs --scheduling-policy priority
      --weight-transfer-config '{"backend": "nemo_dapo"}' --middleware nemo_dapo.rollout.vllm_plugin.RequireKey
"""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.parse
from dataclasses import dataclass

from nemo_dapo.config import RolloutConfig
from nemo_dapo.rollout.command import choose_key
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.servers import SECONDS_BETWEEN_WORDS, ServersClosedError, is_healthy, of_start_timeout
from nemo_dapo.rollout.weights.plan import Place
from nemo_dapo.rollout.weights.store import WeightStore

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class AttachedServer:
    index: int
    url: str
    node: str
    pid: int = 0  # not ours to know


class AttachedServers:
    """What the engine needs of its servers; a `restart` waits until whoever looks after the server has seen to it."""

    def __init__(self, config: RolloutConfig, weight_bytes: int) -> None:
        self.config = config
        self.api_key = choose_key(config)
        self.store = WeightStore(weight_bytes, node_name())
        self.servers = [AttachedServer(i, url.rstrip("/"), self.store.node) for i, url in enumerate(config.servers)]
        self.closing = threading.Event()

    def __len__(self) -> int:
        return len(self.servers)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    def places(self) -> list[Place]:
        self.store.require_folder()
        return [self.store.place()]

    def start(self) -> None:
        """Wait until all are healthy; raises TimeoutError after `rollout.start_timeout` seconds."""
        deadline = time.monotonic() + self.config.start_timeout
        for server in self.servers:
            self._wait_healthy(server, deadline)

    def _wait_healthy(self, server: AttachedServer, deadline: float) -> None:
        began = said = time.monotonic()
        port = urllib.parse.urlsplit(server.url).port or 0
        while not asyncio.run(is_healthy(server.url, self.api_key, port)):
            if self.closing.wait(LOOK_SECONDS):
                raise ServersClosedError(f"{self.describe(server.index)} was not ready yet when the run ended")
            if (now := time.monotonic()) > deadline:
                raise TimeoutError(
                    f"{self.describe(server.index)} did not become healthy within rollout.start_timeout="
                    f"{self.config.start_timeout:.0f} s: start it with this run's key and our middleware (docs/slurm.md), "
                    "or leave it out of rollout.servers"
                )
            if now - said > SECONDS_BETWEEN_WORDS:
                said = now
                waited = of_start_timeout(now - began, self.config)
                print(f"{self.describe(server.index)}: not healthy yet, waited for {waited}", flush=True)

    def alive(self, index: int) -> bool:
        """As far as is known: requests that fail show the rest."""
        return True

    def is_away(self, index: int) -> bool:
        return False

    async def node_back(self, index: int) -> None:
        return

    def describe(self, index: int) -> str:
        return f"vLLM server {index} ({self.servers[index].url}, attached)"

    def describe_exit(self, index: int) -> str:
        return f"{self.describe(index)} does not answer"

    def restart(self, index: int) -> None:
        """Wait until the server is healthy again; raises TimeoutError where it does not become so."""
        self._wait_healthy(self.servers[index], time.monotonic() + self.config.start_timeout)

    def end(self, index: int) -> None:
        """Not ours to end."""

    def close(self) -> None:
        self.closing.set()
        self.store.close()
