"""Where the permissive verifier finds an answer, and what it does not take for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_dapo.rewards.math import verify
from nemo_dapo.rewards.math.extract import find_answer
from tests.math_pairs import NOT_STATED, STATED

GSM8K_PATTERN = r"(?m)^A:[ \t]*(.+)$"


@pytest.mark.parametrize(("response", "truth"), STATED)
def test_a_stated_answer_is_found(response: str, truth: str) -> None:
    assert verify(response, truth).correct


@pytest.mark.parametrize(("response", "other"), NOT_STATED)
def test_what_is_not_stated_is_not_paid(response: str, other: str) -> None:
    verdict = verify(response, other)
    assert (verdict.correct, verdict.error) == (False, None)


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
        ("no statement 15", None),
        ("Answer:\n\n", None),
        ("**Answer:**", None),
    ],
)
def test_the_last_statement_is_the_answer(response: str, answer: str | None) -> None:
    assert find_answer(response) == answer


@given(
    st.integers(10, 99),
    st.integers(10, 99),
    st.sampled_from(["{}! ways", "${}! + 1$", "{}.5 m", "{} sq. miles", "{}, as required"]),
)
def test_a_mark_that_ends_nothing_does_not_end_the_answer(value: int, other: int, form: str) -> None:
    text = form.format(value)
    assert find_answer(f"The answer is {text}. So {other}.") == text.removesuffix(", as required")


@given(
    st.integers(10, 99),
    st.sampled_from(
        [
            "The answer is reasonable.",
            "This answer is an integer.",
            "Answer: see above",
            "I am sure the answer is right!",
        ]
    ),
)
def test_a_remark_replaces_no_box(value: int, remark: str) -> None:
    assert find_answer(f"So \\boxed{{{value}}}.\n{remark}") == str(value)


@given(st.integers(10, 99), st.integers(10, 99))
def test_a_later_statement_of_mathematics_replaces_a_box(value: int, other: int) -> None:
    assert find_answer(f"So \\boxed{{{value}}}. No: the answer is {other}.") == str(other)
    assert find_answer(f"So \\boxed{{{value}}}.\n\n**Answer:**\n{other}") == str(other)


def test_answer_patterns_replace_the_built_in_ones() -> None:
    assert verify("A: 7", "7", answer_patterns=[GSM8K_PATTERN]).correct
    assert not verify("Answer: 7", "7", answer_patterns=[GSM8K_PATTERN]).correct
