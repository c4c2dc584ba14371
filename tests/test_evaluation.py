"""avg@k, pass@k and maj@k against numbers worked out by hand, and what counts as a sample."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_dapo.config import EvaluationConfig
from nemo_dapo.detokenizer import Ids
from nemo_dapo.evaluation import (
    EvaluationResult,
    ProblemResult,
    estimate,
    evaluate,
    majority_correct,
    pass_at_k,
    problem_result,
    summarise,
)
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams, Verdict
from tests.fakes import FakeEngine


def prompt(name: str, truth: str = "7") -> Prompt:
    return Prompt(uid=name, token_ids=(1,), problem=f"problem {name}", ground_truth=truth)


def sample(text: str, finish_reason: str = "stop") -> Sample:
    return Sample([*map(ord, text)], (0.0,) * len(text), finish_reason)


def decode(responses: Sequence[Ids]) -> list[str]:
    return ["".join(map(chr, ids)) for ids in responses]


def result(answers: str, errors: str = "") -> ProblemResult:
    """One problem with answer 7; a character a sample, "-" for none; `errors` holds ! where the verifier failed."""
    verdicts = [
        Verdict(a == "7", None if a == "-" else a, error="dead" if e == "!" else None)
        for a, e in itertools.zip_longest(answers, errors, fillvalue=" ")
    ]
    return problem_result("s", prompt(answers), [sample(a) for a in answers], verdicts)


def test_pass_at_k_equals_its_hand_computed_values() -> None:
    assert pass_at_k(4, 2, 1) == pytest.approx(1 / 2)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of the 6 pairs of 4 samples, one holds both wrong ones
    assert pass_at_k(5, 1, 3) == pytest.approx(3 / 5)  # the right one is among 3 of 5
    assert pass_at_k(4, 2, 3) == pass_at_k(4, 4, 1) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0


@pytest.mark.parametrize(("n", "c"), [(6, 0), (6, 1), (6, 3), (6, 6)])
def test_pass_at_k_equals_the_count_over_all_subsets(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_agrees_with_a_monte_carlo_estimate() -> None:
    rng, n, c, k, trials = random.Random(0), 32, 3, 8, 20_000
    samples = [True] * c + [False] * (n - c)
    hits = sum(any(rng.sample(samples, k)) for _ in range(trials))
    # Standard error sqrt(0.25 / 20,000) = 0.0035; five of them.
    assert hits / trials == pytest.approx(pass_at_k(n, c, k), abs=0.018)


def test_pass_at_k_is_unbiased_for_independent_samples() -> None:
    # The expectation over c ~ Binomial(n, p) is 1 - (1 - p)^k exactly; a plug-in 1 - (1 - c/n)^k is not.
    n, p = 10, 0.3
    for k in (1, 4, 10):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_of_impossible_counts_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("7773", 1.0), ("7333", 0.0), ("7733", 0.5), ("7123", 0.25), ("7---", 1.0), ("----", 0.0), ("77733312", 0.5)],
)
def test_the_majority_is_the_most_frequent_answer_and_ties_count_by_share(answers: str, expected: float) -> None:
    assert result(answers).majority == expected


def test_spellings_of_one_answer_vote_together_and_a_failed_verdict_does_not_vote() -> None:
    assert majority_correct(["1,000", "$1000$", "1000.0", "5", "5"], [True, True, True, False, False]) == 1.0
    assert majority_correct(["5", "5", "5", "7", "7"], [None, None, False, True, True]) == 1.0


def test_right_answers_of_any_spelling_are_one_candidate() -> None:
    right = [r"\dfrac12", "0.5", "three sixths", "4", "4"]
    assert majority_correct(right, [True, True, True, False, False]) == 1.0
    assert majority_correct(["025", "25", r"\left(1,2\right)", "(1,2)"], [False] * 4) == 0.0
    # Two spellings of one wrong answer outvote one right one; two different wrong ones tie with it.
    assert majority_correct(["7", r"30^\circ", "30"], [True, False, False]) == 0.0
    assert majority_correct(["7", "30", "31"], [True, False, False]) == pytest.approx(1 / 3)


def test_a_set_is_summarised_as_by_hand() -> None:
    #                 c/n  pass@2     pass@4  maj
    # 7733            2/4  1 - 1/6    1       1/2
    # 3331            0    0          0       0
    # 7777            1    1          1       1
    # 7333 with a ! : one verdict of four fails, 1/3, pass@2 1 - C(2,2)/C(3,2) = 2/3, pass@4 (of 3) 1, maj 3 -> 0
    results = [result("7733"), result("3331"), result("7777"), result("7333", "   !")]
    summary = summarise("s", results, samples=4)
    assert summary.avg.value == pytest.approx((2 / 4 + 0 + 1 + 1 / 3) / 4)
    assert summary.pass_at[1].value == pytest.approx(summary.avg.value)
    assert summary.pass_at[2].value == pytest.approx((5 / 6 + 0 + 1 + 2 / 3) / 4)
    assert summary.pass_at[4].value == pytest.approx(3 / 4)
    assert summary.majority.value == pytest.approx((1 / 2 + 0 + 1 + 0) / 4)
    assert (summary.problems, summary.samples, summary.verifier_errors, summary.unjudged_problems) == (4, 4, 1, 0)
    assert list(summary.pass_at) == [1, 2, 4]


def test_a_problem_without_any_verdict_is_left_out_and_counted() -> None:
    summary = summarise("s", [result("77"), result("33", "!!")], samples=2)
    assert (summary.avg.value, summary.unjudged_problems, summary.verifier_errors) == (1.0, 1, 2)
    assert math.isnan(summarise("s", [result("33", "!!")], samples=2).avg.value)


def test_k_need_not_be_a_power_of_two() -> None:
    assert list(summarise("s", [result("777337")], samples=6).pass_at) == [1, 2, 4, 6]


def test_the_interval_of_right_and_wrong_is_wilsons() -> None:
    # Wilson's interval for 20 of 40, by hand: center 1/2, half width 1.96 sqrt(1/(4 n) + z^2/(4 n^2)) / (1 + z^2/n).
    # The unbiased variance makes the effective size n - 1 = 39, Student's quantile of 39 degrees of freedom is 2.0227.
    z, n = 2.022691, 39
    half = z / (1 + z * z / n) * math.sqrt(0.25 / n + z * z / (4 * n * n))
    interval = estimate([1.0] * 20 + [0.0] * 20)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_the_interval_never_leaves_zero_to_one_nor_claims_certainty() -> None:
    for values in ([1.0] * 30, [0.0] * 30, [1.0] * 29 + [0.5], [1.0]):
        interval = estimate(values, samples=32)
        assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
        assert interval.high - interval.low > 0.005
    # All 30 right: Wilson's lower end n / (n + t^2), with Student's quantile of 29 degrees of freedom.
    assert estimate([1.0] * 30).low == pytest.approx(30 / (30 + 2.045230**2))


@pytest.mark.parametrize(("problems", "a", "b"), [(10, 1.0, 1.0), (10, 0.5, 1.5), (30, 0.5, 1.0), (30, 0.5, 1.5)])
def test_the_interval_covers_the_truth_as_often_as_it_says(problems: int, a: float, b: float) -> None:
    # Difficulty is drawn from Beta(a, b), 8 samples each: the truth is a / (a + b).
    rng, trials = random.Random(1), 2000
    covered = 0
    for _ in range(trials):
        rates = [rng.betavariate(a, b) for _ in range(problems)]
        values = [sum(rng.random() < rate for _ in range(8)) / 8 for rate in rates]
        interval = estimate(values, samples=8)
        covered += interval.low <= a / (a + b) <= interval.high
    # Nominal 0.95; standard error of the share 0.005, three of them. With the normal quantile ten problems come to 0.91.
    assert 0.935 <= covered / trials <= 0.975


class Engine(FakeEngine):
    """Answers with the prompt's uid repeated; remembers how many requests were under way at once."""

    def __init__(self, fail_on: str = "") -> None:
        self.running = self.most = self.started = 0
        self.fail_on = fail_on
        self.params: SamplingParams | None = None

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        self.params = params
        self.started += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        if prompt.uid == self.fail_on:
            raise RuntimeError("server died")
        return [sample(prompt.uid, "length" if i == 0 else "stop") for i in range(n)]


class FakeRewarder:
    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        return [Verdict(text == "7", extracted=text) for text in decode([s.token_ids for s in samples])]


SETS = {"seven": [prompt("7")] * 10, "mixed": [prompt("7"), prompt("33")]}


def test_several_sets_are_evaluated_in_one_go_within_the_concurrency_bound(tmp_path: Path) -> None:
    engine, config = Engine(), EvaluationConfig(samples=4, save_responses=True)
    outcome = asyncio.run(
        evaluate(
            engine,
            FakeRewarder(),
            SETS,
            config,
            decode=decode,
            max_response_length=64,
            max_concurrent_sequences=12,
            progress=False,
        )
    )
    assert engine.most == 3  # 12 sequences, 4 a problem
    assert engine.params == SamplingParams(temperature=1.0, top_p=0.7, top_k=-1, max_tokens=64)
    assert (outcome.sets["seven"].avg.value, outcome.sets["mixed"].avg.value) == (1.0, 0.5)
    assert outcome.sets["mixed"].mean_length == 1.5
    assert outcome.sets["mixed"].truncation_rate == 0.25
    metrics = outcome.metrics()
    assert (metrics["mixed/avg@4"], metrics["mixed/pass@4"], metrics["seven/maj@4"]) == (0.5, 0.5, 1.0)
    assert metrics["mixed/avg@4_low"] < 0.5 < metrics["mixed/avg@4_high"]

    outcome.write_jsonl(tmp_path / "eval" / "problems.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "eval" / "problems.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["seven"] * 10 + ["mixed"] * 2
    assert (rows[-1]["uid"], rows[-1]["avg"], rows[-1]["responses"]) == ("33", 0.0, ["33"] * 4)


def test_a_set_may_have_a_number_of_samples_of_its_own() -> None:
    engine, config = Engine(), EvaluationConfig(samples=4)
    run = evaluate(
        engine, FakeRewarder(), SETS, config, decode=decode, max_response_length=8, samples={"seven": 2, "mixed": 0},
        max_concurrent_sequences=8, progress=False,
    )  # fmt: skip
    outcome = asyncio.run(run)
    assert (outcome.sets["seven"].samples, outcome.sets["mixed"].samples) == (2, 4)
    assert {"seven/avg@2", "mixed/avg@4", "mixed/pass@4"} <= outcome.metrics().keys()
    assert [len(problem.correct) for problem in outcome.problems] == [2] * 10 + [4] * 2
    assert engine.most == 2  # the largest number bounds how many problems are under way


def test_the_first_error_stops_the_evaluation_and_is_raised() -> None:
    engine = Engine(fail_on="33")
    sets = {"s": [prompt("33")] + [prompt("7")] * 50}
    config = EvaluationConfig(samples=1)
    run = evaluate(
        engine,
        FakeRewarder(),
        sets,
        config,
        decode=decode,
        max_response_length=8,
        max_concurrent_sequences=2,
        progress=False,
    )
    with pytest.raises(RuntimeError, match="server died"):
        asyncio.run(run)
    assert engine.started < 10


def test_an_aborted_sample_is_no_wrong_answer() -> None:
    verdicts = [Verdict(True, "7"), Verdict(False, None)]
    one = problem_result("s", prompt("p"), [sample("7"), sample("", "abort")], verdicts)
    assert (one.num_verdicts, one.num_correct, one.errors, one.aborted) == (1, 1, [None, None], [False, True])
    failed = problem_result(
        "s", prompt("p"), [sample("7"), sample("")], [Verdict(True, "7"), Verdict(False, error="x")]
    )
    summary = summarise("s", [one, failed], samples=2)
    assert (summary.metrics()["aborted"], summary.metrics()["verifier_errors"]) == (1, 1)
    assert str(summary).endswith(", 1 verifier errors, 1 aborted samples")


def test_files_are_strict_json_of_plain_lines(tmp_path: Path) -> None:
    verdicts = [Verdict(False, "a\u2028b\x9b31m\ud835", error="dead")]
    one = problem_result("s", prompt("p"), [sample("x")], verdicts)
    result = EvaluationResult({"s": summarise("s", [one], samples=1)}, [one])
    result.write_summary(tmp_path / "summary.json")
    result.write_jsonl(tmp_path / "problems.jsonl")

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert (summary["s/avg@1"], summary["s/avg@1_low"], summary["s/unjudged_problems"]) == (None, None, 1)
    (line,) = (tmp_path / "problems.jsonl").read_text().splitlines()
    assert line.isascii()
    assert json.loads(line, parse_constant=refuse)["extracted"] == ["a\u2028b\x9b31m\ud835"]


def test_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.samples=0 must be at least 1"):
        asyncio.run(
            evaluate(Engine(), FakeRewarder(), {}, EvaluationConfig(samples=0), decode=decode, max_response_length=1)
        )
