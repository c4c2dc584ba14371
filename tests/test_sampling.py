"""Dynamic sampling against a scripted engine, on a clock that jumps: seconds pass at once and always in the same order."""

from __future__ import annotations

import asyncio
import json
import random
import re
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from nemo_dapo.collected import Collected, DropReason, judge
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.stopping import check_verifier
from nemo_dapo.types import Draft, Group, Prompt, Sample, SamplingParams, Verdict
from nemo_dapo.window import PRIOR_GROUPS
from tests.fakes import FakeEngine, FakeLoader

G = 4
T = TypeVar("T")


class JumpingSelector(selectors.SelectSelector):
    """Instead of sleeping until the next timer, moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None):
        assert timeout is not None, "deadlock: the loop waits for nothing that has a deadline"
        self.now += max(timeout, 0.0)
        return super().select(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    selector = JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


@dataclass
class Engine(FakeEngine):
    """Problem i takes `latency(i)` seconds, `length(i)` tokens a sample, and has `num_correct(i)` right answers of G."""

    num_correct: Callable[[int], int]
    latency: Callable[[int], float] = lambda i: 1.0 + 1e-6 * i  # as good as equal, in order
    length: Callable[[int], int] = lambda i: 3
    finish_reason: Callable[[int], str] = lambda i: "stop"
    errors: Callable[[int], int] = lambda i: 0
    fail: Callable[[int, int], BaseException | None] = lambda i, attempt: None
    started: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    in_flight: int = 0

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        i = prompt.metadata["i"]
        self.started.append(i)
        self.in_flight += 1
        try:
            await asyncio.sleep(self.latency(i))
            if (error := self.fail(i, self.started.count(i))) is not None:
                raise error
        except asyncio.CancelledError:
            self.cancelled.append(i)
            raise
        finally:
            self.in_flight -= 1
        self.finished.append(i)
        tokens = tuple(range(self.length(i)))
        return [Sample(tokens, (0.0,) * len(tokens), self.finish_reason(i)) for _ in range(n)]

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        i = prompt.metadata["i"]
        verdicts = [Verdict(k < self.num_correct(i)) for k in range(len(samples))]
        broken = [Verdict(False, error="verifier timed out") for _ in range(self.errors(i))]
        return broken + verdicts[len(broken) :]


def make(engine: Engine, **options: Any) -> GroupSampler:
    usual: dict[str, Any] = {"loader": FakeLoader(), "group_size": G, "params": SamplingParams(max_tokens=8)}
    return GroupSampler(engine, engine, **(usual | options))


def indices(collected: Collected) -> list[int]:
    return [g.prompt.metadata["i"] for g in collected.groups]


def dropped(collected: Collected, reason: DropReason) -> list[int]:
    return [d.prompt.metadata["i"] for d in collected.dropped if d.reason is reason]


def scripted(outcomes: str) -> Callable[[int], int]:
    """One character a problem, repeated: w all wrong, r all right, k mixed."""
    return lambda i: {"w": 0, "k": 2, "r": G}[outcomes[i % len(outcomes)]]


def random_latency(seed: int) -> Callable[[int], float]:
    rng = random.Random(seed)
    times: dict[int, float] = {}
    return lambda i: times.setdefault(i, rng.expovariate(0.1))


# What is kept


@pytest.mark.parametrize(
    ("num_correct", "expected"),
    [(0, DropReason.all_wrong), (1, None), (G - 1, None), (G, DropReason.all_right)],
)
def test_a_group_is_kept_when_some_but_not_all_of_it_is_right(num_correct: int, expected: DropReason | None) -> None:
    samples = tuple(Sample((1,), (0.0,), "stop") for _ in range(G))
    verdicts = tuple(Verdict(k < num_correct) for k in range(G))
    group = Group(FakeLoader().next(), samples, verdicts)
    assert judge(group, dynamic_sampling=True) is expected
    assert judge(group, dynamic_sampling=False) is None


def test_the_batch_is_the_first_informative_groups_and_the_rest_is_named() -> None:
    collected = run(make(Engine(scripted("wkkrkwkk"))).collect(3))
    assert indices(collected) == [1, 2, 4]
    assert [g.index for g in collected.groups] == [1, 2, 4]
    assert dropped(collected, DropReason.all_wrong) == [0]
    assert dropped(collected, DropReason.all_right) == [3]
    assert dropped(collected, DropReason.surplus) == [5, 6, 7]  # 3 needed at a rate of 16 / 33: 7 in flight
    assert not collected.exhausted


def test_a_verifier_error_drops_the_group_and_is_counted_apart() -> None:
    engine = Engine(scripted("k"), errors=lambda i: int(i == 1))
    collected = run(make(engine).collect(2))
    assert indices(collected) == [0, 2]
    assert dropped(collected, DropReason.verifier_error) == [1]
    assert collected.metrics()["rollout/dropped_verifier_error"] == 1


def test_without_dynamic_sampling_every_group_is_kept_and_none_is_sampled_twice() -> None:
    engine = Engine(scripted("wkr"))
    collected = run(make(engine, dynamic_sampling=False).collect(6))
    assert indices(collected) == engine.started == [0, 1, 2, 3, 4, 5]
    assert collected.dropped == ()


def test_without_dynamic_sampling_a_verifier_error_is_still_replaced() -> None:
    collected = run(make(Engine(scripted("w"), errors=lambda i: int(i == 0)), dynamic_sampling=False).collect(3))
    assert indices(collected) == [1, 2, 3]
    assert dropped(collected, DropReason.verifier_error) == [0]


def test_an_aborted_group_is_dropped_and_its_prompt_comes_first_in_the_next_step() -> None:
    engine = Engine(
        scripted("k"), finish_reason=lambda i: "abort" if i == 1 and engine.started.count(1) == 1 else "stop"
    )
    sampler = make(engine)
    first = run(sampler.collect(2))
    assert indices(first) == [0, 2]
    assert dropped(first, DropReason.aborted) == [1]
    assert indices(run(sampler.collect(2))) == [1, 3]


# When nothing can be learned


def test_a_verifier_that_always_fails_stops_the_step_as_soon_as_its_first_groups_show_it() -> None:
    engine = Engine(scripted("k"), errors=lambda i: G)
    sampler = make(engine, max_error_rate=0.5)
    with pytest.raises(RuntimeError, match=r"failed on 16 of 16 samples.*max_error_rate=0\.5.*16 x verifier timed out"):
        run(sampler.collect(4))
    assert len(engine.finished) < 40, "not all of the ten times four attempts"
    assert sampler.window.next_index == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("errors_every", "stops"), [(2, True), (3, False)])
def test_a_share_of_errors_above_the_limit_stops_the_run_whatever_the_timing(
    errors_every: int, stops: bool, seed: int
) -> None:
    """Every second (third) problem fails on 3 of 4 samples: 3/8 and 1/4 of all samples."""
    engine = Engine(scripted("k"), random_latency(seed), errors=lambda i: 3 * (i % errors_every == 0))
    sampler = make(engine, max_error_rate=0.3)
    if stops:
        with pytest.raises(RuntimeError, match=r"the verifier failed on 45 of 120 samples"):
            run(sampler.collect(15))  # positions 0, 2, ..., 28 fail: 15 of 30
    else:
        assert len(run(sampler.collect(15)).groups) == 15


def test_an_error_rate_of_one_never_stops_a_run() -> None:
    collected = run(make(Engine(scripted("k"), errors=lambda i: G), max_error_rate=1.0).collect(2))
    assert collected.groups == ()
    assert collected.metrics()["rollout/verifier_errors"] == 20 * G


def test_what_an_error_text_holds_cannot_steer_the_terminal_it_is_shown_on() -> None:
    samples = tuple(Sample((1,), (0.0,), "stop") for _ in range(G))
    group = Group(FakeLoader().next(), samples, (Verdict(False, error="bad \x1b[2J\u202e" + "x" * 10_000),) * G)
    with pytest.raises(RuntimeError) as stopped:
        check_verifier([group], 0.5)
    assert r"bad \x1b[2J\u202e" in str(stopped.value)
    assert len(str(stopped.value)) < 1000


@pytest.mark.parametrize(
    ("outcomes", "errors", "words", "remedy"),
    [
        ("w", 0, "20 all wrong, 0 all right, 0 verifier error, 0 aborted", "read some responses"),
        ("rrrw", 0, "5 all wrong, 15 all right, 0 verifier error, 0 aborted", "take harder ones"),
        ("w", 1, "0 all wrong, 0 all right, 20 verifier error, 0 aborted", "mend the reward"),
    ],
)
def test_steps_in_a_row_without_a_group_to_train_on_stop_the_run_and_say_why(
    outcomes: str, errors: int, words: str, remedy: str
) -> None:
    sampler = make(Engine(scripted(outcomes), errors=lambda i: errors), max_empty_steps=3)
    assert [run(sampler.collect(2)).groups for _ in range(2)] == [(), ()]
    with pytest.raises(RuntimeError, match=r"3 steps in a row had no group to train on") as stopped:
        run(sampler.collect(2))
    assert words in str(stopped.value)
    assert remedy in str(stopped.value)


def test_empty_steps_count_in_a_row_only_and_through_a_resume() -> None:
    engine = Engine(lambda i: 2 if i in (20, 21) else 0)  # the second step of 2 x 10 attempts finds its two groups
    sampler = make(engine, max_empty_steps=2)
    assert [len(run(sampler.collect(2)).groups) for _ in range(3)] == [0, 2, 0]
    resumed = make(engine, max_empty_steps=2)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        run(resumed.collect(2))


def test_a_checkpoint_without_the_count_of_empty_steps_is_read() -> None:
    state = make(Engine(scripted("k"))).state_dict()
    del state["counters"]["empty_steps_in_a_row"]
    sampler = make(Engine(scripted("w")), max_empty_steps=1)
    sampler.load_state_dict(state)
    with pytest.raises(RuntimeError, match="1 steps in a row"):
        run(sampler.collect(1))


@pytest.mark.parametrize(("outcomes", "words"), [("kwww", "training on those"), ("w", "no update in this step")])
def test_training_on_those_is_said_only_of_some(outcomes: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    run(make(Engine(scripted(outcomes)), max_attempts=1).collect(4))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(words)


# Order and determinism


@pytest.mark.parametrize("seed", range(8))
def test_the_batches_do_not_depend_on_timing(seed: int) -> None:
    def course(latency: Callable[[int], float]) -> list[tuple]:
        sampler, steps = make(Engine(scripted("wkkrrkwrkwwkr"), latency)), []
        for _ in range(5):
            c = run(sampler.collect(4))
            judged_drops = [(d.index, d.prompt.uid, d.reason) for d in c.dropped if d.reason is not DropReason.surplus]
            groups = [(g.index, g.prompt.uid) for g in c.groups]
            steps.append(
                (
                    groups,
                    judged_drops,
                    sampler.window.next_index,
                    sampler.window.acceptance_rate,
                    dict(sampler.counters),
                )
            )
        return steps

    assert course(random_latency(seed)) == course(lambda i: 1.0)


def test_slow_long_answers_enter_the_batch_as_often_as_fast_short_ones() -> None:
    # Odd problems take 50 times as long and answer at length. By order of finishing, no odd one would be kept.
    engine = Engine(scripted("kkw"), latency=lambda i: 50.0 if i % 2 else 1.0, length=lambda i: 8 if i % 2 else 2)
    collected = run(make(engine).collect(8))
    assert indices(collected) == [0, 1, 3, 4, 6, 7, 9, 10]
    record = collected.metrics()
    assert record["rollout/mean_length_kept"] == 5.0
    assert record["rollout/mean_length"] == pytest.approx((6 * 2 + 5 * 8) / 11)  # problems 0 to 10


def test_nothing_is_awaited_that_cannot_enter_the_batch() -> None:
    # 0 and 1 are in after 1 s; problem 2 would take an hour and is cancelled at once.
    engine = Engine(scripted("k"), latency=lambda i: 3600.0 if i >= 2 else 1.0)
    collected = run(make(engine).collect(2))
    assert collected.seconds == pytest.approx(1.0)
    assert engine.cancelled == [2, 3]


def test_an_early_slow_group_is_awaited_and_the_wait_is_reported() -> None:
    engine = Engine(scripted("k"), latency=lambda i: 10.0 if i == 0 else 1.0)
    collected = run(make(engine).collect(2))
    assert indices(collected) == [0, 1]
    assert collected.tail_seconds == pytest.approx(9.0)
    assert collected.seconds == pytest.approx(10.0)


# Keeping the servers full


def test_enough_is_in_flight_to_cover_the_expected_need() -> None:
    # After every finished group: expected acceptances of what is in flight >= what is missing.
    n, checked = 8, 0
    engine = Engine(scripted("wwwk"), random_latency(0))
    sampler = make(engine)

    async def check(accepted: int, sampled: int) -> None:
        nonlocal checked
        rate = (PRIOR_GROUPS * 0.5 + accepted) / (PRIOR_GROUPS + sampled)
        await asyncio.sleep(0)  # the sampler submits
        await asyncio.sleep(0)  # the submitted groups reach the engine
        assert engine.in_flight * rate >= n - accepted
        checked += 1

    tasks: list[asyncio.Task] = []
    sampler.on_progress = lambda accepted, sampled: tasks.append(asyncio.create_task(check(accepted, sampled)))

    async def main() -> Collected:
        collected = await sampler.collect(n)
        await asyncio.gather(*tasks)
        return collected

    assert len(run(main()).groups) == n
    assert checked > n


def test_one_slow_group_does_not_starve_the_servers() -> None:
    # Judging in order must not mean waiting in order: while problem 0 runs, the others are sampled, judged and replaced.
    engine = Engine(scripted("wwwk"), latency=lambda i: 1000.0 if i == 0 else 1.0)
    collected = run(make(engine).collect(8))
    assert len(collected.groups) == 8
    assert collected.tail_seconds > 900.0


def test_the_estimate_follows_the_acceptance_rate_and_saves_surplus() -> None:
    engine = Engine(scripted("kkkkkkkkkw"))
    sampler = make(engine)
    surplus = [run(sampler.collect(16)).count(DropReason.surplus) for _ in range(12)]
    assert sampler.window.acceptance_rate == pytest.approx(0.9, abs=0.05)
    assert surplus[0] >= 14  # 32 in flight on the prior of one half; 17 or 18 are needed
    assert max(surplus[-3:]) <= 3


def test_progress_reports_accepted_and_sampled() -> None:
    seen: list[tuple[int, int]] = []
    run(make(Engine(scripted("wk")), on_progress=lambda *counts: seen.append(counts)).collect(2))
    assert seen == [(0, 1), (1, 2), (1, 3), (2, 4)]


# The bound


def test_the_bound_ends_the_step_with_what_it_has() -> None:
    engine = Engine(scripted("wwwwwwwk"))
    collected = run(make(engine, max_attempts=3.0).collect(4))
    assert collected.exhausted
    assert indices(collected) == [7]
    assert engine.started == list(range(12))
    assert collected.metrics()["rollout/exhausted"] == 1.0


def test_a_step_without_one_informative_group_is_empty_and_never_crashes() -> None:
    sampler = make(Engine(scripted("wr")), max_attempts=2.0)
    sampler.load_state_dict(sampler.state_dict() | {"acceptance_rate": 5e-324})  # where thousands of such steps lead
    for _ in range(3):
        collected = run(sampler.collect(2))
        assert collected.groups == ()
        assert collected.exhausted
    assert collected.count(DropReason.all_wrong) == collected.count(DropReason.all_right) == 2
    assert sampler.counters == {
        "groups_judged": 12,
        "groups_kept": 0,
        "steps_exhausted": 3,
        "empty_steps_in_a_row": 3,
    }
    assert all(value == value for name, value in collected.metrics().items() if name != "rollout/mean_length_kept")


# Surplus


def test_no_problem_is_lost_and_none_is_judged_twice() -> None:
    sampler = make(Engine(scripted("kwkkr"), random_latency(3)))
    judged: list[int] = []
    for _ in range(10):
        judged += sorted(g.prompt.metadata["i"] for g in run(sampler.collect(3)).judged)
    assert judged == list(range(len(judged)))


def test_surplus_keeps_its_place_when_a_smaller_step_leaves_some_of_it() -> None:
    sampler = make(Engine(scripted("k")))
    assert [indices(run(sampler.collect(n))) for n in (8, 1, 3)] == [[*range(8)], [8], [9, 10, 11]]


def test_cancelled_and_finished_surplus_are_both_counted() -> None:
    # 8 in flight for 4; problem 3 is slow, so 4 to 6 finish before it is decided; 7 is slower still and is cancelled.
    engine = Engine(scripted("kkwk" + "wwwk"), latency=lambda i: {3: 5.0, 7: 9.0}.get(i, 1.0), length=lambda i: 2)
    collected = run(make(engine).collect(3))
    assert indices(collected) == [0, 1, 3]
    assert dropped(collected, DropReason.surplus) == [4, 5, 6, *range(7, len(engine.started))]
    by_index = {d.index: d.group for d in collected.dropped}
    assert by_index[4] is not None
    assert by_index[7] is None
    assert collected.kept_tokens == 3 * G * 2
    assert collected.generated_tokens == len(engine.finished) * G * 2


# Errors and deadlines


def test_an_engine_failure_names_the_prompt_and_ends_the_others() -> None:
    engine = Engine(
        scripted("k"),
        latency=lambda i: 1.0 + i,
        fail=lambda i, attempt: ValueError("no such adapter") if i == 1 else None,
    )
    with pytest.raises(RuntimeError, match="prompt p1 failed: ValueError: no such adapter"):
        run(make(engine).collect(3))
    assert engine.in_flight == 0
    assert engine.cancelled == [2, 3, 4, 5]


def test_a_lost_connection_is_tried_again() -> None:
    engine = Engine(scripted("k"), fail=lambda i, n: ConnectionError("server died") if (i, n) == (1, 1) else None)
    assert indices(run(make(engine).collect(3))) == [0, 1, 2]
    assert engine.started.count(1) == 2


def test_a_connection_lost_for_good_names_the_prompt() -> None:
    engine = Engine(scripted("k"), fail=lambda i, n: ConnectionError("server died") if i == 1 else None)
    with pytest.raises(RuntimeError, match="prompt p1 failed: ConnectionError: server died"):
        run(make(engine, retries=2).collect(3))
    assert engine.started.count(1) == 3


def test_after_a_failure_the_same_prompts_come_again() -> None:
    broken = True
    engine = Engine(scripted("wk"), fail=lambda i, n: ValueError("out of memory") if broken and i == 3 else None)
    sampler = make(engine)
    with pytest.raises(RuntimeError):
        run(sampler.collect(2))
    broken = False
    collected = run(sampler.collect(2))
    assert [(g.index, g.prompt.uid) for g in collected.groups] == [(1, "p1"), (3, "p3")]


def test_a_silent_engine_is_reported_with_the_pending_prompts() -> None:
    engine = Engine(scripted("k"), latency=lambda i: 1e9 if i == 1 else 1.0)
    said = "no group finished for 600 s; waiting for 1 prompts: p1: see the servers' logs"
    with pytest.raises(TimeoutError, match=re.escape(said)):
        run(make(engine, timeout=600.0).collect(4))
    assert engine.in_flight == 0


def test_many_pending_prompts_are_named_in_short() -> None:
    with pytest.raises(TimeoutError, match=re.escape("12 prompts: p0, p1, p2, p3, p4, p5, p6, p7, ...")):
        run(make(Engine(scripted("k"), latency=lambda i: 1e9)).collect(6))


def test_a_group_that_ignores_cancellation_is_reported() -> None:
    engine = Engine(scripted("k"))
    generate = engine.generate

    async def stubborn(prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()) -> list[Sample]:
        if prompt.uid != "p2":
            return await generate(prompt, n, params)
        try:
            await asyncio.sleep(50.0)
        finally:
            await asyncio.sleep(1e9)
        return []

    engine.generate = stubborn  # type: ignore[method-assign]
    with pytest.raises(TimeoutError, match="cancelled groups did not end within 60 s: 1 prompts: p2"):
        run(make(engine).collect(2))


def test_an_engine_that_cancels_a_group_by_itself_does_not_hang_the_step() -> None:
    engine = Engine(scripted("k"), fail=lambda i, n: asyncio.CancelledError() if i == 1 else None)
    with pytest.raises(RuntimeError, match="prompt p1 was cancelled by the engine"):
        run(make(engine).collect(2))


def test_a_wrong_number_of_samples_or_verdicts_is_refused() -> None:
    engine = Engine(scripted("k"))
    generate, score = engine.generate, engine.score

    async def two(prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()) -> list[Sample]:
        return await generate(prompt, 2, params)

    async def three(prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        return (await score(prompt, samples))[:3]

    engine.score = three  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="p0 failed: ValueError: the rewarder returned 3 verdicts for 4 samples"):
        run(make(engine).collect(1))
    engine.generate = two  # type: ignore[method-assign]
    with pytest.raises(
        RuntimeError, match="p0 failed: ValueError: the engine returned 2 samples, expected group_size=4"
    ):
        run(make(engine).collect(1))


@pytest.mark.parametrize("turns", range(5))
def test_a_step_that_is_cancelled_as_a_group_ends_is_cancelled(turns: int) -> None:
    """A stop that is forgotten is waited for a minute, longer than torchrun does before it kills."""

    async def course() -> bool:
        sampler = make(Engine(scripted("k"), latency=lambda i: 1.0 if i == 0 else 1e5), timeout=1e6)
        step = asyncio.create_task(sampler.collect(4))
        await asyncio.sleep(0.5)
        assert sampler._wait is not None
        sampler._wait.news.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        step.cancel()
        ended, _ = await asyncio.wait({step}, timeout=60.0)
        step.cancel()
        await asyncio.wait({step})
        return bool(ended)

    assert run(course())


@pytest.mark.parametrize(("options", "num_groups"), [({"max_attempts": 0.5}, 4), ({}, 0)])
def test_senseless_sizes_are_refused(options: dict[str, Any], num_groups: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        run(make(Engine(scripted("k")), **options).collect(num_groups))


# State


def test_a_restored_sampler_goes_on_exactly_where_the_other_was() -> None:
    script = scripted("wkkrrkwrkwwkr")
    loader = FakeLoader()
    sampler = make(Engine(script, random_latency(1)), loader=loader)
    for _ in range(2):
        run(sampler.collect(4))
    state = json.loads(json.dumps({"sampler": sampler.state_dict(), "loader": loader.state_dict()}))
    assert state["sampler"]["pending"], "the test needs prompts that were taken and not judged"
    expected = [run(sampler.collect(4)).groups for _ in range(3)]

    loader = FakeLoader()
    loader.load_state_dict(state["loader"])
    restored = make(Engine(script, random_latency(2)), loader=loader)
    restored.load_state_dict(state["sampler"])
    assert [run(restored.collect(4)).groups for _ in range(3)] == expected
    assert restored.counters == sampler.counters
    assert restored.window.acceptance_rate == sampler.window.acceptance_rate


def test_one_sampler_serves_many_event_loops() -> None:
    sampler = make(Engine(scripted("kw")))
    assert [indices(asyncio.run(sampler.collect(1))) for _ in range(2)] == [[0], [2]]
