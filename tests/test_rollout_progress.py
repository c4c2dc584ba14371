"""What is kept of a try that failed, and how the whole is put together; R response tokens."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_dapo.rollout.answers import Answer, Ending, Expected, UnusableAnswerError
from nemo_dapo.rollout.progress import Counts, Progress
from nemo_dapo.rollout.received import Received
from nemo_dapo.types import VersionSpan

EXPECTED = Expected("p", 8, frozenset({1}), vocab_size=9)


def begun(*frames: list[int], version: int = 3, is_updating: bool = False, keeps: bool = True) -> Progress:
    """A try under `version` that brought `frames`."""
    progress = Progress(EXPECTED, keeps, Counts())
    assert progress.begin(version, is_updating=is_updating).tolist() == []
    for ids in frames:
        add(progress, ids)
    return progress


def add(progress: Progress, ids: list[int], logprob: float = -0.5) -> None:
    progress.add(np.int32(ids), np.full(len(ids), logprob, np.float32))


def ended(progress: Progress, ids: list[int], *versions: VersionSpan) -> Answer:
    """The last try brought `ids` more, and ended."""
    add(progress, ids, -0.25)
    return progress.join(Ending("stop", versions))


def test_a_sample_of_three_tries_is_joined_in_order_with_each_token_s_own_log_probability() -> None:
    progress = begun([2, 3], [4])
    progress.fail(3, is_trusted=True)
    assert progress.begin(3, is_updating=False).tolist() == [2, 3, 4]
    add(progress, [5], -0.125)
    progress.fail(3, is_trusted=True)
    assert progress.begin(3, is_updating=False).tolist() == [2, 3, 4, 5]
    add(progress, [6], -0.25)
    whole = ended(progress, [1], VersionSpan(3, 0, 2))
    assert whole.token_ids.tolist() == [2, 3, 4, 5, 6, 1]
    assert whole.logprobs.tolist() == [-0.5, -0.5, -0.5, -0.125, -0.25, -0.25]
    assert whole.versions == (VersionSpan(3, 0, 6),)
    sample = progress.finish(whole)
    assert (sample.token_ids.tolist(), sample.versions) == (whole.token_ids.tolist(), whole.versions)
    assert not sample.token_ids.flags.writeable
    assert vars(progress.counts) == {"tokens_thrown_away": 0, "tokens_gone_on_with": 4}


def test_an_update_during_the_last_try_begins_a_span_behind_what_was_kept() -> None:
    progress = begun([2, 3])
    progress.fail(3, is_trusted=True)
    progress.begin(3, is_updating=False)
    whole = ended(progress, [4, 5, 1], VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    assert whole.versions == (VersionSpan(3, 0, 3), VersionSpan(4, 3, 5))


@pytest.mark.parametrize(
    ("options", "failure"),
    [
        ({"keeps": False}, {}),
        ({"is_updating": True}, {}),
        ({}, {"version": 4}),
        ({}, {"is_trusted": False}),
    ],
)
def test_what_is_not_sure_to_be_of_the_newest_weights_is_thrown_away_and_counted(options: dict, failure: dict) -> None:
    progress = begun([2, 3], **options)
    progress.fail(**{"version": 3, "is_trusted": True} | failure)
    assert progress.begin(3, is_updating=False).tolist() == []
    assert progress.counts.tokens_thrown_away == 2
    assert ended(progress, [2, 1], VersionSpan(3, 0, 2)).versions == (VersionSpan(3, 0, 2),)


def test_what_was_kept_is_thrown_away_when_an_update_came_before_the_next_try() -> None:
    progress = begun([2, 3])
    progress.fail(3, is_trusted=True)
    assert progress.begin(4, is_updating=False).tolist() == []
    assert progress.counts.tokens_thrown_away == 2


@pytest.mark.parametrize(
    ("ids", "logprob"), [([2, 1], -0.5), ([9], -0.5), ([-1], -0.5), ([2] * 8, -0.5), ([2], float("nan")), ([2], 0.5)]
)
def test_what_cannot_be_the_beginning_of_a_sample_is_thrown_away(ids: list[int], logprob: float) -> None:
    progress = begun()
    add(progress, ids, logprob)
    progress.fail(3, is_trusted=True)
    assert progress.begin(3, is_updating=False).tolist() == []
    assert progress.counts.tokens_thrown_away == len(ids)


def test_more_tokens_than_were_asked_for_are_refused() -> None:
    progress = begun([2] * 8)
    with pytest.raises(UnusableAnswerError, match="9 tokens, expected at most 8"):
        add(progress, [2])


@pytest.mark.parametrize(("size", "is_copied"), [(0, True), (5, True), (6, False), (8, False)])
def test_a_short_sample_does_not_keep_the_room_of_a_long_one(size: int, is_copied: bool) -> None:
    received = Received(8)
    received.add(np.arange(size, dtype=np.int32), np.zeros(size, np.float32))
    ids, logprobs = received.take()
    assert ids.tolist() == list(range(size))
    assert (ids.base is None, logprobs.base is None) == (is_copied, is_copied)
    assert (ids.flags.writeable, logprobs.flags.writeable) == (False, False)


def test_what_has_no_room_or_no_partner_is_not_received() -> None:
    received = Received(2)
    with pytest.raises(ValueError, match="3 tokens and 3 log-probabilities, room for 2"):
        received.add(np.zeros(3, np.int32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="2 tokens and 1 log"):
        received.add(np.zeros(2, np.int32), np.zeros(1, np.float32))
    assert received.size == 0
