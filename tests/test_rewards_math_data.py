"""The permissive verifier on public data: human labels of real models' solutions, and competition answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_dapo.rewards import math_dapo
from nemo_dapo.rewards.math import verify

DATA = Path(__file__).parents[2] / "shared" / "data"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
GSM8K_PATTERN = r"(?m)^A:[ \t]*(.+)$"


def gsm8k_solutions() -> list[tuple[str, str, bool]]:
    path = DATA / "gsm8k" / "model_solutions.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    truths = [row["ground_truth"].rpartition("A:")[2].strip() for row in rows]
    return [
        (row[m]["solution"], truth, row[m]["is_correct"])
        for row, truth in zip(rows, truths, strict=True)
        for m in MODELS
    ]


def test_every_label_of_the_gsm8k_solutions_is_reproduced() -> None:
    solutions = gsm8k_solutions()
    wrong = [s for s in solutions if verify(s[0], s[1], answer_patterns=[GSM8K_PATTERN]).correct != s[2]]
    assert len(solutions) == 5276
    assert wrong == []


def test_the_strict_rule_gives_the_same_verdicts_on_the_same_texts_in_its_format() -> None:
    for solution, truth, label in gsm8k_solutions():
        rewritten = solution.replace("\nA:", "\nAnswer:")
        assert math_dapo.verify(rewritten, truth).correct == verify(rewritten, truth).correct == label


def competition_answers() -> list[int]:
    paths = [DATA / name / "test.jsonl" for name in ("aime24", "amc23")]
    if not all(path.exists() for path in paths):
        pytest.skip(f"{paths} are absent")
    return [int(float(json.loads(line)["answer"])) for path in paths for line in path.read_text().splitlines()]


def test_aime_and_amc_answers_are_accepted_in_every_form_and_refused_with_another_digit() -> None:
    forms = [
        "Answer: {}",
        "Answer: ${}$",
        r"\boxed{{{}}}",
        "The answer is {}.",
        "Answer: {}.0",
        r"**Answer:** \(\boxed{{{}}}\)",
        "#### {}",
        "Answer: $x = {}$",
    ]
    for answer in competition_answers():
        for form in forms:
            for truth in (str(answer), f"{answer}.0", f"{answer:03d}"):
                assert verify(form.format(answer), truth).correct, (form, truth)
                assert not verify(form.format(answer + 1), truth).correct
                assert not verify(form.format(f"{answer}1"), truth).correct
