"""Dynamic sampling (Eq. 11, Algorithm 1 lines 4 to 7) as a stream.

Prompts are sent one group at a time, just enough of them that the accepted ones plus the expected share of those in flight
cover what the step needs. The step's batch is the first N informative groups **in submission order**. Taking the first N
to finish instead would prefer short answers and make the batch depend on timing.

    index       0    1    2    3    4    5    6    7        N = 3
    outcome     keep wrong keep ...  keep keep ...  right
                               |     |
                               |     the third kept: nothing after it can enter the batch, so 6 is cancelled and 5 and 7
                               |     are surplus
                               still running: it decides whether the batch is {0, 2, 3} or {0, 2, 4}

Which prompts a step consumes is thus a function of the answers alone: surplus prompts go back to the front of the queue,
with their indices, whether they were finished or not.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch

from nemo_dapo.algorithm import is_informative
from nemo_dapo.interfaces import PromptLoader, Rewarder, RolloutEngine
from nemo_dapo.stopping import check_progress, check_verifier, in_words
from nemo_dapo.types import Group, Prompt, Sample, SamplingParams

logger = logging.getLogger(__name__)

# The estimate of the acceptance rate weighs as much as this many observed groups when a step begins.
PRIOR_GROUPS = 32
MIN_RATE = 1e-3
# A cancelled request must end within this many seconds: it only has to close a connection.
CANCEL_TIMEOUT = 60.0
# What may pass when tried again: the connection to a server that died while others live on.
RETRYABLE = (ConnectionError,)

GroupTask = asyncio.Task[Group]


class DropReason(Enum):
    all_wrong = "all_wrong"
    all_right = "all_right"
    verifier_error = "verifier_error"
    aborted = "aborted"  # the engine stopped the group; its prompt is sampled again in the next step
    surplus = "surplus"  # not needed: came after the last accepted group; likewise sampled again


USELESS = (DropReason.all_wrong, DropReason.all_right, DropReason.verifier_error, DropReason.aborted)


@dataclass(frozen=True)
class Dropped:
    """A group that did not enter the batch; `group` is None when it was cancelled before it finished."""

    index: int
    prompt: Prompt
    reason: DropReason
    group: Group | None = None


@dataclass(frozen=True)
class Collected:
    """What one step sampled. `groups` are in submission order; `exhausted` when fewer than asked for were found.

    `seconds` is the whole collection, `tail_seconds` the part of it after enough groups had been accepted, spent waiting
    for earlier ones: the price of submission order. `peak_in_flight` counts groups.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    exhausted: bool
    seconds: float
    tail_seconds: float
    peak_in_flight: int

    def count(self, reason: DropReason) -> int:
        return sum(d.reason is reason for d in self.dropped)

    @property
    def useless(self) -> dict[str, int]:
        """How many groups within the step were dropped, by reason."""
        return {reason.value: self.count(reason) for reason in USELESS}

    @property
    def judged(self) -> list[Group]:
        """The groups up to the last accepted one that were sampled to their end, kept or not: an unbiased sample."""
        unjudged = (DropReason.aborted, DropReason.surplus)
        dropped = [d.group for d in self.dropped if d.group is not None and d.reason not in unjudged]
        return [*self.groups, *dropped]

    @property
    def decisive(self) -> list[Group]:
        """In submission order, every group up to the last accepted one, aborted ones too: what the step came to be from."""
        dropped = [d.group for d in self.dropped if d.group is not None and d.reason is not DropReason.surplus]
        return sorted([*self.groups, *dropped], key=lambda group: group.index)

    @property
    def kept_tokens(self) -> int:
        return _tokens(self.groups)

    @property
    def generated_tokens(self) -> int:
        """Response tokens of all finished groups; what cancelled ones had generated is unknown."""
        return self.kept_tokens + _tokens(d.group for d in self.dropped if d.group is not None)

    def metrics(self) -> dict[str, float]:
        """Flat and namespaced; lengths in tokens, `accuracy` and `truncated` as shares of the judged samples."""
        samples = [s for g in self.judged for s in g.samples]
        verdicts = [v for g in self.judged for v in g.verdicts if v.error is None]
        record = {
            "rollout/groups_kept": float(len(self.groups)),
            "rollout/groups_sampled": float(len(self.groups) + len(self.dropped)),
            "rollout/acceptance_rate": len(self.groups) / max(len(self.judged), 1),
            "rollout/exhausted": float(self.exhausted),
            "rollout/verifier_errors": float(sum(g.num_errors for g in self.judged)),
            "rollout/accuracy": _mean(float(v.correct) for v in verdicts),
            "rollout/truncated": _mean(float(s.truncated) for s in samples),
            "rollout/mean_length": _mean(len(s.token_ids) for s in samples),
            "rollout/mean_length_kept": _mean(len(s.token_ids) for g in self.groups for s in g.samples),
            "rollout/generated_tokens": float(self.generated_tokens),
            "rollout/kept_tokens": float(self.kept_tokens),
            "rollout/peak_in_flight": float(self.peak_in_flight),
            "time/rollout": self.seconds,
            "time/rollout_tail": self.tail_seconds,
        }
        return record | {f"rollout/dropped_{reason.value}": float(self.count(reason)) for reason in DropReason}


def judge(group: Group, *, dynamic_sampling: bool) -> DropReason | None:
    """Why a finished group must not be trained on; None keeps it. Eq. 11 on integer verdicts, never on shaped rewards.

    One verifier error drops the whole group: without that verdict the group's mean and standard deviation (Eq. 9) are
    unknown, and leaving the sample out instead would compare the others against a group from which exactly the answers
    that verifiers choke on are missing. It costs one group, and is counted.
    """
    if any(sample.finish_reason == "abort" for sample in group.samples):
        return DropReason.aborted
    if group.num_errors:
        return DropReason.verifier_error
    if dynamic_sampling and not is_informative(torch.tensor([verdict.correct for verdict in group.verdicts])):
        return DropReason.all_right if group.num_correct else DropReason.all_wrong
    return None


class GroupSampler:
    """Collects the groups of a step. Holds no event loop: call `asyncio.run(sampler.collect(n))` once a step.

    A step samples at most `max_attempts * n` groups. `timeout` is the longest time, in seconds, in which no group at all
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
        max_error_rate: float = 1.0,
        max_empty_steps: int = 0,
        timeout: float = 3600.0,
        retries: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts} must be at least 1: a step samples every group once")
        self.engine, self.rewarder, self.loader = engine, rewarder, loader
        self.group_size, self.params = group_size, params
        self.dynamic_sampling, self.max_attempts = dynamic_sampling, max_attempts
        self.max_error_rate, self.max_empty_steps = max_error_rate, max_empty_steps
        self.timeout, self.retries, self.on_progress = timeout, retries, on_progress
        self.acceptance_rate = 0.5 if dynamic_sampling else 1.0
        self.next_index = 0
        self.counters = {"groups_judged": 0, "groups_kept": 0, "steps_exhausted": 0, "empty_steps_in_a_row": 0}
        self._pending: deque[Prompt] = deque()  # taken from the loader and not judged yet: they come first

    async def collect(self, num_groups: int) -> Collected:
        """The next `num_groups` informative groups, or as many as the bound on attempts allowed.

        Raises TimeoutError when nothing finishes for `timeout` seconds and RuntimeError when engine or rewarder fail;
        both name the prompts. RuntimeError also for what `stopping` refuses to go on with. After an error the sampler is as
        it was before the call.
        """
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups} must be at least 1")
        step = _Step(num_groups, math.ceil(self.max_attempts * num_groups), self.next_index, self.acceptance_rate)
        try:
            while True:
                self._top_up(step)
                step.cancel_surplus()
                if not step.running:
                    break
                await self._absorb(step)
                if step.began_without_a_verdict():  # known long before the last attempt
                    check_verifier(step.first_groups(), self.max_error_rate)
            await step.stop()
            collected, again = step.result()
            empty_steps = 0 if collected.groups else self.counters["empty_steps_in_a_row"] + 1
            check_verifier(collected.judged, self.max_error_rate)
            check_progress(empty_steps, self.max_empty_steps, collected.useless)
        except BaseException:
            self._pending.extendleft(reversed(step.prompts))
            await step.stop()
            raise
        self._settle(step, collected, again)
        self.counters["empty_steps_in_a_row"] = empty_steps
        return collected

    def _top_up(self, step: _Step) -> None:
        """Submit until the groups in flight are expected to bring what is still missing."""
        while len(step.running) < step.wanted_in_flight() and len(step.prompts) < step.limit:
            step.submit(self._next_prompt(), self._sample_group)

    def _next_prompt(self) -> Prompt:
        return self._pending.popleft() if self._pending else self.loader.next()

    async def _sample_group(self, prompt: Prompt, index: int) -> Group:
        samples = await self._generate(prompt)
        if len(samples) != self.group_size:
            raise ValueError(f"the engine returned {len(samples)} samples, expected group_size={self.group_size}")
        if any(sample.finish_reason == "abort" for sample in samples):
            return Group(prompt, tuple(samples), verdicts=(), index=index)
        verdicts = await self.rewarder.score(prompt, samples)
        if len(verdicts) != len(samples):
            raise ValueError(f"the rewarder returned {len(verdicts)} verdicts for {len(samples)} samples")
        return Group(prompt, tuple(samples), tuple(verdicts), index)

    async def _generate(self, prompt: Prompt) -> list[Sample]:
        for _ in range(self.retries):
            try:
                return await self.engine.generate(prompt, self.group_size, self.params)
            except RETRYABLE as error:
                logger.warning("rollout of prompt %s failed (%s): trying again", prompt.uid, error)
        return await self.engine.generate(prompt, self.group_size, self.params)

    async def _absorb(self, step: _Step) -> None:
        """Wait for one group to finish and judge it."""
        group = await step.next_finished(self.timeout)
        if group is None:
            return
        step.record(group, judge(group, dynamic_sampling=self.dynamic_sampling))
        if self.on_progress is not None:
            self.on_progress(min(len(step.kept), step.num_groups), len(step.finished))

    def _settle(self, step: _Step, collected: Collected, again: list[Prompt]) -> None:
        """Cut the step after its last accepted group; what lies beyond is surplus and returns to the queue.

        Carrying surplus over instead (max_staleness > 0) belongs here: finished informative groups would be kept for the
        next step's `_Step.kept` rather than dropped, and `_Step.cancel_surplus` would let the others run on.
        """
        judged = len(collected.judged)
        self.acceptance_rate = _smoothed(self.acceptance_rate, len(collected.groups), judged)
        self.next_index = step.first_index + step.end
        self._pending.extendleft(reversed(again))
        self.counters["groups_judged"] += judged
        self.counters["groups_kept"] += len(collected.groups)
        self.counters["steps_exhausted"] += collected.exhausted
        if collected.exhausted:
            logger.warning(
                "%d of %d groups can be trained on after %d attempts (algorithm.max_attempts=%g), %s: %s",
                *(len(collected.groups), step.num_groups, step.limit, self.max_attempts, in_words(collected.useless)),
                "training on those" if collected.groups else "no update in this step",
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts. Belongs with the loader's: it is ahead by the pending prompts."""
        return {
            "pending": [asdict(prompt) | {"token_ids": list(prompt.token_ids)} for prompt in self._pending],
            "next_index": self.next_index,
            "acceptance_rate": self.acceptance_rate,
            "counters": dict(self.counters),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pending = [Prompt(**fields | {"token_ids": tuple(fields["token_ids"])}) for fields in state["pending"]]
        self._pending = deque(pending)
        self.next_index = state["next_index"]
        self.acceptance_rate = state["acceptance_rate"]
        self.counters |= state["counters"]


@dataclass
class _Step:
    """The groups of one `collect`. Positions count from 0 within the step; a group's index adds `first_index`."""

    num_groups: int
    limit: int
    first_index: int
    prior_rate: float
    prompts: list[Prompt] = field(default_factory=list)
    running: dict[GroupTask, int] = field(default_factory=dict)
    cancelled: dict[GroupTask, int] = field(default_factory=dict)
    finished: dict[int, Group] = field(default_factory=dict)
    reasons: dict[int, DropReason | None] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)  # sorted positions
    peak_in_flight: int = 0
    filled_at: float | None = None

    def __post_init__(self) -> None:
        self.ended: asyncio.Queue[GroupTask] = asyncio.Queue()
        self.now = asyncio.get_running_loop().time
        self.started_at = self.now()

    @property
    def full(self) -> bool:
        """Enough groups are accepted; earlier ones that still run may yet displace some."""
        return len(self.kept) >= self.num_groups

    @property
    def end(self) -> int:
        """One past the last position that can enter the batch."""
        return self.kept[self.num_groups - 1] + 1 if self.full else len(self.prompts)

    def first_groups(self) -> list[Group]:
        """Those of the first `num_groups` positions that are finished: once all are, no timing can change them."""
        return [self.finished[position] for position in range(self.num_groups) if position in self.finished]

    def began_without_a_verdict(self) -> bool:
        """Whether the verifier failed on every sample of the first `num_groups` groups."""
        if len(self.finished) < self.num_groups or not all(group.num_errors for group in self.finished.values()):
            return False
        first = self.first_groups()
        return len(first) == self.num_groups and all(g.num_errors == len(g.verdicts) for g in first)

    def wanted_in_flight(self) -> int:
        missing = self.num_groups - len(self.kept)
        return math.ceil(missing / _smoothed(self.prior_rate, len(self.kept), len(self.finished)))

    def submit(self, prompt: Prompt, sample_group: Callable[[Prompt, int], Any]) -> None:
        position = len(self.prompts)
        self.prompts.append(prompt)
        task = asyncio.create_task(sample_group(prompt, self.first_index + position), name=f"group {prompt.uid}")
        task.add_done_callback(self.ended.put_nowait)
        self.running[task] = position
        self.peak_in_flight = max(self.peak_in_flight, len(self.running))

    async def next_finished(self, timeout: float) -> Group | None:
        """The next group to finish; None when it was one that we cancelled."""
        try:
            task = await asyncio.wait_for(self.ended.get(), timeout)
        except asyncio.TimeoutError as error:
            raise TimeoutError(
                f"no group finished for {timeout:g} s; waiting for {self._names(self.running)}"
            ) from error
        if task in self.cancelled:
            return None
        prompt = self.prompts[self.running.pop(task)]
        if task.cancelled():
            raise RuntimeError(f"rollout of prompt {prompt.uid} was cancelled by the engine or the rewarder")
        if (failure := task.exception()) is not None:
            raise RuntimeError(
                f"rollout of prompt {prompt.uid} failed: {type(failure).__name__}: {failure}"
            ) from failure
        return task.result()

    def record(self, group: Group, reason: DropReason | None) -> None:
        position = group.index - self.first_index
        self.finished[position], self.reasons[position] = group, reason
        if reason is None:
            bisect.insort(self.kept, position)
            if len(self.kept) == self.num_groups:
                self.filled_at = self.now()

    def cancel_surplus(self) -> None:
        """Stop what can no longer enter the batch: the servers are needed for the groups before it."""
        for task, position in list(self.running.items()) if self.full else ():
            if position >= self.end and not task.done():
                self._cancel(task)

    def _cancel(self, task: GroupTask) -> None:
        self.cancelled[task] = self.running.pop(task)
        task.cancel()

    async def stop(self) -> None:
        """End everything still running and wait until it has ended. Raises TimeoutError when something does not."""
        for task in list(self.running):
            self._cancel(task)
        if not self.cancelled:
            return
        _, stuck = await asyncio.wait(self.cancelled, timeout=CANCEL_TIMEOUT)
        if stuck:
            names = self._names({task: self.cancelled[task] for task in stuck})
            raise TimeoutError(f"cancelled groups did not end within {CANCEL_TIMEOUT:g} s: {names}")

    def _names(self, tasks: dict[GroupTask, int]) -> str:
        uids = [self.prompts[position].uid for position in sorted(tasks.values())]
        return f"{len(uids)} prompts: {', '.join(uids[:8])}" + (", ..." if len(uids) > 8 else "")

    def result(self) -> tuple[Collected, list[Prompt]]:
        """What was collected, and the prompts to sample again."""
        groups, dropped, again = [], [], []
        for position, prompt in enumerate(self.prompts):
            group = self.finished.get(position)
            reason = self.reasons[position] if position < self.end else DropReason.surplus
            if reason is None:
                groups.append(self.finished[position])
                continue
            dropped.append(Dropped(self.first_index + position, prompt, reason, group))
            if reason in (DropReason.aborted, DropReason.surplus):
                again.append(prompt)
        return Collected(
            groups=tuple(groups),
            dropped=tuple(dropped),
            exhausted=len(groups) < self.num_groups,
            seconds=self.now() - self.started_at,
            tail_seconds=0.0 if self.filled_at is None else self.now() - self.filled_at,
            peak_in_flight=self.peak_in_flight,
        ), again


def _smoothed(rate: float, kept: int, judged: int) -> float:
    """The acceptance rate after `kept` of `judged` more groups were accepted; never 0, we divide by it."""
    return max((PRIOR_GROUPS * rate + kept) / (PRIOR_GROUPS + judged), MIN_RATE)


def _tokens(groups: Iterable[Group]) -> int:
    return sum(len(sample.token_ids) for group in groups for sample in group.samples)


def _mean(values: Iterable[float]) -> float:
    """NaN when there are none: a step that judged nothing has no accuracy."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan
