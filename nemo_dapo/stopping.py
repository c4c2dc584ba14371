"""When a run must stop because nothing can be learned: a verifier that fails, steps without a group to train on.

Pure decisions on the groups of a step. Both errors say what was found, how often, and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from nemo_dapo.telemetry.escape import printable
from nemo_dapo.types import Group

_KINDS_SHOWN = 3
_SHOWN = 300  # characters of one error's text
# By what most of the groups were dropped for.
REMEDIES = {
    "all_wrong": "the problems are too hard, or the verifier does not find the answers: read some responses "
    "(logger.rollout_every=1), compare data.template and reward.style, take easier problems",
    "all_right": "the model solves these problems: take harder ones, or set data.skip_solved_visits",
    "verifier_error": "mend the reward (reward.function, reward.timeout)",
    "aborted": "the servers stop the samples: see their logs in servers/ of the run",
}


def check_verifier(groups: Sequence[Group], max_error_rate: float) -> None:
    """Raises RuntimeError when the verifier failed on more than this share of the samples of `groups`."""
    errors = [verdict.error for group in groups for verdict in group.verdicts if verdict.error is not None]
    judged = sum(len(group.verdicts) for group in groups)
    if not judged or len(errors) / judged <= max_error_rate:
        return
    kinds = Counter(errors).most_common(_KINDS_SHOWN)
    texts = "; ".join(f"{count} x {printable(error, _SHOWN)}" for error, count in kinds)
    raise RuntimeError(
        f"the verifier failed on {len(errors)} of {judged} samples, more than reward.max_error_rate={max_error_rate:g} "
        f"allows: {texts}. Mend the reward (reward.function, its service, reward.timeout, reward.memory_mb), or raise "
        "reward.max_error_rate to train on the groups without errors"
    )


def check_progress(empty_steps: int, max_empty_steps: int, dropped: Mapping[str, int]) -> None:
    """Raises RuntimeError after `max_empty_steps` steps in a row (0 = never) without a group to train on.

    `dropped` says why the groups of the last of them were dropped: reason -> count.
    """
    if not max_empty_steps or empty_steps < max_empty_steps:
        return
    raise RuntimeError(
        f"{empty_steps} steps in a row had no group to train on (algorithm.max_empty_steps={max_empty_steps}); of the last "
        f"one's groups {in_words(dropped)}: {REMEDIES[max(dropped, key=lambda reason: dropped[reason])]}"
    )


def in_words(dropped: Mapping[str, int]) -> str:
    """`30 all wrong, 10 all right, 0 verifier error`"""
    return ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items())
