"""How good a model is: avg@k, unbiased pass@k and maj@k over held-out problems, each with a 95 % interval.

n samples are drawn of each of N problems. Per problem, with c of its n samples right:

    avg@n    c / n
    pass@k   1 - C(n - c, k) / C(n, k)         (Chen et al., arXiv 2107.03374, Eq. 1)
    maj@n    is the most frequent answer right  (Wang et al., arXiv 2203.11171); a tie counts by the share of right ones

and the set's value is the mean over problems. A sample that the engine aborted, or whose verifier failed, has no verdict:
it is left out of n, and counted apart; pass@k of a problem with fewer than k verdicts uses those it has.

Interval: problems, not samples, are the independent draws, so the variance of a mean is that of the per-problem values
over N (Miller, arXiv 2411.00640). It enters Wilson's score interval through the effective sample size p (1 - p) / variance
(Franco et al., J. Survey Stat. Methodol. 7 (3), 2019), which, unlike value +- 1.96 standard errors, stays within [0, 1] and
does not shrink to nothing when every problem is right or every one is wrong. The variance is itself estimated, from N
values: hence Student's t quantile with N - 1 degrees of freedom. benchmarks/intervals.py measures how often the interval
covers the truth.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.special import stdtrit
from tqdm import tqdm

from nemo_dapo.config import EvaluationConfig
from nemo_dapo.detokenizer import Decode
from nemo_dapo.files import replacing
from nemo_dapo.interfaces import Rewarder, RolloutEngine
from nemo_dapo.rewards.math import canonical
from nemo_dapo.tasks import all_or_none
from nemo_dapo.types import Prompt, Sample, SamplingParams, Verdict

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A proportion with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class ProblemResult:
    """The n samples of one problem. `correct[i]` is None where the verifier failed, `errors` says how, or where the engine
    aborted the sample."""

    set: str
    uid: str
    problem: str
    ground_truth: str
    source: str
    correct: list[bool | None]
    extracted: list[str | None]
    errors: list[str | None]
    aborted: list[bool]
    lengths: list[int]  # response tokens
    truncated: list[bool]
    responses: list[str] = field(default_factory=list)

    @property
    def num_verdicts(self) -> int:
        return sum(verdict is not None for verdict in self.correct)

    @property
    def num_correct(self) -> int:
        return sum(verdict is True for verdict in self.correct)

    @property
    def majority(self) -> float:
        return majority_correct(self.extracted, self.correct)


@dataclass(frozen=True)
class SetResult:
    """One evaluation set. `samples` n a problem; rates and the mean length (tokens) are over all samples."""

    name: str
    problems: int
    samples: int
    avg: Estimate
    pass_at: dict[int, Estimate]
    majority: Estimate
    truncation_rate: float
    mean_length: float
    verifier_errors: int
    aborted: int  # samples that the engine gave up
    unjudged_problems: int  # without any verdict: left out of the estimates

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics sink."""
        n = self.samples
        named = {f"avg@{n}": self.avg, **{f"pass@{k}": one for k, one in self.pass_at.items()}}
        named[f"maj@{n}"] = self.majority
        flat = {name: one.value for name, one in named.items()}
        flat |= {f"{name}_low": one.low for name, one in named.items()}
        flat |= {f"{name}_high": one.high for name, one in named.items()}
        flat["truncation_rate"], flat["mean_length"] = self.truncation_rate, self.mean_length
        counts = {"verifier_errors": self.verifier_errors, "aborted": self.aborted}
        return flat | counts | {"unjudged_problems": self.unjudged_problems}

    def __str__(self) -> str:
        n, most = self.samples, max(self.pass_at)
        lost = {"verifier errors": self.verifier_errors, "aborted samples": self.aborted}
        errors = "".join(f", {count} {what}" for what, count in lost.items() if count)
        return (
            f"eval {self.name}: {self.problems} problems, avg@{n} {self.avg}, pass@{most} {self.pass_at[most]}, "
            f"maj@{n} {self.majority}, length {self.mean_length:.0f}, truncated {self.truncation_rate:.1%}{errors}"
        )


@dataclass(frozen=True)
class EvaluationResult:
    """Every set that was evaluated, and every problem in it."""

    sets: dict[str, SetResult]
    problems: list[ProblemResult]

    def metrics(self) -> dict[str, float]:
        """`<set>/<metric>` -> number."""
        return {f"{name}/{key}": value for name, one in self.sets.items() for key, value in one.metrics().items()}

    def write_jsonl(self, path: Path) -> None:
        """One problem a line, whole or not at all. ASCII: what a model wrote neither ends a line nor moves a cursor."""
        with replacing(path) as temporary, temporary.open("w", encoding="ascii") as file:
            for result in self.problems:
                file.write(json.dumps(_jsonl_row(result), allow_nan=False) + "\n")

    def write_summary(self, path: Path) -> None:
        """The metrics as one JSON object; null where a set has none, as without any verdict."""
        numbers = {name: None if math.isnan(value) else value for name, value in self.metrics().items()}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from n of which c are right, is right."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool | None]) -> float:
    """1.0 when the most frequent answer is right, 0.0 when wrong or none was found; between them on a tie.

    What the verifier judged right is one answer, however it is spelt; of the others, those of one canonical spelling are.
    Samples without an answer, or without a verdict, do not vote.
    """
    right = object()  # no spelling
    votes: Counter[object] = Counter(
        right if verdict else canonical(answer)
        for answer, verdict in zip(answers, correct, strict=True)
        if answer is not None and verdict is not None
    )
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return (right in winners) / len(winners) if winners else 0.0


def estimate(values: Sequence[float], samples: int = 1) -> Estimate:
    """Mean of the per-problem values, each within [0, 1], with the 95 % interval of the module's docstring.

    `samples` n bounds the effective sample size by N n where all problems came out alike; no problem gives NaN.
    """
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan)
    mean = math.fsum(values) / count
    variance = math.fsum((v - mean) ** 2 for v in values) / max(count - 1, 1) / count
    spread = mean * (1 - mean)
    size = count if spread == 0 else min(spread / variance, count * samples) if variance else count * samples
    t = float(stdtrit(max(count - 1, 1), (1 + CONFIDENCE) / 2))
    center = (mean + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t / (1 + t**2 / size) * math.sqrt(spread / size + t**2 / (4 * size**2))
    return Estimate(mean, max(0.0, center - half), min(1.0, center + half))


def summarise(name: str, results: Sequence[ProblemResult], samples: int) -> SetResult:
    """The metrics of one set from its problems, `samples` n drawn of each."""
    judged = [result for result in results if result.num_verdicts]
    lengths = [length for result in results for length in result.lengths]
    truncated = [cut for result in results for cut in result.truncated]
    return SetResult(
        name=name,
        problems=len(results),
        samples=samples,
        avg=estimate([r.num_correct / r.num_verdicts for r in judged], samples),
        pass_at={k: estimate([_pass_at(r, k) for r in judged], samples) for k in _ks(samples)},
        majority=estimate([r.majority for r in judged]),
        truncation_rate=sum(truncated) / max(len(truncated), 1),
        mean_length=sum(lengths) / max(len(lengths), 1),
        verifier_errors=sum(error is not None for result in results for error in result.errors),
        aborted=sum(map(sum, (result.aborted for result in results))),
        unjudged_problems=len(results) - len(judged),
    )


async def evaluate(
    engine: RolloutEngine,
    rewarder: Rewarder,
    sets: Mapping[str, Sequence[Prompt]],
    config: EvaluationConfig,
    *,
    decode: Decode,
    max_response_length: int,
    samples: Mapping[str, int] | None = None,
    max_concurrent_sequences: int = 1024,
    progress: bool = True,
) -> EvaluationResult:
    """Samples and judges every problem of `sets` (name -> prompts).

    `samples` (name -> n) holds where it names a set with n > 0, else the config's; `max_response_length` (tokens) where the
    config's is 0. `decode` makes the texts that `save_responses` asks for. At most `max_concurrent_sequences` responses are
    in flight; `progress` draws a bar where standard error is a terminal. Deadlines are the engine's and the rewarder's; the
    first error of theirs stops the rest and is raised.
    """
    if config.samples < 1:
        raise ValueError(f"evaluation.samples={config.samples} must be at least 1")
    params = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_response_length or max_response_length,
    )

    counts = {name: (samples or {}).get(name) or config.samples for name in sets}
    gate = asyncio.Semaphore(max(1, max_concurrent_sequences // max(counts.values(), default=1)))
    bar = tqdm(
        total=sum(map(len, sets.values())), desc="eval", unit="problem", leave=False, disable=None if progress else True
    )

    async def one(name: str, prompt: Prompt) -> ProblemResult:
        async with gate:
            drawn = await engine.generate(prompt, counts[name], params)
            verdicts = await rewarder.score(prompt, drawn)
        bar.update()
        ids = [sample.token_ids for sample in drawn]
        texts = await asyncio.to_thread(decode, ids) if config.save_responses else []
        return problem_result(name, prompt, drawn, verdicts, texts)

    with bar:
        results = await all_or_none([one(name, prompt) for name, prompts in sets.items() for prompt in prompts])
    return EvaluationResult(
        {name: summarise(name, [r for r in results if r.set == name], counts[name]) for name in sets}, results
    )


def problem_result(
    name: str, prompt: Prompt, samples: Sequence[Sample], verdicts: Sequence[Verdict], responses: Sequence[str] = ()
) -> ProblemResult:
    """One problem's record, with its samples' texts where `responses` has them.

    An aborted sample has no verdict, whatever the verifier made of it.
    """
    aborted = [sample.finish_reason == "abort" for sample in samples]
    errors = [None if gone else verdict.error for gone, verdict in zip(aborted, verdicts, strict=True)]
    unjudged = [gone or error is not None for gone, error in zip(aborted, errors, strict=True)]
    return ProblemResult(
        set=name,
        uid=prompt.uid,
        problem=prompt.problem,
        ground_truth=prompt.ground_truth,
        source=prompt.source,
        correct=[None if missing else v.correct for missing, v in zip(unjudged, verdicts, strict=True)],
        extracted=[verdict.extracted for verdict in verdicts],
        errors=errors,
        aborted=aborted,
        lengths=[len(sample.token_ids) for sample in samples],
        truncated=[sample.truncated for sample in samples],
        responses=list(responses),
    )


def _pass_at(result: ProblemResult, k: int) -> float:
    return pass_at_k(result.num_verdicts, result.num_correct, min(k, result.num_verdicts))


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


def _jsonl_row(result: ProblemResult) -> dict[str, Any]:
    n = result.num_verdicts
    scores = {"num_correct": result.num_correct, "num_verdicts": n, "maj": result.majority if n else None}
    return scores | {"avg": result.num_correct / n if n else None} | asdict(result)
