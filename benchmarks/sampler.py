"""Dynamic sampling against the public recipe's rounds, on one vLLM server: `python benchmarks/sampler.py`.

Both fill batches of N informative groups from the same prompts. The recipe (`dapo/`, verl) sends 3 N prompts, waits for all
of their answers, filters, and sends 3 N more while it has too few; what it has too many of is thrown away. Ours sends what
is still missing at the acceptance rate seen so far (`max_staleness` 0), and with m > 0 keeps what a step did not need.

A prompt's uid seeds everything that is no matter of speed: whether its group is informative, and how long each answer is:
log-normal about a median, partly the prompt's own (problems are hard or easy) and partly the sample's, the end-of-sequence
token being ignored. So every contestant meets the same work, in turn, in each round. Tokens are those that the server
counted, of cancelled requests too; `needed` are those of the groups up to the last one that a batch took, in the order of
the prompts. A window is filled before its clock begins, by as many batches as it is old. For this, and because rounds throw
prompts away, contestants do not take the very same batches: they are compared by seconds for a token that was needed. The
last line is JSON, medians over rounds: ours over the recipe's seconds for a token needed, tokens generated a token trained,
and tokens generated over those needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rollout import CPU_OPTIONS, never_stop
from nemo_dapo.collected import judge
from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.types import Draft, Group, Prompt, Sample, SamplingParams, Verdict
from tests.tiny import save_tiny_model

RECIPE = "recipe"
OVERSAMPLING = 3  # gen_prompt_bsz of the recipe over its train_prompt_bsz
GENERATED = "vllm:generation_tokens_total"


@dataclass(frozen=True)
class Work:
    """How many groups of how many samples a batch takes, and how long answers are, in tokens."""

    groups: int
    group_size: int
    median: int
    longest: int
    of_prompt: float = 0.9  # standard deviation of a length's logarithm from prompt to prompt
    of_sample: float = 0.8  # and within one

    def lengths(self, uid: str) -> list[int]:
        rng = random.Random(f"length {uid}")
        center = math.log(self.median) + self.of_prompt * rng.gauss(0, 1)
        drawn = (center + self.of_sample * rng.gauss(0, 1) for _ in range(self.group_size))
        return [min(max(round(math.exp(x)), 8), self.longest) for x in drawn]


class Stream:
    """Prompts without end, the same for every contestant of a `seed`."""

    def __init__(self, seed: str) -> None:
        self.seed, self.drawn = seed, 0

    def next(self) -> Prompt:
        self.drawn += 1
        uid = f"{self.seed} {self.drawn}"
        rng = random.Random(f"prompt {uid}")
        return Prompt(uid, tuple(rng.randrange(40, 250) for _ in range(32)), "", "")

    def record(self, uid: str, correct: int, attempts: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Verdicts:
    """A Rewarder: a share `rate` of the prompts has mixed groups, the rest is all right or all wrong in equal parts."""

    rate: float

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        drawn = random.Random(f"verdict {prompt.uid}").random()
        if drawn < self.rate:
            return [Verdict(i % 2 == 0) for i in range(len(samples))]
        return [Verdict(drawn < (1 + self.rate) / 2)] * len(samples)


class Drawn:
    """`engine` whose answers have the lengths that `work` draws."""

    def __init__(self, engine: VLLMEngine, work: Work) -> None:
        self.engine, self.work = engine, work

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        each = [replace(params, max_tokens=length) for length in self.work.lengths(prompt.uid)[:n]]
        begun = drafts or [Draft() for _ in each]
        asked = [self.engine.generate(prompt, 1, one, [draft]) for one, draft in zip(each, begun, strict=True)]
        samples = await asyncio.gather(*asked)
        return [sample for (sample,) in samples]

    def generated(self) -> float:
        """Tokens that the server has made so far."""
        request = urllib.request.Request(
            f"{self.engine.servers.servers[0].url}/metrics", headers=dict(self.engine.servers.headers)
        )
        with urllib.request.urlopen(request) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(GENERATED))


@dataclass(frozen=True)
class Taken:
    """What `batches` batches took."""

    batches: int
    seconds: float
    generated: float
    needed: int
    trained: int

    def __str__(self) -> str:
        return (
            f"{self.seconds / self.batches:6.2f} s a batch, {self.generated / self.trained:6.2f} tokens a token trained, "
            f"{self.generated / self.needed:5.2f} times what was needed, {1e6 * self.seconds / self.needed:4.0f} us "
            f"a token needed, {self.generated / self.seconds:6.0f} tokens/s"
        )


def tokens(groups: Sequence[Group]) -> int:
    return sum(len(sample.token_ids) for group in groups for sample in group.samples)


async def sampled(engine: Drawn, work: Work, batches: int, seed: str, rate: float, staleness: int) -> Taken:
    """By our sampler, after `staleness` batches of its own, so that a window is as full when the clock begins as after."""
    sampler = GroupSampler(
        engine,  # type: ignore[arg-type]
        Verdicts(rate),
        Stream(seed),
        group_size=work.group_size,
        params=SamplingParams(),
        max_attempts=1000,
        max_staleness=staleness,
    )
    for _ in range(staleness):
        await sampler.collect(work.groups)
    begin, before = time.perf_counter(), engine.generated()
    collected = [await sampler.collect(work.groups) for _ in range(batches)]
    seconds, generated = time.perf_counter() - begin, engine.generated() - before
    await sampler.stop()
    needed, trained = (
        sum(map(tokens, many)) for many in ([c.judged for c in collected], [c.groups for c in collected])
    )
    return Taken(batches, seconds, generated, needed, trained)


async def in_rounds(engine: Drawn, work: Work, batches: int, seed: str, rate: float) -> Taken:
    """By the recipe: rounds of 3 N prompts, each to its end."""
    stream, rewarder = Stream(seed), Verdicts(rate)

    async def group(prompt: Prompt) -> Group:
        samples = await engine.generate(prompt, work.group_size, SamplingParams())
        return Group(prompt, tuple(samples), tuple(await rewarder.score(prompt, samples)))

    async def batch() -> tuple[int, int]:
        """Tokens needed and trained."""
        done: list[Group] = []
        while sum(map(informative, done)) < work.groups:
            prompts = [stream.next() for _ in range(OVERSAMPLING * work.groups)]
            done += await asyncio.gather(*map(group, prompts))
        kept = [i for i, one in enumerate(done) if informative(one)][: work.groups]
        return tokens(done[: kept[-1] + 1]), tokens([done[i] for i in kept])

    begin, before = time.perf_counter(), engine.generated()
    both = [await batch() for _ in range(batches)]
    seconds = time.perf_counter() - begin
    needed, trained = (sum(column) for column in zip(*both, strict=True))
    return Taken(batches, seconds, engine.generated() - before, needed, trained)


def informative(group: Group) -> bool:
    return judge(group, dynamic_sampling=True) is None


def measure(engine: Drawn, work: Work, args: argparse.Namespace) -> dict[tuple[float, str], list[Taken]]:
    """Every contestant at every rate, in turn, in each round, whose prompts are its own."""
    found: dict[tuple[float, str], list[Taken]] = defaultdict(list)
    for number in range(args.rounds):
        for rate in args.rates:
            seed = f"{number} {rate}"
            runs = {RECIPE: in_rounds(engine, work, args.batches, seed, rate)}
            runs |= {f"m={m}": sampled(engine, work, args.batches, seed, rate, m) for m in args.staleness}
            for name, run in runs.items():
                found[rate, name].append(asyncio.run(run))
                print(f"round {number + 1}, acceptance {rate}, {name:6}: {found[rate, name][-1]}", flush=True)
    return found


def compared(
    found: dict[tuple[float, str], list[Taken]], rates: Sequence[float], ours: Sequence[str]
) -> dict[str, Any]:
    """By acceptance rate and contestant: seconds and tokens over the recipe's, and tokens over those needed.

    A token_ratio also has in it how many informative groups each happened to meet, over_needed has not.
    """

    def table(figure: Callable[[Taken], float], names: Sequence[str], *, over_recipe: bool) -> dict[str, Any]:
        middle = {key: median(map(figure, runs)) for key, runs in found.items()}
        return {
            str(rate): {
                name: round(middle[rate, name] / (middle[rate, RECIPE] if over_recipe else 1), 3) for name in names
            }
            for rate in rates
        }

    return {
        "time_ratio": table(lambda one: one.seconds / one.needed, ours, over_recipe=True),
        "token_ratio": table(lambda one: one.generated / one.trained, ours, over_recipe=True),
        "over_needed": table(lambda one: one.generated / one.needed, (RECIPE, *ours), over_recipe=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="acceptance rates")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2], help="m of our contestants")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8, help="N, informative groups of a batch")
    parser.add_argument("--group", type=int, default=8, help="G, samples of a prompt")
    parser.add_argument("--median", type=int, default=60, help="tokens of an answer")
    parser.add_argument("--longest", type=int, default=1000, help="tokens of an answer")
    args = parser.parse_args()
    work = Work(args.groups, args.group, args.median, args.longest)
    config = RolloutConfig(max_prompt_length=64, max_response_length=work.longest, vllm=CPU_OPTIONS)

    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model(Path(folder) / "model", layers=5, hidden=128, rope_theta=500000.0, max_positions=2048)
        tokenizer = AutoTokenizer.from_pretrained(path)
        with VLLMEngine.start(config, path, Precision.fp32, Path(folder), tokenizer, seed=0) as engine:
            never_stop(engine)
            drawn = Drawn(engine, work)
            asyncio.run(drawn.generate(Stream("warm up").next(), work.group_size, SamplingParams()))
            found = measure(drawn, work, args)
    print(json.dumps(compared(found, args.rates, [f"m={m}" for m in args.staleness])))


if __name__ == "__main__":
    main()
