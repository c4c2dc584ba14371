"""What has come of one sample over the tries that it takes: a server that dies has often sent most of an answer.

Tokens that came are gone on with elsewhere as part of the next request's prompt. Their log-probabilities and their weight
version stay their own, so they must have been sampled under the newest weights, and these must be known: no update came
between the request and the failure. K tokens were kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_dapo.rollout import answers
from nemo_dapo.rollout.answers import Answer, Ending, Expected
from nemo_dapo.rollout.received import Received
from nemo_dapo.rollout.wire import Ids, Logprobs
from nemo_dapo.types import Sample, VersionSpan


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
    kept: int = 0  # K
    version: int = 0  # of the newest weights when this try began, and of what was kept
    _is_certain: bool = False

    def __post_init__(self) -> None:
        self.received = Received(self.expected.max_tokens)  # what was kept, then what this try brought

    def begin(self, version: int, *, is_updating: bool) -> Ids:
        """A try begins under weights `version`, unless they are changing now; [K], the tokens to go on from."""
        if version != self.version:
            self._throw_away()
        self.version, self._is_certain = version, not is_updating
        self.received.cut(self.kept)
        return self.received.token_ids

    def add(self, token_ids: Ids, logprobs: Logprobs) -> None:
        """Tokens of this try came."""
        if self.received.size + len(token_ids) > self.received.room:
            raise answers.UnusableAnswerError(
                f"sample of prompt {self.expected.uid}: {self.received.size + len(token_ids)} tokens, expected at most "
                f"{self.expected.max_tokens}"
            )
        self.received.add(token_ids, logprobs)

    def fail(self, version: int, *, is_trusted: bool) -> None:
        """The try failed, while `version` is the newest; what came of a server that is not `is_trusted` is not used."""
        is_sound = self.keeps and is_trusted and self._is_certain and version == self.version
        if not self.received.size:
            return
        if is_sound and answers.can_go_on(self._answer(Ending("abort", ())), self.expected):
            self.kept = self.received.size
        else:
            self._throw_away()

    def join(self, ending: Ending) -> Answer:
        """All that came, `ending` being how the last try ended: its versions are of what it brought beyond the kept."""
        if not (k := self.kept):
            return self._answer(ending)
        before = VersionSpan(self.version, 0, k)
        after = [VersionSpan(s.version, s.start + k, s.end + k) for s in ending.versions]
        if after and after[0].version == self.version and after[0].start == k:
            before = VersionSpan(self.version, 0, after.pop(0).end)
        return self._answer(Ending(ending.finish_reason, (before, *after)))

    def finish(self, answer: Answer) -> Sample:
        """The sample is whole and good."""
        self.counts.tokens_gone_on_with += self.kept
        return Sample(*self.received.take(), answer.finish_reason, answer.versions)

    def _answer(self, ending: Ending) -> Answer:
        return Answer(self.received.token_ids, self.received.logprobs, ending.finish_reason, ending.versions)

    def _throw_away(self) -> None:
        self.counts.tokens_thrown_away += self.received.size
        self.received.cut(0)
        self.kept = 0
