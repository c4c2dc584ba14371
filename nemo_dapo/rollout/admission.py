"""How many samples one server may have open: by how full its key-value cache is, not by their number.

A server with more open samples than its cache holds preempts the newest and computes them again later; one with fewer
leaves its device idle. How many fit depends on how long answers get, which nobody knows beforehand, so the limit is found
as TCP finds a window. It starts at what surely fits, and doubles each minute until the cache has been full once: answers
need minutes to grow, and a limit that grows faster is far too high when they have. From then on a finished sample, whose
cache has grown to its length, adds a share of a place; preemption cuts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

DOUBLING_SECONDS = 60.0  # of the limit, until the cache has been full once
PLACES_PER_SAMPLE = 0.1  # that a finished sample adds from then on: a tenth more with each generation of samples
CUT = 0.75  # the limit's share that is left after preemption
UNKNOWN_START = 64  # where a server does not say how many of the longest sequences its cache holds
START = 2  # times as many: few answers are longer than half of what is allowed


@dataclass(frozen=True)
class Reading:
    """One look at a server's /metrics; None = it does not say. The counters begin anew with each start of a server."""

    tokens: float | None = None  # processed so far, of prompts and of responses
    cache_use: float | None = None  # share of the cache that open samples hold
    waiting: float = 0.0  # requests in the server's own queue
    preemptions: float = 0.0  # so far
    longest_fit: float | None = None  # sequences of the greatest length that the cache holds


def read(text: str) -> Reading:
    """What vLLM's /metrics say. Of several engines behind one address the fullest counts; the rest is summed."""
    return Reading(
        tokens=_value(text, "(?:generation|prompt)_tokens_total", sum),
        cache_use=_value(text, "kv_cache_usage_perc", max),
        waiting=_value(text, "num_requests_waiting", sum) or 0.0,
        preemptions=_value(text, "num_preemptions_total", sum) or 0.0,
        longest_fit=_combined(
            re.findall(r'^vllm:cache_config_info{.*kv_cache_max_concurrency="([^"]*)"', text, re.M), sum
        ),
    )


def _value(text: str, name: str, how: Callable[[Iterable[float]], float]) -> float | None:
    return _combined(re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE), how)


def _combined(found: list[str], how: Callable[[Iterable[float]], float]) -> float | None:
    """None where nothing was found, or no number: /metrics is what some server says."""
    try:
        values = [float(value) for value in found]
    except ValueError:
        return None
    return how(values) if values and all(map(math.isfinite, values)) else None


@dataclass(frozen=True)
class Seen:
    """What looks at a server, or at several, have shown; `cache_use` None = nothing."""

    cache_use: float | None = None  # the largest
    waiting: float = 0.0  # the largest
    preemptions: float = 0.0  # all

    def joined(self, other: Seen) -> Seen:
        uses = [use for use in (self.cache_use, other.cache_use) if use is not None]
        return Seen(max(uses, default=None), max(self.waiting, other.waiting), self.preemptions + other.preemptions)


class Admission:
    """The limit of one server, at most `ceiling`; grows while less than `target` of its cache is in use.

    The ceiling holds where the server does not say how full its cache is.
    """

    def __init__(self, ceiling: int, target: float) -> None:
        self.ceiling, self.target = ceiling, target
        self._limit = float(ceiling)
        self._least = 1.0  # so many always fit
        self._begun = self._was_full = False
        self._last, self._load = Reading(), 0
        self._seen = Seen()

    @property
    def limit(self) -> int:
        return int(self._limit)

    def begin(self, reading: Reading) -> None:
        """A server was started; a later start keeps the limit that was found."""
        self._last, self._load = reading, 0
        if self._begun or reading.cache_use is None:
            return
        self._begun = True
        self._least = max(reading.longest_fit or 0.0, 1.0)
        self._set(START * reading.longest_fit if reading.longest_fit else UNKNOWN_START)

    def rest(self) -> None:
        """Nothing is open."""
        self._last, self._load = dataclasses.replace(self._last, cache_use=0.0), 0

    def observe(self, reading: Reading, *, load: int, finished: int, seconds: float, is_wanted: bool) -> None:
        """A look `seconds` after the last one: `load` samples are open, `finished` ended, more `is_wanted` or not."""
        preempted = _increase(self._last.preemptions, reading.preemptions)
        self._last, self._load = reading, load if reading.cache_use is not None else 0
        if reading.cache_use is None:
            return
        self._seen = self._seen.joined(Seen(reading.cache_use, reading.waiting, preempted))
        self._was_full |= preempted > 0 or reading.cache_use >= self.target
        if preempted:
            if load <= self._limit:  # else the cut before has yet to take effect: what is open stays open
                self._set(CUT * load)
        elif is_wanted and not reading.waiting and reading.cache_use < self.target:
            grown = self._limit * 2 ** (seconds / DOUBLING_SECONDS)
            self._set(self._limit + PLACES_PER_SAMPLE * finished if self._was_full else grown)

    def pressure(self, load: int) -> float:
        """Share of the cache in use with `load` open samples, by the last look and what was sent since."""
        return (self._last.cache_use or 0.0) + self.target * (load - self._load) / self._limit

    def take_seen(self) -> Seen:
        """What the looks have shown since the last call."""
        seen, self._seen = self._seen, Seen()
        return seen

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, self._least), float(self.ceiling))


def _increase(before: float, now: float) -> float:
    return now - before if now >= before else now  # a server that was started anew counts from 0
