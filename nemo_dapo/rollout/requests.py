"""Each of a group's samples as a request of its own, sent to the same server for its prefix cache.

One that fails is asked for again alone, elsewhere where there is an elsewhere (`fleet`), going on with what had come
(`progress`), within bounds that end a run rather than let it try for ever. R response tokens, K of them kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from nemo_dapo.config import PartialAnswers, RolloutConfig
from nemo_dapo.rollout import answers, client, wire
from nemo_dapo.rollout.answers import UnusableAnswerError
from nemo_dapo.rollout.client import ServerUnavailableError
from nemo_dapo.rollout.fleet import LostServerError
from nemo_dapo.rollout.member import Life, Member
from nemo_dapo.rollout.progress import Counts, Progress
from nemo_dapo.rollout.upkeep import Upkeep
from nemo_dapo.tasks import all_or_none
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams

log = logging.getLogger(__name__)

MAX_TRIES = 8  # of one sample that servers answer with something unusable
MAX_LATE = 2  # times that one sample may be late
MAX_LOST = 4  # times that one sample's server may be lost under it: its prompt may be the cause
FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0
STARTS_AT_ONCE = 8  # groups or samples, in one turn of the event loop


@dataclass(frozen=True)
class Asked:
    """What was asked for; `body` is the request for one whole sample of it."""

    prompt: Prompt
    params: SamplingParams
    priority: int | None
    body: bytes


class AbortedError(UnusableAnswerError):
    """The server broke an answer off, as one that ends in good order does: what it had sent is as good as a dead one's."""


class LateError(Exception):
    """A sample took longer than rollout.request_timeout."""


class Requests:
    """Samples from the servers of `upkeep`, by whatever requests it takes; everything but `asked` runs in its event loop.

    `partial` counts the tokens of answers that broke off. `vocab_size` 0 = unknown; `mixture` is that of a model whose
    tokens' routes are to come.
    """

    def __init__(
        self,
        config: RolloutConfig,
        upkeep: Upkeep,
        http: aiohttp.ClientSession,
        stop_token_ids: list[int],
        vocab_size: int = 0,
        mixture: answers.Mixture | None = None,
    ) -> None:
        self.config, self.upkeep, self.http = config, upkeep, http
        self.stop_token_ids, self.vocab_size, self.mixture = stop_token_ids, vocab_size, mixture
        lengths = config.max_prompt_length + config.max_response_length
        self.max_model_len = int(config.vllm.get("max_model_len") or lengths)
        self.partial = Counts()
        self._by_priority = config.vllm.get("scheduling_policy", "priority") == "priority"
        self._submissions = itertools.count()
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)

    def asked(self, prompt: Prompt, params: SamplingParams) -> Asked:
        """The next submission; raises ValueError for a prompt that cannot fit."""
        needed = len(prompt.token_ids) + params.max_tokens
        if needed > self.max_model_len:
            raise ValueError(
                f"prompt {prompt.uid} has {len(prompt.token_ids)} tokens, with max_tokens={params.max_tokens} that is "
                f"{needed}, but the servers hold {self.max_model_len}: shorten it, or raise rollout.vllm.max_model_len"
            )
        # Earlier groups first: a server short of memory preempts the newest.
        priority = next(self._submissions) if self._by_priority else None
        return Asked(prompt, params, priority, client.request_body(prompt, params, self.stop_token_ids, priority))

    async def group(self, asked: Asked, n: int, drafts: Sequence[Draft] = ()) -> list[Sample]:
        """`n` samples, from one server where it serves them all; what `drafts` have is theirs already."""
        drafts = drafts or [Draft() for _ in range(n)]
        missing = [draft for draft in drafts if not draft.is_whole]
        if missing:
            await self.turn()
            await self._samples(asked, await self.upkeep.fleet.take(len(missing)), missing)
        return [draft.sample for draft in drafts]

    async def _samples(self, asked: Asked, member: Member, drafts: Sequence[Draft]) -> None:
        """Make all `drafts` whole; as many places on `member` are taken."""
        unbegun = len(drafts)

        async def one(draft: Draft) -> None:
            nonlocal unbegun
            unbegun -= 1
            await self._sample(asked, member, draft)

        try:
            await all_or_none([one(draft) for draft in drafts])
        finally:  # a task that is cancelled before its first turn runs nothing, not even what gives its place back
            self.upkeep.fleet.give(member, unbegun)

    async def turn(self) -> None:
        """Wait for a turn of the event loop in which few others start: all at once would block it for seconds."""
        async with self._starting:
            await asyncio.sleep(0)

    async def _sample(self, asked: Asked, member: Member, draft: Draft) -> None:
        """Make `draft` whole, by as many tries as it takes within their bounds; one place on `member` is already taken."""
        fleet, prompt, progress = self.upkeep.fleet, asked.prompt, self._progress(asked, draft)
        tries = late = lost = 0
        for backoff in _backoffs():
            life = member.life
            try:
                life = await fleet.ready(member)
                answer = await self._try(asked, progress, member, life)
                fleet.served(member)
                progress.finish(answer)
                return
            except (ServerUnavailableError, LostServerError, UnusableAnswerError, LateError) as problem:
                fault = f"{self.upkeep.describe(member.index)}: {problem}"
                is_unusable, is_late = isinstance(problem, UnusableAnswerError), isinstance(problem, LateError)
                is_trusted = not is_unusable or isinstance(problem, AbortedError)
                progress.fail(self.upkeep.version, is_trusted=is_trusted)
            finally:
                fleet.give(member)
            tries, late = tries + is_unusable, late + is_late
            if late > MAX_LATE:
                raise TimeoutError(f"{fault}, {late} times; raise rollout.request_timeout or see the server's log")
            if tries >= MAX_TRIES:
                raise RuntimeError(
                    f"{tries} answers for prompt {prompt.uid} could not be used; the last: {fault}; see the server's log, "
                    "and whether the environment of rollout.python has this version of the package"
                )
            if life.said.is_new(fault):  # all that a server has open may fail at once, by the thousand
                log.warning("prompt %s will be sent again: %s", prompt.uid, fault)
            await fleet.report(member, life, fault, is_fatal=is_late)
            lost += life.lost.done() and not is_late
            if lost > MAX_LOST:
                raise RuntimeError(
                    f"servers had to be restarted {lost} times while they sampled prompt {prompt.uid} "
                    f"({len(prompt.token_ids)} tokens), expected at most {MAX_LOST}; the last: {fault}; see the servers' "
                    "logs, and take the prompt out of the data where it is always this one"
                )
            await asyncio.sleep(backoff)
            member = await fleet.take(1, is_retry=True)
        raise AssertionError("backoffs never end")

    def _progress(self, asked: Asked, draft: Draft) -> Progress:
        stops = frozenset(self.stop_token_ids)
        expected = answers.Expected(
            asked.prompt.uid,
            asked.params.max_tokens,
            stops,
            self.vocab_size,
            prompt_tokens=len(asked.prompt.token_ids),
            mixture=self.mixture,
        )
        keeps = self.config.partial_answers is PartialAnswers.keep
        return Progress(expected, keeps, self.partial, crosses=self.config.max_staleness > 0, draft=draft)

    async def _try(self, asked: Asked, progress: Progress, member: Member, life: Life) -> answers.Answer:
        """One request to a server in this `life`, until it answers, is lost, or `rollout.request_timeout` has passed."""
        await self.turn()
        upkeep, limit, uid = self.upkeep, self.config.request_timeout, asked.prompt.uid
        kept = progress.begin(upkeep.version, is_updating=bool(upkeep.paused))
        whole = dataclasses.replace(progress.expected, oldest_version=progress.oldest_version)
        rest = dataclasses.replace(
            whole,
            max_tokens=whole.max_tokens - len(kept),
            oldest_version=progress.version,
            prompt_tokens=whole.prompt_tokens + len(kept),
        )
        body = client.with_salt(asked.body if not len(kept) else self._body_from(asked, kept), upkeep.version)

        def on_tokens(token_ids: wire.Ids, logprobs: wire.Logprobs) -> None:
            progress.add(token_ids, logprobs, upkeep.version)
            upkeep.fleet.progressed(member)

        request = asyncio.ensure_future(client.sample(self.http, upkeep.asked[member.index], body, rest, on_tokens))
        try:
            either: set[asyncio.Future[Any]] = {request, life.lost}
            await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                answer = progress.join(request.result())
                answers.check(answer, whole, upkeep.version)
                if answer.finish_reason == "abort":
                    raise AbortedError(f"sample of prompt {uid} was aborted by the server")
                return answer
            if life.lost.done():
                raise LostServerError(life.lost.result())
            raise LateError(
                f"no sample of prompt {uid} within rollout.request_timeout={limit:.0f} s, {progress.received.size} of at "
                f"most {whole.max_tokens} tokens came"
            )
        finally:
            request.cancel()
            await asyncio.wait({request})
            if not request.cancelled():
                request.exception()  # seen: whatever it was, it came too late

    def _body_from(self, asked: Asked, kept: wire.Ids) -> bytes:
        """The request for what follows the tokens `kept` [K]: they are part of its prompt."""
        prompt = dataclasses.replace(asked.prompt, token_ids=(*asked.prompt.token_ids, *kept.tolist()))
        params = dataclasses.replace(asked.params, max_tokens=asked.params.max_tokens - len(kept))
        return client.request_body(prompt, params, self.stop_token_ids, asked.priority)


def _backoffs() -> Iterable[float]:
    """Seconds to wait before each further try, for ever."""
    backoff = FIRST_BACKOFF_SECONDS
    while True:
        yield backoff
        backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
