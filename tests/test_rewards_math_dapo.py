"""The strict rule of the public recipe, step by step as published."""

from __future__ import annotations

import pytest

from nemo_dapo.rewards.math_dapo import normalize, verify


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("x = 5", "5"),
        ("an apple", "apple"),
        ("$\\frac12$", "\\frac{1}{2}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("1,234", "1234"),
        ("1,a", "1,a"),
        ("10 dollars", "10"),
        ("5\\text{ cm}", "5"),
        ("\\boxed{7}", "7"),
        ("30^\\circ", "30"),
        ("so $8$ it is", "8"),
        (" -3 ", "-3"),
        ("\n$$34$$", ""),
        ("see\n$5$ it is", "see\n5"),
    ],
)
def test_the_normalisation_follows_the_recipe(text: str, normalized: str) -> None:
    assert normalize(text) == normalized


def test_the_last_answer_line_in_the_last_300_characters_decides() -> None:
    assert verify("Answer: 1\nanswer : 2", "2").correct
    assert not verify("Answer: 2" + " " * 300, "2").correct
    assert verify("x" * 1000 + "\nAnswer: $34$", "34").correct


def test_only_an_answer_line_counts() -> None:
    verdict = verify(r"\boxed{5}", "5")
    assert (verdict.correct, verdict.extracted, verdict.error) == (False, None, None)


def test_equality_is_of_strings() -> None:
    assert not verify("Answer: 0.5", "1/2").correct
    assert not verify("Answer: 27.0", "27").correct


def test_other_answer_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.style=math"):
        verify("A: 5", "5", answer_patterns=["A: (.*)"])
