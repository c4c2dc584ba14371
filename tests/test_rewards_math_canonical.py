"""`canonical`: cheap spellings of one answer share a key, different answers do not, and nothing makes it fail."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dapo.rewards.math import canonical
from tests.hostile_answers import hostile_responses

SPELLINGS = [
    (r"\dfrac12", r"\frac{1}{2}", "1/2", "0.5", r"$\tfrac{2}{4}$", "½"),
    ("025", "25", "25.0", "+25", r"\boxed{25}", "25."),
    (r"\left(1,2\right)", "(1,2)", "( 1, 2 )"),
    (r"30^\circ", "30", "30 degrees", r"30^{\circ}"),
    (r"5\text{ cm}", "5", "5 apples", r"\$5"),
    ("1,234", "1234", r"1{,}234", r"1\,234"),
    (r"\sqrt2", r"\sqrt{2}", r"$\sqrt{2}$"),
    ("Tuesday", "tuesday", r"\text{Tuesday}"),
]


@pytest.mark.parametrize("spellings", SPELLINGS)
def test_spellings_of_one_answer_share_a_key(spellings: tuple[str, ...]) -> None:
    assert len({canonical(text) for text in spellings}) == 1


def test_different_answers_have_different_keys() -> None:
    texts = [spellings[0] for spellings in SPELLINGS] + ["R", "r", "(2,1)", "[1,2]", "50%", "12", "1 2", "-5", "5x", ""]
    assert len({canonical(text) for text in texts}) == len(texts)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_no_text_makes_it_fail(text: str) -> None:
    assert canonical(text) == canonical(text)


def test_hostile_texts_keep_a_short_key() -> None:
    for response in hostile_responses():
        answer = response.removeprefix("Answer: ")
        assert len(canonical(answer)) <= max(len(answer), 2_000)
