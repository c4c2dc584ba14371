"""Dynamic sampling (Eq. 11, Algorithm 1 lines 4 to 7) as a stream.

Prompts are sent one group at a time: `window` decides which are admitted and which make up a step, `flights` runs them,
here both meet engine, rewarder and loader. Which prompts a step consumes is a function of the answers alone: those that it
did not need go back to the front of the queue, with their indices (`max_staleness` 0), or stay for the steps to come.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_dapo.collected import Collected, Dropped, DropReason, judge
from nemo_dapo.flights import Flights, GroupTask
from nemo_dapo.interfaces import PromptLoader, Rewarder, RolloutEngine
from nemo_dapo.resumed_window import fitting, young
from nemo_dapo.stopping import check_progress, check_verifier, in_words
from nemo_dapo.types import Draft, Group, OpenGroup, Prompt, Sample, SamplingParams
from nemo_dapo.window import Step, Window

logger = logging.getLogger(__name__)

# What may pass when tried again: the connection to a server that died while others live on.
RETRYABLE = (ConnectionError,)


@dataclass
class _Wait:
    """The trainer's wait for one step; seconds of the event loop's clock."""

    began: float
    filled: float | None = None  # when enough groups were kept

    def __post_init__(self) -> None:
        self.news = asyncio.Event()


class GroupSampler:
    """Collects the groups of a step by `collect`.

    With `max_staleness` 0 nothing runs between two calls, and each may have an event loop of its own. With more, groups go
    on being sampled between them: all calls, `snapshot` too, belong in one loop, which runs all the time.

    A step passes at most `max_attempts * n` groups. `timeout` is the longest time, in seconds, in which no group at all
    may finish. `max_error_rate` and `max_empty_steps` are the limits of `stopping`, 1 and 0 the absence of any.
    `on_progress(accepted, sampled)` is called after each finished group.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewarder: Rewarder,
        loader: PromptLoader,
        *,
        group_size: int,
        params: SamplingParams,
        dynamic_sampling: bool = True,
        max_attempts: float = 10.0,
        max_staleness: int = 0,
        max_error_rate: float = 1.0,
        max_empty_steps: int = 0,
        timeout: float = 3600.0,
        retries: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts} must be at least 1: a step samples every group once")
        self.engine, self.rewarder, self.loader = engine, rewarder, loader
        self.group_size, self.params, self.dynamic_sampling = group_size, params, dynamic_sampling
        self.max_error_rate, self.max_empty_steps = max_error_rate, max_empty_steps
        self.timeout, self.retries, self.on_progress = timeout, retries, on_progress
        self.window = Window(max_staleness, max_attempts, 0.5 if dynamic_sampling else 1.0)
        self.counters = {"groups_judged": 0, "groups_kept": 0, "steps_exhausted": 0, "empty_steps_in_a_row": 0}
        self._flights = Flights(self._on_end)
        self._pending: deque[Prompt] = deque()  # taken from the loader and not judged yet: they come first
        self._unstarted: list[int] = []  # admitted before a resume and not finished
        self._is_resumed = False  # with a window that no step was taken from since
        self._drafts: dict[int, list[Draft]] = {}  # of the groups in the window that are not finished
        self._prompts: dict[int, Prompt] = {}  # of all groups in the window
        self._groups: dict[int, Group] = {}  # those of them that are finished
        self._reasons: dict[int, DropReason | None] = {}
        self._failure: Exception | None = None  # of a group, to be raised by the next `collect`
        self._wait: _Wait | None = None
        self._counts = False  # whether the flights' occupancy is that of a step

    @property
    def _keeps(self) -> bool:
        """Whether groups stay that a step does not need."""
        return self.window.max_staleness > 0

    # ---------------------------------------------------------------- a step

    async def collect(self, num_groups: int) -> Collected:
        """The next `num_groups` informative groups, or as many as the bound on attempts allowed.

        The weights of every step before it must serve. Raises TimeoutError when nothing finishes for `timeout` seconds and
        RuntimeError when engine or rewarder fail; both name the prompts. RuntimeError also for what `stopping` refuses to
        go on with. After an error no group is consumed: the same come again.
        """
        wait = self._begin(num_groups)
        try:
            step = await self._decided(wait)
            if not self._keeps:
                await self._flights.stop()
            collected = self._collected(step, wait)
            empty_steps = 0 if collected.groups else self.counters["empty_steps_in_a_row"] + 1
            check_verifier(collected.judged, self.max_error_rate)
            check_progress(empty_steps, self.max_empty_steps, collected.useless)
        except BaseException:
            if not self._keeps:
                await self._withdraw()
            raise
        finally:
            self._wait = None
        self._settle(collected)
        self.counters["empty_steps_in_a_row"] = empty_steps
        return collected

    async def stop(self) -> None:
        """End what is still being sampled."""
        await self._flights.stop()

    def _begin(self, num_groups: int) -> _Wait:
        self.window.begin(num_groups)
        if self._is_resumed:
            self._leave_out_what_is_too_old()
        self._wait = wait = _Wait(asyncio.get_running_loop().time())
        if not (self._keeps and self._counts):
            self._flights.take_occupancy()  # nothing is counted before the first step, or between two
            self._counts = True
        if not self._keeps:
            self._failure = None
        self._note_filled()
        self._go_on()
        return wait

    async def _decided(self, wait: _Wait) -> Step:
        """The step, once no outcome to come can change it and nothing runs that it has no need of."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._began_without_a_verdict():  # known long before the last attempt
                check_verifier(self._first_groups(), self.max_error_rate)
            step = self.window.decided()
            if step is not None and (self._keeps or not self._flights.running):
                return step
            wait.news.clear()
            await self._next_news(wait)

    async def _next_news(self, wait: _Wait) -> None:
        news = asyncio.ensure_future(wait.news.wait())
        try:  # not asyncio.wait_for: before Python 3.12 it forgets a cancellation that comes with the news
            if not (await asyncio.wait({news}, timeout=self.timeout))[0]:
                raise TimeoutError(
                    f"no group finished for {self.timeout:g} s; waiting for {self._flights.waited_for()}: see the servers' "
                    "logs and reward.timeout"
                )
        finally:
            news.cancel()

    def _first_groups(self) -> list[Group]:
        """Those of the first N places that are finished: once all are, no timing can change them."""
        first = range(self.window.front, self.window.front + self.window.num_groups)
        return [self._groups[index] for index in first if index in self._groups]

    def _began_without_a_verdict(self) -> bool:
        """Whether the verifier failed on every sample of the first N groups."""
        if self.window.finished < self.window.num_groups or not all(g.num_errors for g in self._groups.values()):
            return False
        first = self._first_groups()
        return len(first) == self.window.num_groups and all(g.num_errors == len(g.verdicts) for g in first)

    def _collected(self, step: Step, wait: _Wait) -> Collected:
        dropped = []
        for index in range(step.first, step.end if self._keeps else self.window.next_index):
            reason = self._reasons[index] if index < step.end else DropReason.surplus
            if reason is not None:
                dropped.append(Dropped(index, self._prompts[index], reason, self._groups.get(index)))
        now = asyncio.get_running_loop().time()
        return Collected(
            groups=tuple(self._groups[index] for index in step.kept),
            dropped=tuple(dropped),
            exhausted=step.exhausted,
            seconds=now - wait.began,
            tail_seconds=0.0 if wait.filled is None else now - wait.filled,
            flights=self._flights.take_occupancy(),
            open=self.window.open - len(step.kept) if self._keeps else 0,
            ahead=self.window.ahead if self._keeps else 0.0,
        )

    def _settle(self, collected: Collected) -> None:
        """Cut the window behind the step; prompts that were not judged return to the queue."""
        step, limit = self.window.take(), self.window.limit
        unjudged = (DropReason.aborted, DropReason.surplus)
        self._pending.extendleft(reversed([d.prompt for d in collected.dropped if d.reason in unjudged]))
        for index in [one for one in self._prompts if not self._keeps or one < step.end]:
            self._drop(index)
        self.counters["groups_judged"] += len(collected.judged)
        self.counters["groups_kept"] += len(collected.groups)
        self.counters["steps_exhausted"] += collected.exhausted
        if collected.exhausted:
            logger.warning(
                "%d of %d groups can be trained on after %d attempts (algorithm.max_attempts=%g), %s: %s",
                *(len(collected.groups), self.window.num_groups, limit, self.window.max_attempts),
                in_words(collected.useless),
                "training on those" if collected.groups else "no update in this step",
            )
        self._go_on()

    def _drop(self, index: int) -> None:
        del self._prompts[index]
        self._groups.pop(index, None)
        self._reasons.pop(index, None)
        self._drafts.pop(index, None)

    async def _withdraw(self) -> None:
        """As if the step had not begun."""
        self._pending.extendleft(reversed(list(self._prompts.values())))
        for index in list(self._prompts):
            self._drop(index)
        self.window.forget()
        await self._flights.stop()

    # ---------------------------------------------------------------- groups

    def _go_on(self) -> None:
        """Submit what the window admits; stop what can no longer enter the step, since the servers are needed before it."""
        unstarted, self._unstarted = self._unstarted, []
        for index in unstarted:
            self._start(index, self._prompts[index])
        while self.window.admits():
            self._start(self.window.admit(), self._next_prompt())
        if not self._keeps and self.window.is_filled:
            self._flights.cancel([index for index in self._flights.running if index >= self.window.end])

    def _next_prompt(self) -> Prompt:
        return self._pending.popleft() if self._pending else self.loader.next()

    def _start(self, index: int, prompt: Prompt) -> None:
        self._prompts[index] = prompt
        if self._keeps:
            self._drafts.setdefault(index, [Draft() for _ in range(self.group_size)])
        self._flights.start(index, prompt, self._sample_group(prompt, index))

    async def _sample_group(self, prompt: Prompt, index: int) -> Group:
        samples = await self._generate(prompt, self._drafts.get(index, ()))
        if len(samples) != self.group_size:
            raise ValueError(f"the engine returned {len(samples)} samples, expected group_size={self.group_size}")
        if any(sample.finish_reason == "abort" for sample in samples):
            return Group(prompt, tuple(samples), verdicts=(), index=index)
        verdicts = await self.rewarder.score(prompt, samples)
        if len(verdicts) != len(samples):
            raise ValueError(f"the rewarder returned {len(verdicts)} verdicts for {len(samples)} samples")
        return Group(prompt, tuple(samples), tuple(verdicts), index)

    async def _generate(self, prompt: Prompt, drafts: Sequence[Draft]) -> list[Sample]:
        for _ in range(self.retries):
            try:
                return await self._ask(prompt, drafts)
            except RETRYABLE as error:
                logger.warning("rollout of prompt %s failed (%s): trying again", prompt.uid, error)
        return await self._ask(prompt, drafts)

    def _ask(self, prompt: Prompt, drafts: Sequence[Draft]) -> Awaitable[list[Sample]]:
        if drafts:
            return self.engine.generate(prompt, self.group_size, self.params, drafts)
        return self.engine.generate(prompt, self.group_size, self.params)

    def _on_end(self, index: int, task: GroupTask) -> None:
        """A group has ended, whether a step is waited for or not. What goes wrong here is for `collect` to raise."""
        try:
            self._record(_result(task, self._prompts[index]))
            self._note_filled()
            if self._wait is not None and self.on_progress is not None:
                self.on_progress(min(self.window.kept, self.window.num_groups), self.window.finished)
            self._go_on()
        except Exception as error:
            self._failure = self._failure or error
        if self._wait is not None:
            self._wait.news.set()

    def _record(self, group: Group) -> None:
        reason = judge(group, dynamic_sampling=self.dynamic_sampling)
        self._groups[group.index], self._reasons[group.index] = group, reason
        self._drafts.pop(group.index, None)
        self.window.finish(group.index, _outcome(reason))

    def _note_filled(self) -> None:
        if self._wait is not None and self._wait.filled is None and self.window.is_filled:
            self._wait.filled = asyncio.get_running_loop().time()

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, and the groups of the window under `window`, a list of OpenGroup.

        Belongs with the loader's: it is ahead by the pending and the open prompts.
        """
        return {
            "pending": [asdict(prompt) | {"token_ids": list(prompt.token_ids)} for prompt in self._pending],
            "next_index": self.window.front,
            "steps": self.window.taken,
            "acceptance_rate": self.window.acceptance_rate,
            "counters": dict(self.counters),
            "window": self._open_groups(),
        }

    def _open_groups(self) -> list[OpenGroup]:
        return [
            OpenGroup(i, prompt, self._groups.get(i), tuple(draft.sample for draft in self._drafts.get(i, ())))
            for i, prompt in sorted(self._prompts.items())
        ]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, saved under options that may have been others; see `resumed_window`.

        Where nothing is kept between steps, the groups of its window are sampled again.
        """
        window: list[OpenGroup] = state.get("window", [])
        pending = [Prompt(**fields | {"token_ids": tuple(fields["token_ids"])}) for fields in state["pending"]]
        self._pending = deque(pending)
        if not self._keeps:
            self._pending.extendleft(reversed([one.prompt for one in window]))
            window = []
        window = fitting(window, self.group_size, self.params.max_tokens)
        self._restore(state["next_index"], state.get("steps", 0), window)
        self._is_resumed = bool(window)
        self.window.acceptance_rate = state["acceptance_rate"]
        self.counters |= state["counters"]

    def _leave_out_what_is_too_old(self) -> None:
        self._is_resumed = False
        window = self._open_groups()
        kept = young(window, self.window, is_open=lambda one: self._reasons.get(one.index) is None)
        self._pending.extendleft(reversed([one.prompt for one in window[len(kept) :]]))
        self._restore(self.window.front, self.window.taken, kept)

    def _restore(self, front: int, taken: int, window: Sequence[OpenGroup]) -> None:
        self._prompts = {one.index: one.prompt for one in window}
        self._groups = {one.index: one.group for one in window if one.group is not None}
        self._reasons = {i: judge(g, dynamic_sampling=self.dynamic_sampling) for i, g in self._groups.items()}
        self._unstarted = [one.index for one in window if one.group is None]
        self._drafts = {one.index: [Draft(sample) for sample in one.drafted] for one in window if one.drafted}
        outcomes = {index: _outcome(reason) for index, reason in self._reasons.items()}
        self.window.restore(front, front + len(window), taken, outcomes)


def _outcome(reason: DropReason | None) -> bool | None:
    """As the window names it."""
    return None if reason is DropReason.aborted else reason is None


def _result(task: GroupTask, prompt: Prompt) -> Group:
    """The group that the ended `task` brought; raises RuntimeError that names its prompt."""
    if task.cancelled():
        raise RuntimeError(f"rollout of prompt {prompt.uid} was cancelled by the engine or the rewarder")
    if (failure := task.exception()) is not None:
        raise RuntimeError(f"rollout of prompt {prompt.uid} failed: {type(failure).__name__}: {failure}") from failure
    return task.result()
