"""What has come of one sample over the tries that it takes: a server that dies has often sent most of an answer.

Tokens that came are gone on with elsewhere as part of the next request's prompt. Their log-probabilities and their weight
version stay their own, so they must have been sampled under the newest weights, and these must be known: no update came
between the request and the failure. K tokens were kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nemo_dapo.rollout import answers
from nemo_dapo.rollout.answers import Answer, Expected
from nemo_dapo.rollout.wire import Ids, Logprobs
from nemo_dapo.types import VersionSpan

NO_TOKENS = np.empty(0, np.int32)


@dataclass
class Counts:
    """Tokens that unfinished answers had, over all samples since they were counted last."""

    tokens_thrown_away: int = 0
    tokens_gone_on_with: int = 0


@dataclass
class Progress:
    """One sample of `expected`; `keeps` False discards whatever a try that failed had brought."""

    expected: Expected
    keeps: bool
    counts: Counts
    token_ids: list[Ids] = field(default_factory=list)  # of whole frames: those kept, then those of this try
    logprobs: list[Logprobs] = field(default_factory=list)
    kept: int = 0  # K
    version: int = 0  # of the newest weights when this try began, and of what was kept
    _is_certain: bool = False

    @property
    def received(self) -> int:
        return sum(map(len, self.token_ids))

    def begin(self, version: int, *, is_updating: bool) -> Ids:
        """A try begins under weights `version`, unless they are changing now; [K], the tokens to go on from."""
        if version != self.version:
            self._throw_away()
        self.version, self._is_certain = version, not is_updating
        return np.concatenate(self.token_ids) if self.kept else NO_TOKENS

    def add(self, token_ids: Ids, logprobs: Logprobs) -> None:
        """A frame of this try came that is not its last."""
        self.token_ids.append(token_ids)
        self.logprobs.append(logprobs)

    def fail(self, version: int, *, is_trusted: bool) -> None:
        """The try failed, while `version` is the newest; what came of a server that is not `is_trusted` is not used."""
        is_sound = self.keeps and is_trusted and self._is_certain and version == self.version
        if not self.token_ids:
            return
        if is_sound and answers.can_go_on(self._answer(), self.expected):
            self.kept = self.received
        else:
            self._throw_away()

    def join(self, answer: Answer) -> Answer:
        """The whole sample, `answer` being what the last try brought beyond the tokens kept."""
        if not self.kept:
            return answer
        kept, k = self._answer(), self.kept
        before = VersionSpan(self.version, 0, k)
        after = [VersionSpan(s.version, s.start + k, s.end + k) for s in answer.versions]
        if after and after[0].version == self.version and after[0].start == k:
            before = VersionSpan(self.version, 0, after.pop(0).end)
        return Answer(
            np.concatenate([kept.token_ids[:k], answer.token_ids]),
            np.concatenate([kept.logprobs[:k], answer.logprobs]),
            answer.finish_reason,
            (before, *after),
        )

    def finish(self) -> None:
        """The sample is whole and good."""
        self.counts.tokens_gone_on_with += self.kept

    def _answer(self) -> Answer:
        """All that came so far, as if it had been cut off there."""
        return Answer(np.concatenate(self.token_ids), np.concatenate(self.logprobs), "abort", ())

    def _throw_away(self) -> None:
        self.counts.tokens_thrown_away += self.received
        self.token_ids.clear()
        self.logprobs.clear()
        self.kept = 0
