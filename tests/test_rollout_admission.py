"""How many samples a server may have open, by what it says of its cache: rules one by one, then over simulated hours."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from nemo_dapo.rollout import admission
from nemo_dapo.rollout.admission import DOUBLING_SECONDS, Admission, Reading
from nemo_dapo.rollout.fleet import Fleet
from tests.stand_in_server import StandInServers

CEILING, TARGET = 1024, 0.85

SAID = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
vllm:num_requests_running{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} 7.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="x"} 100.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1000.0
vllm:cache_config_info{block_size="16",engine="0",kv_cache_max_concurrency="37.5",num_gpu_blocks="99"} 1.0
"""


def test_what_vllm_says_is_read() -> None:
    assert admission.read(SAID) == Reading(1100.0, 0.25, 3.0, 7.0, 37.5)


def test_of_two_engines_behind_one_address_the_fuller_counts_and_the_rest_is_summed() -> None:
    other = SAID.replace('engine="0"', 'engine="1"').replace("0.25", "0.5")
    assert admission.read(SAID + other) == Reading(2200.0, 0.5, 6.0, 14.0, 75.0)


@pytest.mark.parametrize("text", ["", "<html>", "vllm:kv_cache_usage_perc{} x", "vllm:kv_cache_usage_perc{} nan"])
def test_what_says_nothing_reads_as_nothing(text: str) -> None:
    assert admission.read(text) == Reading()


def begun(longest_fit: float | None = 40.0) -> Admission:
    one = Admission(CEILING, TARGET)
    one.begin(Reading(0.0, 0.0, longest_fit=longest_fit))
    return one


def look(one: Admission, use: float | None, **said: float) -> int:
    """A minute passes, the limit was reached and more is wanted, unless said otherwise; returns the limit."""
    reading = Reading(0.0, use, said.get("waiting", 0.0), said.get("preemptions", 0.0))
    load, finished = int(said.get("load", one.limit)), int(said.get("finished", 0))
    one.observe(reading, load=load, finished=finished, seconds=DOUBLING_SECONDS, is_wanted=bool(said.get("wanted", 1)))
    return one.limit


def test_the_ceiling_holds_where_a_server_says_nothing() -> None:
    one = Admission(CEILING, TARGET)
    one.begin(Reading())
    assert look(one, None) == CEILING


@pytest.mark.parametrize(("longest_fit", "start"), [(40.0, 80), (None, 64), (900.0, CEILING), (0.4, 1)])
def test_it_starts_at_twice_the_longest_answers_that_fit_within_the_ceiling(longest_fit: float, start: int) -> None:
    assert begun(longest_fit).limit == start


def test_it_doubles_each_minute_while_the_cache_was_never_full() -> None:
    one = begun()
    assert [look(one, use) for use in (0.0, 0.3, 0.6, 0.7, 0.8)] == [160, 320, 640, CEILING, CEILING]


@pytest.mark.parametrize("said", [{"use": 0.9}, {"use": 0.1, "waiting": 1}, {"use": 0.1, "wanted": 0}])
def test_it_stays_while_the_cache_is_full_enough_or_something_waits_or_nothing_is_wanted(
    said: dict[str, float],
) -> None:
    assert look(begun(), **said) == 80


def test_once_the_cache_was_full_only_finished_samples_make_room() -> None:
    one = begun()
    look(one, 0.9)
    assert look(one, 0.1) == 80
    assert look(one, 0.1, finished=20) == 82


def test_preemption_cuts_once_until_the_cut_has_taken_effect_and_never_below_what_always_fits() -> None:
    one = begun(40.0)
    assert look(one, 0.99, preemptions=3) == 60
    assert look(one, 0.99, preemptions=9, load=75) == 60
    assert look(one, 0.99, preemptions=9, load=60) == 60  # no new one
    assert look(one, 0.99, preemptions=10, load=60) == 45
    assert look(one, 0.99, preemptions=11, load=45) == 40


def test_a_restarted_server_keeps_the_limit_that_was_found_and_counts_anew() -> None:
    one = begun()
    assert look(one, 0.9, preemptions=50) == 60
    one.begin(Reading(0.0, 0.0, longest_fit=40.0))
    assert look(one, 0.9, load=60) == 60
    assert look(one, 0.9, preemptions=1, load=60) == 45
    assert one.take_seen().preemptions == 51


def test_pressure_is_what_the_last_look_saw_and_a_share_for_what_was_sent_since() -> None:
    one = begun()
    assert one.pressure(40) == pytest.approx(TARGET / 2)  # half of the limit is expected to fill half of the target
    look(one, 0.6, load=40, wanted=0)
    assert one.pressure(48) == pytest.approx(0.6 + TARGET / 10)
    one.rest()
    assert one.pressure(0) == 0.0


def test_the_server_with_the_emptier_cache_is_sent_the_next_samples_though_it_has_more_of_them() -> None:
    async def scenario() -> None:
        fleet = Fleet(2, 64, StandInServers(*"ab"), lambda i, f: None, cache_target=TARGET)
        for _ in range(4):
            await fleet.take(4)
        fleet.members[1].load += 4
        for member, use in zip(fleet.members, (0.7, 0.2), strict=True):
            fleet._admit(member, Reading(1.0, use), 0, 1.0)
        assert (await fleet.take(4)).index == 1

    asyncio.run(scenario())


@dataclass
class Simulated:
    """A server of `capacity` tokens: open samples grow 40 tokens a second; what does not fit is preempted, newest first."""

    capacity: float
    mean: float
    random: random.Random = field(default_factory=lambda: random.Random(0))
    open: list[list[float]] = field(default_factory=list)  # [tokens, final length]; in the order of their submission
    preempted: list[list[float]] = field(default_factory=list)
    preemptions = finished = 0

    def second(self, limit: int) -> Reading:
        while len(self.open) + len(self.preempted) < limit:
            self.open.append([0.0, min(self.random.expovariate(1 / self.mean), 20480.0)])
        for one in self.open:
            one[0] += 40
        ended = [one for one in self.open if one[0] >= one[1]]
        self.open = [one for one in self.open if one[0] < one[1]]
        while sum(one[0] for one in self.open) > self.capacity:
            self.preempted.insert(0, self.open.pop())
            self.preemptions += 1
        held = sum(one[0] for one in self.open)
        while self.preempted and held + self.preempted[0][0] + 40 * len(self.open) < self.capacity:
            held += self.preempted[0][0]
            self.open.append(self.preempted.pop(0))
        self.finished = len(ended)
        return Reading(0.0, held / self.capacity, len(self.preempted), self.preemptions, self.capacity / 22528)


def an_hour(server: Simulated, fixed: int | None = None) -> tuple[float, float]:
    """Mean use of the cache after the first third, and preemptions a finished sample, by admission or a fixed limit."""
    one = Admission(CEILING, TARGET)
    one.begin(Reading(0.0, 0.0, longest_fit=server.capacity / 22528))
    uses, finished = [], 0
    for _ in range(3600 if fixed is None else 600):  # more than the ceiling's first generation of samples
        reading = server.second(fixed or one.limit)
        load = len(server.open) + len(server.preempted)
        one.observe(reading, load=load, finished=server.finished, seconds=1.0, is_wanted=True)
        uses.append(reading.cache_use or 0.0)
        finished += server.finished
    late = uses[len(uses) // 3 :]
    return sum(late) / len(late), server.preemptions / finished


@pytest.mark.parametrize(("capacity", "mean"), [(850e3, 4000), (2.5e6, 4000), (140e3, 4000), (850e3, 15000)])
def test_over_an_hour_the_cache_is_kept_busy_with_a_fifth_of_the_preemptions(capacity: float, mean: float) -> None:
    """Caches of a 32B on four GPUs, a 1.5B on 80 GB and a 7B on 24 GB; answers of 4k tokens, and ones near the limit.

    The bound on the use is 80 % of the target: the least that was found, 0.74 of the smallest cache, is 87 % of it.
    """
    use, preemptions = an_hour(Simulated(capacity, mean))
    assert use > 0.8 * TARGET
    assert preemptions < an_hour(Simulated(capacity, mean), fixed=CEILING)[1] / 5
