"""Which groups are admitted and which of them make up a step: decisions alone, driven by what happens to groups.

Groups are numbered as they are submitted. Each is decided once: kept (informative) or rejected. A step is the first N kept
ones **in that order**, or, where `limit` groups in a row hold fewer, those that they hold. Taking the first N to finish
instead would prefer short answers and make the batch depend on timing.

    index       0    1    2    3    4    5    6    7        N = 3
    outcome     keep wrong keep ...  keep keep ...  ...
                |                 |    |
                front             |    the third kept: nothing after it can enter this step
                                  still running: it decides whether the step is {0, 2, 3} or {0, 2, 4}

With `max_staleness` m = 0 what lies behind the step is sampled again in the next one: every token is of the weights that
train on it, the paper's recipe. With m > 0 it stays: kept groups wait, running ones run on, under newer weights where these
come. Then size alone bounds age. Of a group behind k open ones (running, or kept and waiting), d places behind the front,
at most k // N + d // limit steps come before its own: each takes N of those k, or passes `limit` places. So it is admitted
only while its step trains weights at most m pushes newer than those that serve now: while fewer than (m + 1) N groups are
open and the trainer waits, fewer than m N while it updates. Nothing is ever dropped for its age.

That is a bound and no aim: where servers are faster than the trainer, a window kept full would have groups wait in it until
they are m pushes old. So nothing is admitted either while the open groups are expected to make `ahead` steps: one at first,
one more after each step that the trainer had to wait for, a tenth less after each that it found decided.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass

# The estimate of the acceptance rate weighs as much as this many observed groups when a step begins.
PRIOR_GROUPS = 32
MIN_RATE = 1e-3
# What a step adds to `ahead`: a wait costs seconds now, a step too many only age.
WAITED, READY = 1.0, -0.1


@dataclass(frozen=True)
class Step:
    """The groups `first <= index < end`; those of `kept`, ascending, are trained on. `exhausted` when they are too few."""

    first: int
    end: int
    kept: tuple[int, ...]
    exhausted: bool


class Window:
    """The groups that no step has passed yet, by index. A step passes at most `max_attempts` times N of them."""

    def __init__(self, max_staleness: int = 0, max_attempts: float = 10.0, acceptance_rate: float = 0.5) -> None:
        self.max_staleness, self.max_attempts = max_staleness, max_attempts
        self.acceptance_rate = acceptance_rate
        self.ahead = 1.0  # steps that the open groups are to make, if the bound on age allows it
        self.front = 0  # the first index that no step has passed
        self.next_index = 0
        self.taken = 0  # steps so far
        self.pushed = 0  # of them, those whose weights serve
        self.num_groups = self.limit = 0  # N; unknown before the first `begin`
        self._is_waited_for = False
        self._outcomes: dict[int, bool | None] = {}  # decided ones from `front` on: kept, rejected, aborted (None)
        self._kept: list[int] = []  # sorted
        self._undecided = 0  # every index before it is decided

    # ---------------------------------------------------------------- what happens

    def begin(self, num_groups: int) -> None:
        """The trainer waits for a step of `num_groups`; the weights of every step before it serve."""
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups} must be at least 1")
        if self.max_staleness and self.num_groups not in (0, num_groups):
            raise ValueError(f"num_groups={num_groups} must stay {self.num_groups}: it bounds the age of what is open")
        if self.max_staleness and self.num_groups:  # nothing could be decided for the first
            change = WAITED if self.decided() is None else READY
            self.ahead = min(max(self.ahead + change, 1.0), self.max_staleness + 1.0)
        self.num_groups, self.limit = num_groups, math.ceil(self.max_attempts * num_groups)
        self.pushed, self._is_waited_for = self.taken, True

    def admit(self) -> int:
        """A group is submitted; its index."""
        self.next_index += 1
        return self.next_index - 1

    def finish(self, index: int, outcome: bool | None) -> None:
        """A group is decided: kept, rejected, or None, aborted: rejected without a verdict."""
        assert index in range(self.front, self.next_index), f"group {index} was not admitted, or a step has passed it"
        assert index not in self._outcomes, f"group {index} is decided"
        self._outcomes[index] = outcome
        if outcome:
            bisect.insort(self._kept, index)
        while self._undecided in self._outcomes:
            self._undecided += 1

    def take(self) -> Step:
        """The trainer takes the step, which must be `decided`."""
        step = self.decided()
        assert step is not None, "the step is not decided"
        judged = sum(self._outcomes[index] is not None for index in range(step.first, step.end))
        self.acceptance_rate = smoothed(self.acceptance_rate, len(step.kept), judged)
        self.front, self.taken, self._is_waited_for = step.end, self.taken + 1, False
        if not self.max_staleness:
            self.forget()
        self._outcomes = {index: outcome for index, outcome in self._outcomes.items() if index >= step.end}
        del self._kept[: len(step.kept)]
        return step

    def forget(self) -> None:
        """All groups from the front on will be submitted anew."""
        self.next_index = self._undecided = self.front
        self._outcomes, self._kept = {}, []

    def restore(self, front: int, next_index: int, taken: int, outcomes: Mapping[int, bool | None]) -> None:
        """Go on where another window was; groups that `outcomes` lacks are running."""
        self.front = self._undecided = front
        self.next_index, self.taken, self.pushed = next_index, taken, taken
        self._outcomes, self._kept = {}, []
        for index, outcome in outcomes.items():
            self.finish(index, outcome)

    # ---------------------------------------------------------------- what follows from it

    @property
    def running(self) -> int:
        """Groups that are submitted and not decided."""
        return self.next_index - self.front - len(self._outcomes)

    @property
    def open(self) -> int:
        """Groups that a step will take or may yet take."""
        return self.running + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def finished(self) -> int:
        return len(self._outcomes)

    @property
    def expected(self) -> float:
        """Steps that the groups behind the front will make: by those that are, or may be, kept, or by those they pass."""
        kept = len(self._kept) + self.acceptance_rate * self.running
        return max(kept / self.num_groups, (self.next_index - self.front) / self.limit)

    @property
    def is_filled(self) -> bool:
        """Enough groups are kept for the step; earlier ones that still run may yet displace some."""
        return len(self._kept) >= self.num_groups and self._kept[self.num_groups - 1] < self.front + self.limit

    @property
    def end(self) -> int:
        """One past the last index that can enter the step, as far as it is known."""
        return self._kept[self.num_groups - 1] + 1 if self.is_filled else self.front + self.limit

    def admits(self) -> bool:
        """Whether another group may be submitted now."""
        if not self.num_groups:
            return False
        if self.max_staleness:
            return self.expected < self.ahead and self._age_of_next() <= self.max_staleness
        return self._is_waited_for and self.next_index < self.end and self.running < self._wanted()

    def decided(self) -> Step | None:
        """The step, once no outcome to come can change it."""
        if self._undecided < self.end:
            return None
        kept = self._kept[: bisect.bisect_left(self._kept, self.end)]
        return Step(self.front, self.end, tuple(kept), len(kept) < self.num_groups)

    def steps_before(self, open_groups: int, places: int) -> int:
        """How many steps come, at most, before the one of a group that is so far behind the front."""
        return open_groups // self.num_groups + places // self.limit

    def _age_of_next(self) -> int:
        """Pushes between the weights that serve now and those that train on the next group, at the latest."""
        steps = self.steps_before(self.open, self.next_index - self.front)
        return self.taken + steps - self.pushed

    def _wanted(self) -> int:
        """So many in flight are expected to bring what the step still lacks."""
        missing = self.num_groups - len(self._kept)
        return math.ceil(missing / smoothed(self.acceptance_rate, len(self._kept), len(self._outcomes)))


def smoothed(rate: float, kept: int, judged: int) -> float:
    """The acceptance rate after `kept` of `judged` more groups were kept; never 0, we divide by it."""
    return max((PRIOR_GROUPS * rate + kept) / (PRIOR_GROUPS + judged), MIN_RATE)
