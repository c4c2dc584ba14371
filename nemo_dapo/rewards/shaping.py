"""From verdict to the unshaped score of a sample (the overlong penalty, Eq. 13, is `algorithm.overlong_penalty`)."""

from __future__ import annotations

from nemo_dapo.config import RewardConfig
from nemo_dapo.types import Verdict


def score_of(verdict: Verdict, config: RewardConfig) -> float:
    """`verdict.score` (which holds the weighted `reward.extra` terms already), else the configured constant.

    Raises ValueError for a verifier error: it has no score. A group that holds one is dropped whole and counted, because
    any number in its place would shift the group's mean and deviation (Eq. 9), and without the sample G would differ.
    """
    if verdict.error is not None:
        raise ValueError(f"a verifier error has no score ({verdict.error}); drop the group as `verifier_error`")
    if verdict.score is not None:
        return verdict.score
    return config.correct if verdict.correct else config.incorrect
