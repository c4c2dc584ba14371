"""The window against a model that knows no time: thousands of random schedules with kills and resumes, and mutants."""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_dapo import window as module
from nemo_dapo.window import Step, Window

Outcome = Callable[[int], bool | None]


@dataclasses.dataclass(frozen=True)
class Course:
    """One random setting: what each group comes to, how long it takes, and what disturbs the run."""

    seed: int
    num_groups: int
    max_staleness: int
    max_attempts: float
    rate: float
    disturbed: bool = True
    update: float | None = None  # seconds of each; None: random ones

    @staticmethod
    def random(seed: int, max_staleness: int | None = None) -> Course:
        rng = random.Random(seed)
        m = rng.randrange(5) if max_staleness is None else max_staleness
        return Course(seed, rng.randint(1, 6), m, rng.choice([1.0, 1.5, 3.0, 10.0]), rng.choice([0.05, 0.2, 0.5, 0.9]))

    def outcome(self, index: int) -> bool | None:
        draw = random.Random(f"{self.seed} outcome {index}").random()
        return None if draw > 0.98 else draw < self.rate * 0.98

    def seconds(self, index: int, attempt: int) -> float:
        """Heavy-tailed, and longer the second time or shorter."""
        return random.Random(f"{self.seed} {index} {attempt}").lognormvariate(0, 1.5)


def sequential(course: Course, steps: int) -> list[Step]:
    """The steps of one who samples a group at a time and looks at each in order."""
    front, limit, found = 0, math.ceil(course.max_attempts * course.num_groups), []
    for _ in range(steps):
        kept: list[int] = []
        end = front
        while len(kept) < course.num_groups and end < front + limit:
            if course.outcome(end):
                kept.append(end)
            end += 1
        found.append(Step(front, end, tuple(kept), len(kept) < course.num_groups))
        front = end
    return found


class Run:
    """A trainer and servers on a clock of their own; the trainer is killed now and then and goes on from a checkpoint."""

    def __init__(self, course: Course, make: Callable[..., Any] = Window) -> None:
        self.course, self.make, self.rng = course, make, random.Random(course.seed)
        self.window = make(course.max_staleness, course.max_attempts)
        self.now, self.attempt, self.served = 0.0, 0, 0
        self.running: list[tuple[float, int]] = []
        self.admitted: dict[int, int] = {}  # index: the version that served then
        self.steps: list[Step] = []
        self.ages: list[int] = []
        self.most_open = 0
        self.checkpoint = self.saved()

    def go(self, steps: int) -> Run:
        while len(self.steps) < steps:
            self.served = len(self.steps)  # the push is over
            self.window.begin(self.course.num_groups)
            self.fill()
            while self.window.decided() is None:
                self.finish_next()
                if self.course.disturbed and self.rng.random() < 0.02:
                    self.kill()
            self.take()
            self.update(self.rng.lognormvariate(0, 1.5) if self.course.update is None else self.course.update)
            if self.rng.random() < 0.5:
                self.checkpoint = self.saved()
        return self

    def fill(self) -> None:
        while self.window.admits():
            index = self.window.admit()
            self.admitted[index] = self.served
            self.start(index)
        self.most_open = max(self.most_open, self.window.open)

    def start(self, index: int) -> None:
        heapq.heappush(self.running, (self.now + self.course.seconds(index, self.attempt), index))

    def finish_next(self) -> None:
        assert self.running, "deadlock: nothing runs and the step is not decided"
        self.now, index = heapq.heappop(self.running)
        self.window.finish(index, self.course.outcome(index))
        if not self.course.max_staleness and self.window.is_filled:
            self.running = [one for one in self.running if one[1] < self.window.end]
            heapq.heapify(self.running)
        self.fill()

    def take(self) -> None:
        step = self.window.take()
        self.ages += [len(self.steps) - self.admitted[index] for index in step.kept]
        self.steps.append(step)
        if not self.course.max_staleness:
            self.running = []
        self.fill()

    def update(self, seconds: float) -> None:
        end = self.now + seconds
        while self.running and self.running[0][0] <= end:
            self.finish_next()
        self.now = end

    def saved(self) -> tuple[Any, ...]:
        outcomes = dict(self.window._outcomes)
        return (
            (self.window.front, self.window.next_index, self.window.taken, outcomes),
            list(self.steps),
            list(self.ages),
        )

    def kill(self) -> None:
        state, self.steps, self.ages = self.checkpoint[0], list(self.checkpoint[1]), list(self.checkpoint[2])
        self.window, self.running, self.attempt = (
            self.make(self.course.max_staleness, self.course.max_attempts),
            [],
            self.attempt + 1,
        )
        self.window.restore(*state)
        for index in range(state[0], state[1]):
            if index not in state[3]:
                self.start(index)
        self.served = len(self.steps)
        self.window.begin(self.course.num_groups)
        self.fill()


def check(course: Course, make: Callable[..., Any] = Window, steps: int = 12) -> Run:
    run = Run(course, make).go(steps)
    assert run.steps == sequential(course, steps)
    passed = [index for step in run.steps for index in range(step.first, step.end)]
    assert passed == list(range(len(passed))), "each index is passed once, in order"
    assert max(run.ages, default=0) <= course.max_staleness
    return run


@pytest.mark.parametrize("part", range(4))
def test_whatever_the_timing_the_steps_are_those_of_the_sequential_model_and_no_group_is_too_old(part: int) -> None:
    for seed in range(part * 500, (part + 1) * 500):
        check(Course.random(seed))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_the_bound_on_age_is_reached_so_that_no_smaller_window_was_meant(m: int) -> None:
    runs = [check(Course(seed, 4, m, 10.0, 0.9, disturbed=False), steps=20) for seed in range(20)]
    assert max(max(run.ages) for run in runs) == m
    assert max(run.most_open for run in runs) == (m + 1) * 4


def test_where_few_groups_are_informative_the_bound_is_far_from_being_reached() -> None:
    """It supposes that all that runs will be kept: docs/algorithm.md has these figures."""

    def ages(rate: float, m: int) -> tuple[float, int]:
        found = check(Course(1, 16, m, 10.0, rate, disturbed=False), steps=80).ages[160:]
        return sum(found) / len(found), max(found)

    few, many = ages(0.2, 4), ages(0.8, 4)
    assert few == (pytest.approx(2.24, abs=0.005), 3)
    assert many == (pytest.approx(3.86, abs=0.005), 4)


class Full(Window):
    """Filled up to its bound on age, however many steps are decided."""

    expected = 0.0


def test_where_servers_are_faster_than_the_trainer_groups_are_not_begun_long_before_their_step() -> None:
    course = Course(1, 8, 4, 10.0, 0.6, disturbed=False, update=60.0)

    def age(make: Callable[..., Any]) -> float:
        ages = check(course, make, steps=60).ages[240:]
        return sum(ages) / len(ages)

    assert age(Full) == pytest.approx(4, abs=0.05)
    assert age(Window) == pytest.approx(1.39, abs=0.005)  # docs/algorithm.md has it


@pytest.mark.parametrize("update", [0.1, 1.0, 5.0])
def test_where_the_trainer_is_faster_than_the_servers_no_step_comes_later_than_by_a_full_window(update: float) -> None:
    def seconds(make: Callable[..., Any]) -> float:
        """From the tenth step on, by when the window aims at all that it may."""
        run = Run(Course(3, 8, 4, 10.0, 0.6, disturbed=False, update=update), make).go(10)
        began = run.now
        return run.go(60).now - began

    assert seconds(Window) == pytest.approx(seconds(Full), rel=0.002)


def test_one_more_step_is_aimed_at_after_each_that_was_waited_for_and_less_after_each_that_was_not() -> None:
    window, found = Window(2), []
    for waited in [True, True, True, True, False, False, True]:
        if waited:
            window.begin(1)
        while window.next_index < window.front + 3:
            window.finish(window.admit(), True)
        if not waited:
            window.begin(1)
        window.take()
        window.forget()
        found.append(window.ahead)
    assert found == pytest.approx([1, 2, 3, 3, 2.9, 2.8, 3])


def test_groups_that_no_step_can_train_on_make_steps_too() -> None:
    window = Window(4, max_attempts=2.0)
    window.begin(2)
    for _ in range(4):
        assert window.admits()
        window.finish(window.admit(), False)
    assert (window.expected, window.admits()) == (1, False)
    window.take()
    assert window.admits()


def test_without_staleness_nothing_runs_between_two_steps() -> None:
    window = Window(0)
    window.begin(2)
    indices = [window.admit() for _ in range(4)]
    assert not window.admits()  # 2 / 0.5
    for index in indices[:2]:
        window.finish(index, True)
    window.take()
    assert (window.front, window.next_index, window.running) == (2, 2, 0)
    assert not window.admits()


def test_during_an_update_a_rejected_group_frees_its_place_and_a_kept_one_does_not() -> None:
    window = Window(1)
    window.begin(2)
    while window.admits():
        window.admit()
    assert window.open == 4  # (m + 1) N
    window.finish(0, True)
    window.finish(1, True)
    window.take()
    assert (window.open, window.admits()) == (2, False)  # m N
    window.finish(2, True)
    assert not window.admits()
    window.finish(3, False)
    assert window.admits()


def test_the_size_of_a_step_cannot_change_under_open_groups() -> None:
    window = Window(1)
    window.begin(2)
    with pytest.raises(ValueError, match="num_groups=3 must stay 2"):
        window.begin(3)


# Lengths: a group's seconds stand for the length of its answers, and say nothing of whether it is informative.


def lengths(course: Course, accepted: list[int], sampled: int) -> tuple[float, float]:
    """Mean seconds of the groups trained on, and of all informative ones among the first `sampled`."""
    informative = [course.seconds(index, 0) for index in range(sampled) if course.outcome(index)]
    return sum(course.seconds(i, 0) for i in accepted) / len(accepted), sum(informative) / len(informative)


def first_finished(course: Course, steps: int) -> tuple[list[int], int]:
    """As most trainers do it: of 4 N groups, a step is the first N informative ones to finish; the rest is thrown away."""
    accepted, size = [], 4 * course.num_groups
    for step in range(steps):
        by_time = sorted(range(step * size, (step + 1) * size), key=lambda index: course.seconds(index, 0))
        accepted += [index for index in by_time if course.outcome(index)][: course.num_groups]
    return accepted, steps * size


@pytest.mark.parametrize("m", [0, 1, 4, None])
def test_accepted_answers_are_as_long_as_all_informative_ones_unless_the_first_to_finish_are_taken(
    m: int | None,
) -> None:
    course = Course(3, 8, m or 0, 10.0, 0.4, disturbed=False)
    if m is None:
        mean, of_all = lengths(course, *first_finished(course, 60))
        assert mean < 0.8 * of_all
        return
    steps = Run(course).go(60).steps
    mean, of_all = lengths(course, [index for step in steps for index in step.kept], steps[-1].end)
    assert mean == pytest.approx(of_all)  # the very same groups


# Mutants


SOURCE = Path(module.__file__).read_text()
MUTANTS = {
    "places of a step": ("open_groups // self.num_groups + ", ""),
    "one more": (
        "return self._age_of_next() <= self.max_staleness",
        "return self._age_of_next() - 1 <= self.max_staleness",
    ),
    "no push": ("return self.taken + steps - self.pushed", "return steps"),
    "no passing": (" + places // self.limit", ""),
    "a kept group takes no place": ("return self.running + len(self._kept)", "return self.running"),
    "a running group takes no place": ("return self.running + len(self._kept)", "return len(self._kept)"),
    "not in order": ("bisect.insort(self._kept, index)", "self._kept.append(index)"),
    "earlier ones are not waited for": (
        "if self._undecided < self.end:",
        "if not self.is_filled and self._undecided < self.end:",
    ),
    "beyond the limit": (" and self._kept[self.num_groups - 1] < self.front + self.limit", ""),
    "one too many": ("self._kept[self.num_groups - 1] + 1 if", "self._kept[self.num_groups - 1] + 2 if"),
    "kept twice": ("del self._kept[: len(step.kept)]", "pass"),
    "surplus stays": ("if not self.max_staleness:\n            self.forget()", "pass"),
    "aborted ones count": ("        if outcome:\n", "        if outcome is not False:\n"),
    "never more ahead": ("change = WAITED", "change = READY"),
    "all that run will be kept": ("self.acceptance_rate * self.running", "self.running"),
    "restored as pushed": ("taken, taken", "taken, 0"),
}


def mutant(old: str, new: str) -> Any:
    assert SOURCE.count(old) >= 1, f"{old!r} is not there any more"
    namespace: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(SOURCE.replace(old, new), "mutant", "exec"), namespace)
    return namespace["Window"]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_window_is_found_out(name: str) -> None:
    with pytest.raises((AssertionError, IndexError, KeyError)):
        check_all(mutant(*MUTANTS[name]))


def check_all(make: Callable[..., Any]) -> None:
    for seed in range(300):
        check(Course.random(seed), make)
    for m in (1, 2):
        assert max(check(Course(1, 4, m, 10.0, 0.9, disturbed=False), make).ages) == m


def test_the_window_itself_is_not_found_out() -> None:
    check_all(Window)
