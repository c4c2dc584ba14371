"""`VLLMEngine`: the rollout engine that the trainer sees, over one or more vLLM servers.

Each of a group's samples is a request of its own, sent to the same server for its prefix cache; one that fails is asked for
again alone, elsewhere where there is an elsewhere. A server that is sick is no end of a run: it is started anew with the
newest weights, which the weight store kept (`fleet`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import httpx
import torch
from torch import Tensor

from nemo_dapo.config import PartialAnswers, Precision, RolloutConfig
from nemo_dapo.hf_folder import expected_weights
from nemo_dapo.rollout import admission, answers, client, control, weight_sync, wire
from nemo_dapo.rollout.admission import Reading
from nemo_dapo.rollout.answers import UnusableAnswerError
from nemo_dapo.rollout.client import ServerUnavailableError
from nemo_dapo.rollout.fleet import Fleet, HopelessError, LostServerError, Member
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.progress import Counts, Progress
from nemo_dapo.rollout.servers import ServersClosedError, Share, VLLMServers
from nemo_dapo.tasks import all_or_none
from nemo_dapo.types import Prompt, Sample, SamplingParams

log = logging.getLogger(__name__)

T = TypeVar("T")
INITIAL_VERSION = 0  # of the weights in the model's folder, until the first update
MAX_TRIES = 8  # of one sample that servers answer with something unusable
MAX_LATE = 2  # times that one sample may be late
MAX_LOST = 4  # times that one sample's server may be lost under it: its prompt may be the cause
FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0
STARTS_AT_ONCE = 8  # groups or samples, in one turn of the event loop
METRICS_SECONDS = 4.0  # for a server to answer /metrics; one that does not has made no progress that we know of
STARTING, ASLEEP = "start", "sleep"  # why servers may be silent or gone for a while
BYTES_PER_ELEMENT = {Precision.bf16: 2, Precision.fp32: 4}

ServerCall = Callable[[httpx.AsyncClient, float], Awaitable[Any]]


@dataclass(frozen=True)
class Asked:
    """What was asked for; `body` is the request for one whole sample of it."""

    prompt: Prompt
    params: SamplingParams
    priority: int | None
    body: bytes


class LateError(Exception):
    """A sample took longer than rollout.request_timeout."""


class VLLMEngine:
    """Implements `nemo_dapo.interfaces.RolloutEngine`; build it with `VLLMEngine.start` and close it.

    `generate` may be awaited many times at once, from any event loop: requests live in a loop of the engine's own.
    `update_weights`, `sleep` and `wake_up` block.
    """

    def __init__(
        self,
        config: RolloutConfig,
        servers: VLLMServers,
        store: weight_sync.WeightStore,
        stop_token_ids: list[int],
        vocab_size: int = 0,
    ) -> None:
        self.config = config
        self.servers = servers
        self.store = store
        self.stop_token_ids = stop_token_ids
        self.vocab_size = vocab_size
        self.max_model_len = int(
            config.vllm.get("max_model_len") or config.max_prompt_length + config.max_response_length
        )
        self.restarts = 0
        self._partial = Counts()
        self._told: dict[str, int] = {}  # of the totals, what `metrics` has told
        self._version = INITIAL_VERSION
        self._asleep = False
        self._files: list[Path] | None = []  # of the newest weights; none before the first update, None if it failed
        self._asked = [client.Server(server.url) for server in servers.servers]
        self._unwell: dict[
            int, str
        ] = {}  # servers that failed at falling asleep or waking up: the next update restarts them
        self._weights = threading.Lock()  # held while the files or what they are change
        self._has_newest = [True] * len(servers)  # False while a restarted server has yet to be given the files
        self._paused: list[str] = []  # while it holds something, servers generate nothing by our own doing
        self._submissions = itertools.count()
        self._by_priority = config.vllm.get("scheduling_policy", "priority") == "priority"
        self._loop = LoopThread("rollout")
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)
        self._fleet, self._http = self._loop.submit(self._open()).result()

    async def _open(self) -> tuple[Fleet, aiohttp.ClientSession]:
        client.allow_open_files(len(self.servers) * self.config.max_concurrent_sequences)
        fleet = Fleet(
            len(self.servers),
            self.config.max_concurrent_sequences,
            cache_target=self.config.kv_cache_target,
            ended=lambda index: None if self.servers.alive(index) else self.servers.describe_exit(index),
            restart=self._restart,
            describe=self.servers.describe,
        )
        watching = fleet.watch(self._look, self.config.progress_timeout, self._paused)
        self._watch = asyncio.ensure_future(watching)
        return fleet, client.session(self.servers.headers)

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
        engine = cls.prepare(config, model_path, precision, run_dir, tokenizer, seed)
        try:
            engine.start_servers()
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def prepare(
        cls,
        config: RolloutConfig,
        model_path: Path,
        precision: Precision,
        run_dir: Path,
        tokenizer: Any,
        seed: int,
    ) -> VLLMEngine:
        """As `start`, without starting the servers yet: what is made here can be closed while they start."""
        stop_token_ids = client.stop_tokens(model_path, tokenizer)
        if not stop_token_ids:
            raise ValueError(f"{model_path} names no end-of-sequence token; set eos_token in its tokenizer or config")
        model = json.loads((model_path / "config.json").read_text())
        vocab_size = int(model.get("vocab_size") or model.get("text_config", {}).get("vocab_size") or 0)
        store = weight_sync.WeightStore(expected_weights(model_path), BYTES_PER_ELEMENT[precision])
        try:
            share = Share(seed, scratch=str(store.folder), on_cpu=not torch.cuda.is_available())
            servers = VLLMServers(config, model_path, precision, run_dir / "servers", share)
            engine = cls(config, servers, store, stop_token_ids, vocab_size)
            engine._paused.append(STARTING)
            return engine
        except BaseException:
            store.close()
            raise

    def start_servers(self) -> None:
        """Start every server and agree with it on routes and versions; `close` from another thread ends the wait."""
        self.servers.start()
        with ThreadPoolExecutor(max_workers=len(self.servers)) as pool:
            for done in [pool.submit(self._prepare, index) for index in range(len(self.servers))]:
                done.result()
        self._paused.remove(STARTING)

    @property
    def version(self) -> int:
        """Version of the newest weights; 0, those of the model's folder, before the first update."""
        return self._version

    # ---------------------------------------------------------------- samples

    async def generate(self, prompt: Prompt, n: int, params: SamplingParams) -> list[Sample]:
        """`n` samples of one prompt, from one server where it serves them all.

        Raises ValueError for a prompt that cannot fit, RuntimeError for a request that is refused, for answers that stay
        unusable or servers that stay sick, TimeoutError for a sample that is late again and again.
        """
        needed = len(prompt.token_ids) + params.max_tokens
        if needed > self.max_model_len:
            raise ValueError(
                f"prompt {prompt.uid} has {len(prompt.token_ids)} tokens, with max_tokens={params.max_tokens} that is "
                f"{needed}, but the servers hold {self.max_model_len}: shorten it, or raise rollout.vllm.max_model_len"
            )
        # Earlier groups first: a server short of memory preempts the newest.
        priority = next(self._submissions) if self._by_priority else None
        asked = Asked(prompt, params, priority, client.request_body(prompt, params, self.stop_token_ids, priority))
        return await asyncio.wrap_future(self._loop.submit(self._group(asked, n)))

    async def _group(self, asked: Asked, n: int) -> list[Sample]:
        await self._turn()
        member = await self._fleet.take(n)
        return await all_or_none([self._sample(asked, member) for _ in range(n)])

    async def _sample(self, asked: Asked, member: Member) -> Sample:
        """One sample, by as many tries as it takes within their bounds; one place on `member` is already taken."""
        prompt, progress = asked.prompt, self._no_progress(asked)
        tries = late = lost = 0
        for backoff in _backoffs():
            life = member.life
            try:
                life = await self._fleet.ready(member)
                answer = await self._try(asked, progress, member)
                self._fleet.served(member)
                progress.finish()
                return Sample(answer.token_ids, answer.logprobs, answer.finish_reason, answer.versions)
            except (ServerUnavailableError, LostServerError, UnusableAnswerError, LateError) as problem:
                fault = f"{self.servers.describe(member.index)}: {problem}"
                tries, late = tries + isinstance(problem, UnusableAnswerError), late + isinstance(problem, LateError)
                is_late = isinstance(problem, LateError)
                progress.fail(self._version, is_trusted=not isinstance(problem, UnusableAnswerError))
            finally:
                self._fleet.give(member)
            if late > MAX_LATE:
                raise TimeoutError(f"{fault}; that was the {late}th time, raise rollout.request_timeout or see the log")
            if tries >= MAX_TRIES:
                raise RuntimeError(f"{tries} answers for prompt {prompt.uid} could not be used; the last: {fault}")
            log.warning("prompt %s will be sent again: %s", prompt.uid, fault)
            await self._fleet.report(member, life, fault, is_fatal=is_late)
            lost += life.lost.done() and not is_late
            if lost > MAX_LOST:
                raise RuntimeError(
                    f"servers had to be restarted {lost} times while they sampled prompt {prompt.uid} "
                    f"({len(prompt.token_ids)} tokens); the last: {fault}"
                )
            await asyncio.sleep(backoff)
            member = await self._fleet.take(1, is_retry=True)
        raise AssertionError("backoffs never end")

    def _no_progress(self, asked: Asked) -> Progress:
        stops = frozenset(self.stop_token_ids)
        expected = answers.Expected(asked.prompt.uid, asked.params.max_tokens, stops, self.vocab_size)
        return Progress(expected, self.config.partial_answers is PartialAnswers.keep, self._partial)

    async def _try(self, asked: Asked, progress: Progress, member: Member) -> answers.Answer:
        """One request to one server, until it answers, is lost, or `rollout.request_timeout` has passed."""
        await self._turn()
        life, limit, uid = member.life, self.config.request_timeout, asked.prompt.uid
        kept = progress.begin(self._version, is_updating=bool(self._paused))
        expected = dataclasses.replace(progress.expected, oldest_version=self._version)
        rest = dataclasses.replace(expected, max_tokens=expected.max_tokens - len(kept))
        body = asked.body if not len(kept) else self._body_from(asked, kept)

        def on_frame(token_ids: wire.Ids, logprobs: wire.Logprobs) -> None:
            progress.add(token_ids, logprobs)
            self._fleet.progressed(member)

        request = asyncio.ensure_future(client.sample(self._http, self._asked[member.index], body, rest, on_frame))
        try:
            either: set[asyncio.Future[Any]] = {request, life.lost}
            await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                answer = progress.join(request.result())
                answers.check(answer, expected, self._version)
                if answer.finish_reason == "abort":
                    raise UnusableAnswerError(f"sample of prompt {uid} was aborted by the server")
                return answer
            if life.lost.done():
                raise LostServerError(life.lost.result())
            raise LateError(f"no sample of prompt {uid} within rollout.request_timeout={limit:.0f} s")
        finally:
            request.cancel()
            await asyncio.wait({request})
            if not request.cancelled():
                request.exception()  # seen: whatever it was, it came too late

    async def _turn(self) -> None:
        """Wait for a turn of the event loop in which few others start: all at once would block it for seconds."""
        async with self._starting:
            await asyncio.sleep(0)

    def _body_from(self, asked: Asked, kept: wire.Ids) -> bytes:
        """The request for what follows the tokens `kept`: they are part of its prompt."""
        prompt = dataclasses.replace(asked.prompt, token_ids=(*asked.prompt.token_ids, *kept.tolist()))
        params = dataclasses.replace(asked.params, max_tokens=asked.params.max_tokens - len(kept))
        return client.request_body(prompt, params, self.stop_token_ids, asked.priority)

    # ---------------------------------------------------------------- servers

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give all servers the weights `(Hugging Face name, full tensor)` as `version`; restart one that fails at it.

        Raises ValueError, before a server is touched, unless every parameter of the model comes exactly once;
        RuntimeError when no server takes them.
        """
        with self._pause("weight update"):
            with self._weights:
                self._files = None  # those of the old version are about to go
                self._files = self.store.write(weights, version)
                self._version = version
                # A restart that is under way ends with these weights: nobody waits for it.
                updated = [m for m in self._fleet.members if not m.is_down or self._has_newest[m.index]]
            unwell, self._unwell = self._unwell, {}
            self._run(all_or_none([self._update(member, unwell.get(member.index)) for member in updated]))

    async def _update(self, member: Member, fault: str | None) -> None:
        async with member.repair:  # a restart that ended with the weights before
            life = member.life
        fault = fault or await self._fault_of(member, "take the weights", self._push)
        if fault:
            await self._fleet.attend(member, life, fault, is_fatal=True)

    def sleep(self) -> None:
        """Free the servers' GPU memory while the trainer works, where `rollout.vllm.enable_sleep_mode` is set."""
        if self.config.vllm.get("enable_sleep_mode") and not self._asleep:
            self._asleep = True
            self._paused.append(ASLEEP)
            self._control("/sleep", {"level": "1"})

    def wake_up(self) -> None:
        """Undo `sleep`; nothing where the servers are awake."""
        if self._asleep:
            self._asleep = False
            self._control("/wake_up", {})
            self._paused[:] = [reason for reason in self._paused if reason != ASLEEP]

    def _control(self, route: str, params: dict[str, str]) -> None:
        """One call of a control route everywhere; a server that fails at it is restarted, awake, by the next update."""

        async def ask(http: httpx.AsyncClient, deadline: float) -> None:
            await control.call(http, "POST", route, deadline, params=params)

        async def each(member: Member) -> None:
            if fault := await self._fault_of(member, f"answer {route}", ask):
                log.error("%s; the next weight update restarts it", fault)
                self._unwell[member.index] = fault

        with self._pause(route):
            self._run(all_or_none([each(member) for member in self._fleet.members]))

    async def _fault_of(self, member: Member, purpose: str, action: ServerCall) -> str | None:
        """Run `action` on a server; None when it went well, else what went wrong, server and log named."""
        if member.given_up:
            return None
        if not self.servers.alive(member.index):
            return self.servers.describe_exit(member.index)
        limit = self.config.sync_timeout
        try:
            async with control.client(self._asked[member.index].url, self.servers.headers) as http:
                await action(http, time.monotonic() + limit)
            return None
        except TimeoutError as late:
            problem = f"it did not {purpose} within rollout.sync_timeout={limit:.0f} s ({late})"
        except (ConnectionError, httpx.TransportError, RuntimeError) as error:
            problem = f"it was to {purpose}: {type(error).__name__}: {error}"
        return f"{self.servers.describe(member.index)}: {problem}"

    async def _push(self, http: httpx.AsyncClient, deadline: float) -> None:
        await weight_sync.push_weights(http, self._files or [], self._version, deadline)

    def _restart(self, index: int, fault: str) -> None:
        """Start a server anew with the newest weights; blocks. Raises HopelessError where there are none."""
        with self._weights:
            self._has_newest[index] = False
            self._require_weights(fault)
        self.restarts += 1
        try:
            self.servers.restart(index)
        except ServersClosedError as closed:
            raise HopelessError(str(closed)) from closed
        with self._weights:  # an update may have come meanwhile
            self._require_weights(fault)
            self._prepare(index)
            self._has_newest[index] = True

    def _require_weights(self, fault: str) -> None:
        if self._files is None:
            raise HopelessError(f"the last update failed, so there are no weights for it; {fault}")
        try:
            self.store.require(self._files)
        except RuntimeError as gone:
            raise HopelessError(str(gone)) from gone

    def _prepare(self, index: int) -> None:
        """What a fresh server needs once: the transfer engine, the newest weights and their version. Blocks."""
        asyncio.run(self._agree(index))

    async def _agree(self, index: int) -> None:
        deadline = time.monotonic() + self.config.sync_timeout
        url = self.servers.servers[index].url
        async with control.client(url, self.servers.headers) as http:
            await control.call(http, "POST", "/init_weight_transfer_engine", deadline, json={"init_info": {}})
            reports = await weight_sync.reports_versions(http, deadline)
            await weight_sync.set_version(http, INITIAL_VERSION, deadline)
            has_frames = (await control.ask(http, "POST", wire.ROUTE, deadline, json={})).status == 400
            if self._files:
                try:
                    await self._push(http, deadline)
                except RuntimeError as refused:
                    raise HopelessError(f"a fresh server refuses the weights: {refused}") from refused
        if not has_frames:
            log.warning(
                "vLLM server %d does not have our plugin's route: its answers come as JSON, 140 bytes a token instead of "
                "8; install this package into the environment of rollout.python",
                index,
            )
        self._asked[index] = client.Server(url, has_frames, reports)
        self._fleet.members[index].admission.begin(await self._look(index) or Reading())

    async def _look(self, index: int) -> Reading | None:
        """What the server's /metrics say; None where it does not answer."""
        try:
            async with control.client(self._asked[index].url) as http:
                reply = await control.ask(http, "GET", "/metrics", time.monotonic() + METRICS_SECONDS)
        except (TimeoutError, ConnectionError, httpx.HTTPError, RuntimeError):
            return None
        return admission.read(reply.text)

    def metrics(self) -> dict[str, float]:
        """What happened at the servers since the last call, to be recorded with the step; see docs/troubleshooting.md."""
        return self._run(self._take_metrics())

    async def _take_metrics(self) -> dict[str, float]:
        seen, serving = self._fleet.take_seen(), [m for m in self._fleet.members if not m.given_up]
        totals = {"restarts": self.restarts} | vars(self._partial)
        record = {f"server/{name}": float(total - self._told.get(name, 0)) for name, total in totals.items()}
        self._told = totals
        record["server/given_up"] = float(len(self._fleet.members) - len(serving))
        record["server/limit"] = float(sum(member.admission.limit for member in serving))
        if seen.cache_use is None:
            return record
        return record | {f"server/{name}": value for name, value in vars(seen).items()}

    @contextlib.contextmanager
    def _pause(self, reason: str) -> Any:
        self._paused.append(reason)
        try:
            yield
        finally:
            self._paused.remove(reason)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.submit(work).result()

    def close(self) -> None:
        """End the servers and remove the stored weights; safe to call twice, and while the servers start."""
        self.servers.close()
        if not self._loop.loop.is_closed():
            self._run(self._http.close())
        self._loop.close()
        self.store.close()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _backoffs() -> Iterable[float]:
    """Seconds to wait before each further try, for ever."""
    backoff = FIRST_BACKOFF_SECONDS
    while True:
        yield backoff
        backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
