"""The permissive verifier: where it finds an answer, what it calls equal, and what it never does."""
# ruff: noqa: E501

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hostile_answers import TRUTH, hostile_responses
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemo_dapo.rewards import math_dapo
from nemo_dapo.rewards.extract import find_answer
from nemo_dapo.rewards.math import verify

DATA = Path(__file__).parents[2] / "shared" / "data"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
GSM8K_PATTERN = r"(?m)^A:[ \t]*(.+)$"

EQUAL = [
    ("5", "5"), ("1,234", "1234"), ("$18$", "18"), (r"\$18.00", "18"), ("$18", "18 dollars"), ("18 dollars per day", "18"), ("18 eggs", "18"),
    ("50%", "0.5"), (r"50\%", "50"), ("50 percent", "50%"), (r"30^\circ", "30"), ("30 degrees", r"30^{\circ}"), ("3 1/2", "3.5"),
    (r"$3\frac{1}{2}$", "7/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "3/4"), ("½", "0.5"), ("0.3333", "1/3"), ("3.14159265", "3.1416"),
    ("201.89999999999998", "201.9"), (r"1.2 \times 10^5", "120000"), ("1.2e5", "120000"), ("1 million", "1,000,000"), (r"10{,}080", "10080"),
    ("27.0", "27"), ("27", "27.0"), ("025", "25"), ("25", "025"), ("-7", "−7"), (r"\text{7 cm}", "7"), (r"7\text{ cm}", "7 cm"), ("+7", "7"),
    ("(1, 2)", "(1,2)"), ("(1,000, 2,000)", "(1000, 2000)"), ("{2, 1}", r"\{1,2\}"), ("2 and 1", "1, 2"), ("x=3, y=5", "(3,5)"),
    ("x=3, y=5", "y=5, x=3"), (r"\pm 3", "3, -3"), (r"x = 1 \pm \sqrt{2}", r"1-\sqrt2, 1+\sqrt2"), (r"(-\infty, 5]", r"(-\infty,5]"),
    (r"(-\infty,2) \cup (3,\infty)", r"(3,\infty)\cup(-\infty,2)"), ("[0, 1/2]", "[0,0.5]"),
    (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{bmatrix} 1&2\\3&4 \end{bmatrix}"), ("x = 5", "5"), ("5", "x=5"), ("2+3=5", "5"),
    ("y=2x+3", "2x+3"), ("2x - y + 3 = 0", "y = 2x+3"), ("2x+3", "3+2x"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"), ("1.4142", r"\sqrt{2}"), (r"\frac{\pi}{4} \text{ radians}", r"\pi/4"), ("2pi", r"2\pi"), ("3+4i", "4i+3"),
    ("(B)", "B"), ("B) five apples", "B"), ("option b", "B"), (r"\text{(C)}", "C"), ("Tuesday", "tuesday"), (r"\text{Evelyn}", "Evelyn"), ("3:2", "3:2"),
]  # fmt: skip
UNEQUAL = [
    ("5x", "5"), ("5 x", "5"), ("5m", "5"), ("5 or 6", "5"), ("not 5", "5"), ("51", "5"), ("4 = 5", "5"), ("5 cm", "5 m"), ("$5", "5 cents"), ("5, 6", "5"),
    ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2]", "(1,2)"), ("{1,2}", "(1,2)"), ("5!", "5"), ("4.9999999999999999", "5"), ("5.0000001", "5"),
    ("2t", "2"), ("0.33", "1/3"), ("0.3334", "1/3"), ("3.15", "3.14"), ("3.1417", "3.14159265"), ("A or B", "B"), ("A dog", "A"), ("B) not this, C", "B"),
    ("-5", "5"), ("1 2", "12"), ("5/0", "5"), (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{3}}{2}"), ("18 is wrong", "18"), ("5 squared", "5"), ("3:30", "7:60"),
    ("x = 6", "x = 5"), ("y=5", "x=5"), ("12,34", "1234"), ("x > 5", "x < 5"), ("{5, 6}", "{5}"), ("1.4143", r"\sqrt{2}"), ("50%", "5"), ("5%", "50"),
    ("Wednesday", "Tuesday"), ("2x+4", "2x+3"), ("1, 2", "1, 2, 2"), ("5 million", "5"), ("5 minus 1", "5"), ("42:1", "42"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_one_value_in_two_spellings_is_correct(answer: str, truth: str) -> None:
    verdict = verify(f"Some steps.\nAnswer: {answer}", truth)
    assert verdict.correct, verdict
    assert verdict.error is None


@pytest.mark.parametrize(("answer", "truth"), UNEQUAL)
def test_another_value_is_incorrect_and_no_error(answer: str, truth: str) -> None:
    verdict = verify(f"Some steps.\nAnswer: {answer}", truth)
    assert not verdict.correct
    assert verdict.error is None


@pytest.mark.parametrize(
    ("answer", "truth", "other"),
    [
        ("x < 5", "5 > x", "6 > x"),
        (r"x \le 5", r"(-\infty,5]", r"(-\infty,5)"),
        (r"x\in[2,3]", "[2,3]", "[2,4]"),
        (r"\log 100", r"2\log 10", r"3\log 10"),
    ],
)
def test_what_only_algebra_can_tell_is_left_to_math_verify(answer: str, truth: str, other: str) -> None:
    assert verify(f"Answer: {answer}", truth).correct
    assert not verify(f"Answer: {answer}", other).correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: 1\nAnswer: 2", "2"),
        ("**Answer:** 3", "3"),
        ("### Final Answer:\n\n4", "4"),
        ("The answer is 5. Check: 2 + 3 = 5.", "5"),
        ("The final answer is: $6$. I hope it is correct.", "$6$"),
        (r"\boxed{1} so \boxed{\frac{7}{2}}", r"\frac{7}{2}"),
        (r"Answer: $\boxed{8}$", "8"),
        (r"Answer: we get $\boxed{8}$ apples", "8"),
        (r"\boxed{9} and then \boxed{10", "9"),
        ("It is 3.\n#### 11", "11"),
        ("#### 4. Check\nAnswer: 12\n#### 5. Done", "12"),
        ("Answer: 13.", "13"),
        (r"\boxed{\boxed{14}}", "14"),
        ("no statement 15", None),
    ],
)
def test_the_last_statement_is_the_answer(response: str, answer: str | None) -> None:
    found = find_answer(response)
    assert (found and found.replace(r"\boxed{14}", "14")) == answer


def test_an_absent_answer_is_incorrect_and_no_error() -> None:
    verdict = verify("I ran out of", "5")
    assert (verdict.correct, verdict.extracted, verdict.error) == (False, None, None)


def test_answer_patterns_replace_the_built_in_ones() -> None:
    assert verify("A: 7", "7", answer_patterns=[GSM8K_PATTERN]).correct
    assert not verify("Answer: 7", "7", answer_patterns=[GSM8K_PATTERN]).correct


def test_a_failing_symbolic_comparison_is_an_error_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(answer: str, truth: str) -> bool:
        raise TimeoutError("too slow")

    monkeypatch.setattr("nemo_dapo.rewards.symbolic.equal", fail)
    assert verify("Answer: x < 5", "5 > x").error == "timeout: TimeoutError: too slow"


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


def spellings(value: Fraction) -> list[str]:
    """Every supported way to write a fraction."""
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    texts = [
        f"{sign}{top}/{bottom}",
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"$\dfrac{{{sign}{top}}}{{{bottom}}}$",
        rf"{sign}\frac{{{2 * top}}}{{{2 * bottom}}}",
    ]
    if top > bottom > 1:
        texts += [
            f"{sign}{top // bottom} {top % bottom}/{bottom}",
            rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}",
        ]
    return texts


def integer_spellings(value: int) -> list[str]:
    grouped = f"{value:,}"
    return [
        str(value), f"{value}.0", f"{value}.00", grouped, grouped.replace(",", "{,}"), grouped.replace(",", r"\,"), grouped.replace(",", " "), f"${value}$",
        rf"\$ {value}", f"{value} dollars", f"{value} apples", rf"{value}\text{{ cm}}", f"{value}%", rf"{value}^\circ", rf"\boxed{{{value}}}", f"x = {value}",
        f"{value}e0", rf"{value} \times 10^{{0}}", rf"\text{{{value}}}", f"({value})", rf"\frac{{{3 * value}}}{{3}}", f"**{value}**", f"{value}.",
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_an_integer_written_in_any_supported_way_is_equal(value: int) -> None:
    for text in integer_spellings(value):
        assert verify(f"Answer: {text}", str(value)).correct, text


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.data())
def test_an_integer_with_one_digit_changed_is_never_equal(value: int, data: st.DataObject) -> None:
    changed = change_digit(str(value), data)
    assume(int(changed) != value)
    for text in integer_spellings(int(changed)):
        assert not verify(f"Answer: {text}", str(value)).correct, text


@settings(max_examples=200, deadline=None)
@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999), st.data())
def test_a_fraction_is_equal_in_any_form_and_not_with_a_digit_changed(value: Fraction, data: st.DataObject) -> None:
    truth = f"{value.numerator}/{value.denominator}"
    for text in spellings(value):
        assert verify(f"Answer: {text}", truth).correct, text
    other = change_digit(truth, data)
    assume(other.rpartition("/")[2].strip("0") and Fraction(other) != value)
    for text in spellings(Fraction(other)):
        assert not verify(f"Answer: {text}", truth).correct, text


@settings(max_examples=200, deadline=None)
@given(st.decimals(min_value=-(10**6), max_value=10**6, places=4).filter(lambda d: d != 0), st.data())
def test_a_decimal_is_equal_in_any_form_and_not_with_a_digit_changed(value: object, data: st.DataObject) -> None:
    truth = format(value, "f")
    for text in (truth, f"${truth}$", truth + "00", f"{truth} m", f"{truth}e0", f"x={truth}"):
        assert verify(f"Answer: {text}", truth).correct, text
    other = change_digit(truth, data)
    assume(Fraction(other) != Fraction(truth))
    assert not verify(f"Answer: {other}", truth).correct, other


def change_digit(text: str, data: st.DataObject) -> str:
    at = data.draw(st.sampled_from([i for i, character in enumerate(text) if character.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[at]]))
    return text[:at] + digit + text[at + 1 :]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_no_text_makes_the_verifier_fail(text: str) -> None:
    verdict = verify(f"Answer: {text}", "31415926")
    assert verdict.error is None
    assert not verdict.correct or "31415926" in text


def test_no_hostile_answer_is_correct() -> None:
    responses = hostile_responses()
    assert len(set(responses)) >= 500
    assert [response[:80] for response in responses if verify(response, TRUTH).correct] == []
