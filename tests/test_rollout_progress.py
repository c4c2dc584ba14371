"""What is kept of a try that failed, and how the whole is put together; R response tokens."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_dapo.rollout.answers import Answer, Ending, Expected, UnusableAnswerError
from nemo_dapo.rollout.progress import Counts, Progress
from nemo_dapo.rollout.received import Received
from nemo_dapo.types import Draft, Sample, VersionSpan

EXPECTED = Expected("p", 8, frozenset({1}), vocab_size=9)


def begun(
    *frames: list[int], version: int = 3, is_updating: bool = False, keeps: bool = True, crosses: bool = False
) -> Progress:
    """A try under `version` that brought `frames`."""
    progress = Progress(EXPECTED, keeps, Counts(), crosses)
    assert progress.begin(version, is_updating=is_updating).tolist() == []
    for ids in frames:
        add(progress, ids)
    return progress


def add(progress: Progress, ids: list[int], logprob: float = -0.5, newest: int = 3) -> None:
    progress.add(np.array(ids, np.int32), np.full(len(ids), logprob, np.float32), newest)


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
    progress.finish(whole)
    sample = progress.draft.sample
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


def test_tokens_of_older_weights_are_gone_on_with_where_they_may_be_old_each_with_its_version() -> None:
    progress = begun([2, 3], crosses=True)
    add(progress, [4], newest=4)  # under 3 or 4: the server would tell with its last frame
    add(progress, [5], newest=4)
    progress.fail(4, is_trusted=True)
    assert progress.counts.tokens_thrown_away == 2
    assert progress.begin(4, is_updating=False).tolist() == [2, 3]
    add(progress, [6], newest=4)
    progress.fail(5, is_trusted=True)
    assert progress.begin(5, is_updating=False).tolist() == [2, 3, 6]
    assert progress.oldest_version == 3
    whole = ended(progress, [7, 1], VersionSpan(5, 0, 2))
    assert whole.token_ids.tolist() == [2, 3, 6, 7, 1]
    assert whole.versions == (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3), VersionSpan(5, 3, 5))


def test_what_a_server_that_missed_an_update_adds_to_older_tokens_is_refused() -> None:
    progress = begun([2, 3], crosses=True)
    progress.fail(4, is_trusted=True)
    progress.begin(4, is_updating=False)
    with pytest.raises(UnusableAnswerError, match="weight version 3, expected 4 or newer"):
        ended(progress, [1], VersionSpan(3, 0, 1))


def test_a_gap_between_spans_is_not_closed() -> None:
    assert ended(begun(), [2, 3, 1], VersionSpan(3, 0, 1), VersionSpan(3, 2, 3)).versions != (VersionSpan(3, 0, 3),)


def test_the_draft_follows_the_sample_and_another_progress_goes_on_from_it() -> None:
    progress = begun([2, 3], [4], crosses=True)
    draft = Draft(progress.draft.sample)
    assert (draft.sample.token_ids.tolist(), draft.sample.versions) == ([2, 3, 4], (VersionSpan(3, 0, 3),))
    add(progress, [5], newest=4)
    assert progress.draft.sample.token_ids.tolist() == [2, 3, 4], "the version of what follows is not known"
    before = progress.draft.sample
    progress.fail(4, is_trusted=False)
    assert not progress.draft.sample.token_ids.size
    add(progress, [7, 7, 7])
    assert before.token_ids.tolist() == [2, 3, 4], "what was handed out must not change"

    later = Progress(EXPECTED, True, Counts(), crosses=True, draft=draft)
    assert later.begin(6, is_updating=False).tolist() == [2, 3, 4]
    whole = ended(later, [1], VersionSpan(6, 0, 1))
    assert whole.logprobs.tolist() == [-0.5, -0.5, -0.5, -0.25]
    assert whole.versions == (VersionSpan(3, 0, 3), VersionSpan(6, 3, 4))
    later.finish(whole)
    assert later.counts.tokens_gone_on_with == 3
    assert draft.is_whole


@pytest.mark.parametrize("ids", [[2] * 8, [2, 1], [9]])
def test_a_draft_that_cannot_be_the_beginning_is_begun_anew(ids: list[int]) -> None:
    sample = Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "abort", (VersionSpan(1, 0, len(ids)),))
    progress = Progress(EXPECTED, True, Counts(), crosses=True, draft=Draft(sample))
    assert progress.begin(3, is_updating=False).tolist() == []


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
