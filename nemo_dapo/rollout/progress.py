"""What has come of one sample over the tries that it takes: a server that dies has often sent most of an answer.

Tokens that came are gone on with elsewhere as part of the next request's prompt. Their log-probabilities and their weight
versions stay their own, so these must be known: they are of tokens that came before the next version did. Those of a
token behind it a server tells only with the last one, so what a try brought after an update is lost with it. Where tokens
may be older than the weights (`crosses`), those of earlier versions are gone on with too. K tokens were kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_dapo.rollout import answers
from nemo_dapo.rollout.answers import Answer, Ending, Expected
from nemo_dapo.rollout.received import Received
from nemo_dapo.rollout.wire import Ids, Logprobs
from nemo_dapo.types import NOTHING_YET, Draft, Sample, VersionSpan


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
    crosses: bool = False
    draft: Draft = field(default_factory=Draft)
    kept: int = 0  # K
    spans: tuple[VersionSpan, ...] = ()  # of what was kept
    version: int = 0  # of the newest weights when this try began
    _is_certain: bool = False  # whether this try began under `version`
    _known: int = 0  # tokens whose version is known: those kept, and of this try those that came before another

    def __post_init__(self) -> None:
        """Tokens of the draft are kept, where they can be the beginning of the sample."""
        self.received = Received(self.expected.max_tokens)
        sample = self.draft.sample
        if not (self.keeps and sample.versions and len(sample.token_ids) < self.expected.max_tokens):
            return
        self.received.add(sample.token_ids, sample.logprobs)
        if answers.can_go_on(self._answer(Ending("abort", ())), self.expected):
            self.kept, self.spans, self.version = self.received.size, sample.versions, sample.versions[-1].version
        else:
            self._throw_away()

    @property
    def oldest_version(self) -> int:
        """Of the tokens that the sample can have."""
        return self.spans[0].version if self.spans else self.version

    def begin(self, version: int, *, is_updating: bool) -> Ids:
        """A try begins under weights `version`, unless they are changing now; [K], the tokens to go on from."""
        if version != self.version and not self.crosses and self.received.size:
            self._throw_away()
        self.version, self._is_certain, self._known = version, not is_updating, self.kept
        self.received.cut(self.kept)
        return self.received.token_ids

    def add(self, token_ids: Ids, logprobs: Logprobs, newest: int) -> None:
        """Tokens of this try came while weights `newest` were the newest."""
        before = self.received.size
        if before + len(token_ids) > self.received.room:
            raise answers.UnusableAnswerError(
                f"sample of prompt {self.expected.uid}: {before + len(token_ids)} tokens, expected at most "
                f"{self.expected.max_tokens}"
            )
        self.received.add(token_ids, logprobs)
        if self._is_certain and newest == self.version and self._known == before:
            self._known = self.received.size
            if self.crosses:
                self.draft.sample = self._so_far()

    def fail(self, version: int, *, is_trusted: bool) -> None:
        """The try failed, while `version` is the newest; what came of a server that is not `is_trusted` is not used."""
        is_sound = self.keeps and is_trusted and (self.crosses or version == self.version)
        if not self.received.size:
            return
        self.counts.tokens_thrown_away += self.received.size - self._known
        self.received.cut(self._known)
        if is_sound and self._known and answers.can_go_on(self._answer(Ending("abort", ())), self.expected):
            self.spans, self.kept = self._spans(), self._known
        else:
            self._throw_away()

    def join(self, ending: Ending) -> Answer:
        """All that came, `ending` being how the last try ended: its versions are of what it brought beyond the kept.

        Raises UnusableAnswerError where it brought tokens of weights older than those it was asked under.
        """
        if self.kept and ending.versions and ending.versions[0].version < self.version:
            raise answers.UnusableAnswerError(
                f"sample of prompt {self.expected.uid}: weight version {ending.versions[0].version}, expected "
                f"{self.version} or newer: the server missed an update"
            )
        spans = self.spans
        for span in ending.versions:
            spans = joined(spans, VersionSpan(span.version, span.start + self.kept, span.end + self.kept))
        return self._answer(Ending(ending.finish_reason, spans, ending.routes))  # of the kept tokens too: it read them

    def finish(self, answer: Answer) -> None:
        """The sample is whole and good: the draft's."""
        self.counts.tokens_gone_on_with += self.kept
        self.draft.sample = Sample(*self.received.take(), answer.finish_reason, answer.versions, answer.routes)

    def _answer(self, ending: Ending) -> Answer:
        tokens = self.received.token_ids, self.received.logprobs
        return Answer(*tokens, ending.finish_reason, ending.versions, ending.routes)

    def _spans(self) -> tuple[VersionSpan, ...]:
        """Of the tokens whose version is known."""
        return joined(self.spans, VersionSpan(self.version, self.kept, self._known))

    def _so_far(self) -> Sample:
        """Without a copy: tokens that lie there stay as they are."""
        token_ids, logprobs = self.received.token_ids[: self._known], self.received.logprobs[: self._known]
        token_ids.flags.writeable = logprobs.flags.writeable = False
        return Sample(token_ids, logprobs, "abort", self._spans())

    def _throw_away(self) -> None:
        self.counts.tokens_thrown_away += self.received.size
        self.received = Received(self.expected.max_tokens)  # the draft may still be read
        self.kept, self._known, self.spans, self.draft.sample = 0, 0, (), NOTHING_YET


def joined(spans: tuple[VersionSpan, ...], span: VersionSpan) -> tuple[VersionSpan, ...]:
    """`spans` and the one behind them, as one where the version is the same."""
    if span.start == span.end:
        return spans
    if spans and (spans[-1].version, spans[-1].end) == (span.version, span.start):
        return (*spans[:-1], VersionSpan(span.version, spans[-1].start, span.end))
    return (*spans, span)
