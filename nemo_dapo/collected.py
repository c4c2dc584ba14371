"""What a step's sampling came to: the groups that it trains on, the others with the reason, and the record of both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from nemo_dapo.algorithm import is_informative
from nemo_dapo.flights import Occupancy
from nemo_dapo.types import Group, Prompt


class DropReason(Enum):
    all_wrong = "all_wrong"
    all_right = "all_right"
    verifier_error = "verifier_error"
    aborted = "aborted"  # the engine stopped the group; its prompt is sampled again in the next step
    surplus = "surplus"  # not needed: came after the last accepted group; likewise sampled again


USELESS = (DropReason.all_wrong, DropReason.all_right, DropReason.verifier_error, DropReason.aborted)


@dataclass(frozen=True)
class Dropped:
    """A group that did not enter the batch; `group` is None when it was cancelled before it finished."""

    index: int
    prompt: Prompt
    reason: DropReason
    group: Group | None = None


@dataclass(frozen=True)
class Collected:
    """What one step sampled. `groups` are in submission order; `exhausted` when fewer than asked for were found.

    `seconds` is how long the trainer waited, `tail_seconds` the part of it after enough groups had been accepted, spent on
    earlier ones: the price of submission order. `flights` is of the time since the step before, `open` counts the groups
    that wait or run on for later steps, of which such as `ahead` steps need are begun: see `window`.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    exhausted: bool
    seconds: float
    tail_seconds: float
    flights: Occupancy
    open: int = 0
    ahead: float = 0.0

    def count(self, reason: DropReason) -> int:
        return sum(d.reason is reason for d in self.dropped)

    @property
    def useless(self) -> dict[str, int]:
        """How many groups within the step were dropped, by reason."""
        return {reason.value: self.count(reason) for reason in USELESS}

    @property
    def judged(self) -> list[Group]:
        """The groups up to the last accepted one that were sampled to their end, kept or not: an unbiased sample."""
        unjudged = (DropReason.aborted, DropReason.surplus)
        dropped = [d.group for d in self.dropped if d.group is not None and d.reason not in unjudged]
        return [*self.groups, *dropped]

    @property
    def decisive(self) -> list[Group]:
        """In submission order, every group up to the last accepted one, aborted ones too: what the step came to be from."""
        dropped = [d.group for d in self.dropped if d.group is not None and d.reason is not DropReason.surplus]
        return sorted([*self.groups, *dropped], key=lambda group: group.index)

    @property
    def kept_tokens(self) -> int:
        return _tokens(self.groups)

    @property
    def generated_tokens(self) -> int:
        """Response tokens of all finished groups; what cancelled ones had generated is unknown."""
        return self.kept_tokens + _tokens(d.group for d in self.dropped if d.group is not None)

    def metrics(self) -> dict[str, float]:
        """Flat and namespaced; lengths in tokens, `accuracy` and `truncated` as shares of the judged samples."""
        samples = [s for g in self.judged for s in g.samples]
        verdicts = [v for g in self.judged for v in g.verdicts if v.error is None]
        record = {
            "rollout/groups_kept": float(len(self.groups)),
            "rollout/groups_sampled": float(len(self.groups) + len(self.dropped)),
            "rollout/acceptance_rate": len(self.groups) / max(len(self.judged), 1),
            "rollout/exhausted": float(self.exhausted),
            "rollout/verifier_errors": float(sum(g.num_errors for g in self.judged)),
            "rollout/accuracy": _mean(float(v.correct) for v in verdicts),
            "rollout/truncated": _mean(float(s.truncated) for s in samples),
            "rollout/mean_length": _mean(len(s.token_ids) for s in samples),
            "rollout/mean_length_kept": _mean(len(s.token_ids) for g in self.groups for s in g.samples),
            "rollout/generated_tokens": float(self.generated_tokens),
            "rollout/kept_tokens": float(self.kept_tokens),
            "rollout/peak_in_flight": float(self.flights.peak),
            "rollout/mean_in_flight": self.flights.mean,
            "rollout/open_groups": float(self.open),
            "rollout/steps_ahead": self.ahead,
            "time/rollout": self.seconds,
            "time/servers_idle": self.flights.idle_seconds,
            "time/rollout_tail": self.tail_seconds,
        }
        return record | {f"rollout/dropped_{reason.value}": float(self.count(reason)) for reason in DropReason}


def judge(group: Group, *, dynamic_sampling: bool) -> DropReason | None:
    """Why a finished group must not be trained on; None keeps it. Eq. 11 on integer verdicts, never on shaped rewards.

    One verifier error drops the whole group: without that verdict the group's mean and standard deviation (Eq. 9) are
    unknown, and leaving the sample out instead would compare the others against a group from which exactly the answers
    that verifiers choke on are missing. It costs one group, and is counted.
    """
    if any(sample.finish_reason == "abort" for sample in group.samples):
        return DropReason.aborted
    if group.num_errors:
        return DropReason.verifier_error
    if dynamic_sampling and not is_informative(torch.tensor([verdict.correct for verdict in group.verdicts])):
        return DropReason.all_right if group.num_correct else DropReason.all_wrong
    return None


def token_ages(groups: Iterable[Group], version: int) -> dict[str, float]:
    """How many pushes of weights before `version`, which trains on them, the tokens of `groups` were sampled.

    Mean, largest, and the share of each age. Empty where servers report no versions.
    """
    spans = [span for group in groups for sample in group.samples for span in sample.versions]
    ages = np.array([version - span.version for span in spans], np.int64)
    tokens = np.array([span.end - span.start for span in spans], np.int64)
    if not tokens.sum():
        return {}
    shares = np.bincount(ages, tokens) / tokens.sum()
    record = {"rollout/age_mean": float(shares @ np.arange(len(shares))), "rollout/age_max": float(ages.max())}
    return record | {f"rollout/age_{age}": float(share) for age, share in enumerate(shares)}


def _tokens(groups: Iterable[Group]) -> int:
    return sum(len(sample.token_ids) for group in groups for sample in group.samples)


def _mean(values: Iterable[float]) -> float:
    """NaN when there are none: a step that judged nothing has no accuracy."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan
