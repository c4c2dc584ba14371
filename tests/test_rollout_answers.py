"""What can be a sample of a request, and what can not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nemo_dapo.rollout.answers import Answer, Expected, UnusableAnswerError, check
from nemo_dapo.types import VersionSpan

EXPECTED = Expected("p-17", max_tokens=4, stop_token_ids=frozenset({1}), vocab_size=9, oldest_version=7)
NEWEST = 8
RIGHT = Answer(
    np.array([2, 3, 1], np.int32),
    np.array([-1.0, 0.0, -20.0], np.float32),
    "stop",
    (VersionSpan(7, 0, 2), VersionSpan(8, 2, 3)),
)
LONG = dataclasses.replace(
    RIGHT,
    token_ids=np.array([2, 3, 2, 3], np.int32),
    logprobs=np.full(4, -1.0, np.float32),
    finish_reason="length",
    versions=(VersionSpan(8, 0, 4),),
)


@pytest.mark.parametrize("answer", [RIGHT, LONG])
def test_what_can_be_right_passes(answer):
    check(answer, EXPECTED, NEWEST)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def logprobs(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": logprobs(-1, -1)}, "2 log-probabilities for 3 tokens"),
        ({"finish_reason": "banana"}, "finish reason 'banana'"),
        ({"token_ids": ids(), "logprobs": logprobs(), "versions": ()}, "0 tokens, expected 1 to 4"),
        ({"finish_reason": "length"}, "cut after 3 tokens, expected max_tokens=4"),
        ({"token_ids": ids(-5, 3, 1)}, "token ids from -5 to 3, expected 0 to 8"),
        ({"token_ids": ids(2, 9, 1)}, "token ids from 1 to 9, expected 0 to 8"),
        ({"token_ids": ids(2, 3, 4)}, "stopped at token 4"),
        ({"logprobs": logprobs(-1, np.nan, -1)}, "log-probability nan of token 3 at position 1"),
        ({"logprobs": logprobs(-1, -np.inf, -1)}, "position 1"),
        ({"logprobs": logprobs(-1, -9999, -1)}, "position 1"),
        ({"logprobs": logprobs(3.0, -1, -1)}, "log-probability 3.0 of token 2 at position 0"),
        ({"versions": ()}, "do not cover its 3 tokens"),
        ({"versions": (VersionSpan(7, 0, 2),)}, "do not cover"),
        ({"versions": (VersionSpan(7, 1, 3),)}, "do not cover"),
        ({"versions": (VersionSpan(7, 0, 2), VersionSpan(8, 1, 3))}, "do not cover"),
        ({"versions": (VersionSpan(6, 0, 3),)}, "expected 7 to 8"),
        ({"versions": (VersionSpan(99, 0, 3),)}, "expected 7 to 8"),
        ({"versions": (VersionSpan(8, 0, 2), VersionSpan(7, 2, 3))}, "expected 7 to 8"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_prompt_and_the_values(changes, message):
    with pytest.raises(UnusableAnswerError, match=message) as raised:
        check(dataclasses.replace(RIGHT, **changes), EXPECTED, NEWEST)
    assert "p-17" in str(raised.value)


def test_more_tokens_than_asked_for_are_refused():
    more = dataclasses.replace(LONG, token_ids=ids(2, 3, 2, 3, 1), logprobs=np.full(5, -1.0, np.float32))
    with pytest.raises(UnusableAnswerError, match="5 tokens, expected 1 to 4"):
        check(more, EXPECTED, NEWEST)
