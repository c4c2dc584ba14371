"""`VLLMEngine`: the rollout engine that the trainer sees, over one or more vLLM servers.

A server that dies is no end of a run: it is started anew with the newest weights, which the weight store kept, and the
requests it had are sent again. A request that is cancelled closes its connection, upon which the server drops it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from torch import Tensor

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.hf_folder import expected_weights
from nemo_dapo.rollout import client, weight_sync
from nemo_dapo.rollout.servers import VLLMServers
from nemo_dapo.types import Prompt, Sample, SamplingParams

log = logging.getLogger(__name__)

INITIAL_VERSION = 0  # of the weights in the model's folder, until the first update
MAX_DEATHS = 3  # of one server in a row, without a sample in between
FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0
BYTES_PER_ELEMENT = {Precision.bf16: 2, Precision.fp32: 4}


class Slots:
    """Who has how many sequences in flight, within one event loop.

    `take` waits until some server has room for `n` more and picks the least loaded one; servers in `down`, which are
    being restarted, come last. A request larger than the limit runs alone.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, num_servers: int, limit: int) -> None:
        self.loop = loop
        self.limit = limit
        self.load = [0] * num_servers
        self.down: set[int] = set()
        self.repair = [asyncio.Lock() for _ in range(num_servers)]
        self.waiters: list[asyncio.Future[None]] = []

    async def take(self, n: int) -> int:
        while (index := self._pick(n)) is None:
            waiter = self.loop.create_future()
            self.waiters.append(waiter)
            try:
                await waiter
            finally:
                self.waiters.remove(waiter)
        self.load[index] += n
        return index

    def give(self, index: int, n: int) -> None:
        """Not a coroutine: a request that is being cancelled must give its slots back without waiting for anything."""
        self.load[index] -= n
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _pick(self, n: int) -> int | None:
        room = [i for i, load in enumerate(self.load) if load == 0 or load + n <= self.limit]
        return min(room, key=lambda i: (i in self.down, self.load[i]), default=None)


class VLLMEngine:
    """Implements `nemo_dapo.interfaces.RolloutEngine`; build it with `VLLMEngine.start` and close it.

    `generate` may be awaited many times at once, in one event loop at a time (a new one each step is fine).
    `update_weights`, `sleep` and `wake_up` are called between the loops.
    """

    def __init__(
        self,
        config: RolloutConfig,
        servers: VLLMServers,
        store: weight_sync.WeightStore,
        tokenizer: Any,
        stop_token_ids: list[int],
    ) -> None:
        self.config = config
        self.servers = servers
        self.store = store
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self.max_model_len = int(
            config.vllm.get("max_model_len") or config.max_prompt_length + config.max_response_length
        )
        self.restarts = 0
        self._version = INITIAL_VERSION
        self._asleep = False
        self._files: list[Path] | None = []  # of the newest weights; none before the first update, None if it failed
        self._reports_versions = True
        self._deaths = [0] * len(servers)
        self._repairing = [threading.Lock() for _ in range(len(servers))]
        self._slots: Slots | None = None

    @classmethod
    def start(
        cls,
        config: RolloutConfig,
        model_path: Path,
        precision: Precision,
        run_dir: Path,
        tokenizer: Any,
        seed: int,
    ) -> VLLMEngine:
        """Start the servers on the model folder `model_path` and wait until they can serve; logs go to
        `run_dir`/servers. Servers of one run differ in their seeds; resume with another `seed`, or the samples of the
        first steps come again. Raises ValueError for bad options, RuntimeError for a server that does not start.
        """
        stop_token_ids = client.stop_tokens(model_path, tokenizer)
        if not stop_token_ids:
            raise ValueError(f"{model_path} names no end-of-sequence token; set eos_token in its tokenizer or config")
        store = weight_sync.WeightStore(expected_weights(model_path), BYTES_PER_ELEMENT[precision])
        try:
            servers = VLLMServers(config, model_path, precision, run_dir, seed, scratch=str(store.folder))
            engine = cls(config, servers, store, tokenizer, stop_token_ids)
            servers.start()
        except BaseException:
            store.close()
            raise
        try:
            engine._each_server(engine._prepare)
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def version(self) -> int:
        """Version of the newest weights; 0, those of the model's folder, before the first update."""
        return self._version

    async def generate(self, prompt: Prompt, n: int, params: SamplingParams) -> list[Sample]:
        """`n` samples of one prompt from the least-loaded server.

        Raises ValueError for a prompt that cannot fit, TimeoutError after `rollout.request_timeout` seconds in a
        server, RuntimeError for an answer that cannot be used or a server that keeps dying.
        """
        needed = len(prompt.token_ids) + params.max_tokens
        if needed > self.max_model_len:
            raise ValueError(
                f"prompt {prompt.uid} has {len(prompt.token_ids)} tokens, with max_tokens={params.max_tokens} that is "
                f"{needed}, but the servers hold {self.max_model_len}: shorten it, or raise rollout.vllm.max_model_len"
            )
        slots = self._slots_of_this_loop()
        body = client.request_body(prompt, n, params, self.stop_token_ids)
        deadline = None
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            index = await slots.take(n)
            # The clock starts when there is room: a long queue of prompts is no fault of a server.
            deadline = deadline or time.monotonic() + self.config.request_timeout
            try:
                samples = await self._attempt(index, prompt, body, deadline)
            except client.ServerUnavailableError as problem:
                log.warning("prompt %s will be sent again: %s", prompt.uid, problem)
            else:
                self._deaths[index] = 0
                return samples
            finally:
                slots.give(index, n)
            await self._revive(slots, index)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give all servers the weights `(Hugging Face name, full tensor)` as `version`.

        Raises ValueError, before a server is touched, unless every parameter of the model comes exactly once;
        RuntimeError when a server fails, TimeoutError after `rollout.sync_timeout` seconds.
        """
        self._files = None  # those of the old version are about to go
        self._files = self.store.write(weights, version)
        self._version = version
        self._each_server(self._push_or_restart)

    def sleep(self) -> None:
        """Free the servers' GPU memory while the trainer works, where `rollout.vllm.enable_sleep_mode` is set."""
        if self.config.vllm.get("enable_sleep_mode") and not self._asleep:
            self._asleep = True
            self._each_server(lambda index: self._control(index, "/sleep", {"level": "1"}))

    def wake_up(self) -> None:
        """Undo `sleep`; nothing where the servers are awake."""
        if self._asleep:
            self._asleep = False
            self._each_server(lambda index: self._control(index, "/wake_up", {}))

    def close(self) -> None:
        """End the servers and remove the stored weights; safe to call twice."""
        self.servers.close()
        self.store.close()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _slots_of_this_loop(self) -> Slots:
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots.loop is not loop:
            self._slots = Slots(loop, len(self.servers), self.config.max_concurrent_sequences)
        return self._slots

    async def _attempt(self, index: int, prompt: Prompt, body: dict[str, Any], deadline: float) -> list[Sample]:
        """One try at one server, within the request's deadline."""
        remaining = max(deadline - time.monotonic(), 0.0)
        reader = client.Reader(self.tokenizer, None if self._reports_versions else self._version)
        url = self.servers.servers[index].url
        try:
            request = client.generate(url, self.servers.headers, prompt, body, reader, self.config.request_timeout)
            return await asyncio.wait_for(request, remaining)
        except asyncio.TimeoutError as late:
            raise TimeoutError(
                f"no samples of prompt {prompt.uid} within rollout.request_timeout={self.config.request_timeout:.0f} s "
                f"(last tried server {index}, log {self.servers.servers[index].log_path}); raise it, or look at the log"
            ) from late

    async def _revive(self, slots: Slots, index: int) -> None:
        """Restart server `index` if it is dead; whoever comes second waits for the first."""
        async with slots.repair[index]:
            if self.servers.alive(index):
                return
            slots.down.add(index)
            try:
                await asyncio.to_thread(self._restart, index)
            finally:
                slots.down.discard(index)

    def _restart(self, index: int) -> None:
        """Start a dead server anew with the newest weights; RuntimeError when it keeps dying."""
        with self._repairing[index]:
            if self.servers.alive(index):
                return
            self._deaths[index] += 1
            if self._deaths[index] > MAX_DEATHS:
                raise RuntimeError(f"it died {self._deaths[index]} times in a row: {self.servers.describe_exit(index)}")
            if self._files is None:
                raise RuntimeError(f"the last update failed, so it has no weights: {self.servers.describe_exit(index)}")
            log.error("restarting it: %s", self.servers.describe_exit(index))
            self.servers.restart(index)
            self.restarts += 1
            self._prepare(index)
            if self._files:
                self._push(index)

    def _prepare(self, index: int) -> None:
        """What a fresh server needs once: the transfer engine and the version of the weights it started with."""
        deadline = time.monotonic() + self.config.sync_timeout
        with self.servers.http(index, self.config.sync_timeout) as http:
            weight_sync.call(http, "POST", "/init_weight_transfer_engine", deadline, json={"init_info": {}})
            self._reports_versions = weight_sync.reports_versions(http, deadline)
            weight_sync.set_version(http, INITIAL_VERSION, deadline)

    def _push(self, index: int) -> None:
        deadline = time.monotonic() + self.config.sync_timeout
        with self.servers.http(index, self.config.sync_timeout) as http:
            weight_sync.push_weights(http, self._files or [], self._version, deadline)

    def _push_or_restart(self, index: int) -> None:
        """Update one server; one that is dead, or dies of it, is restarted once, with the same weights."""
        if not self._reached(index, "take the weights", lambda: self._push(index)):
            self._restart(index)

    def _reached(self, index: int, purpose: str, action: Callable[[], None]) -> bool:
        """Run `action` on server `index`; False when the server is dead or dies of it.

        Raises TimeoutError when it is late, RuntimeError when it lives and breaks the connection.
        """
        try:
            if self.servers.alive(index):
                action()
                return True
        except httpx.TimeoutException as late:
            raise TimeoutError(
                f"vLLM server {index} did not {purpose} within rollout.sync_timeout={self.config.sync_timeout:.0f} s; "
                f"raise it, or see {self.servers.servers[index].log_path}"
            ) from late
        except httpx.TransportError as problem:
            if not self._ends_soon(index):
                raise RuntimeError(f"vLLM server {index} broke the connection; it was to {purpose}") from problem
        return False

    def _ends_soon(self, index: int) -> bool:
        """Whether the server's process ends within a few seconds: its connections break before it is seen dead."""
        deadline = time.monotonic() + 5.0
        while self.servers.alive(index) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.servers.alive(index)

    def _control(self, index: int, route: str, params: dict[str, str]) -> None:
        """One call of a control route. A dead server is passed over: the next weight update starts it anew, awake."""
        deadline = time.monotonic() + self.config.sync_timeout

        def ask() -> None:
            with self.servers.http(index, self.config.sync_timeout) as http:
                weight_sync.call(http, "POST", route, deadline, params=params)

        self._reached(index, f"answer {route}", ask)

    def _each_server(self, action: Callable[[int], None]) -> None:
        """Run `action(index)` for all servers at once; the first error is raised after all have ended."""
        with ThreadPoolExecutor(max_workers=len(self.servers)) as pool:
            for done in [pool.submit(action, index) for index in range(len(self.servers))]:
                done.result()
