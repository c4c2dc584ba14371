"""The nouns of one step, in the order in which they come to be.

    Prompt -> Sample x G -> Verdict x G -> Group -> TrainBatch

Shapes: N prompts a step, G samples a prompt, B = N * G sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

# Bound on a score: Eq. 9 squares and sums those of a group in float32, whose largest number is 3.4e38. 16,384 samples of
# this size fit with room to spare.
MAX_SCORE = 1e15
BYTE_EXPERTS = 256  # of so many a byte can name one


class Stage(Enum):
    """What policy and servers are ready for; see nemo_dapo.stages."""

    score = "score"
    train = "train"
    sync = "sync"
    generate = "generate"


@dataclass(frozen=True)
class Prompt:
    """One problem, templated and tokenised.

    `uid` identifies the problem by content: two problems with the same text and answer have the same uid, in every run.
    """

    uid: str
    token_ids: tuple[int, ...]
    problem: str
    ground_truth: str
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How the rollout engine draws tokens. `top_k = -1` switches top-k off; `max_tokens` counts the response alone."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 20480


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens `start <= t < end` were sampled under weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One response of R tokens, as the rollout engine returned it.

    `token_ids` [R] int32 ends with the end-of-sequence token when the model produced one; `logprobs` [R] float32 holds the
    engine's own log-probability (nats) of each; `finish_reason` is `stop` (the model ended), `length` (cut at `max_tokens`)
    or `abort`. Both arrays are read-only, made from whatever sequence is given: eight bytes a token, where Python's own
    numbers take eighty. The text is made where it is needed: `nemo_dapo.detokenizer`.

    `routes` [P + R - 1, L, K] uint8 or uint16, where the engine tells them, are the experts that prompt and response went
    to in all L layers of the model; the last token went nowhere. They are no part of what is stored of a sample.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: str
    versions: tuple[VersionSpan, ...] = ()
    routes: NDArray[np.integer] | None = None

    if TYPE_CHECKING:  # what is given may be any sequence, what is held is an array

        def __init__(
            self,
            token_ids: ArrayLike,
            logprobs: ArrayLike,
            finish_reason: str,
            versions: tuple[VersionSpan, ...] = (),
            routes: NDArray[np.integer] | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _read_only(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", _read_only(self.logprobs, np.float32))

    def _key(self) -> tuple[Any, ...]:
        return self.token_ids.tobytes(), self.logprobs.tobytes(), self.finish_reason, self.versions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def _read_only(values: ArrayLike, dtype: type) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(values, dtype)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


NOTHING_YET = Sample((), (), "abort")


@dataclass
class Draft:
    """What a sample has so far: the engine keeps it up to date, and goes on from it where it is given one.

    Tokens whose weight version is not known for sure are left out. Once `sample` has another finish reason than `abort` it
    is whole.
    """

    sample: Sample = NOTHING_YET

    @property
    def is_whole(self) -> bool:
        return self.sample.finish_reason != "abort"


@dataclass(frozen=True)
class Verdict:
    """What a reward function says of one response.

    `correct` drives the filter (Eq. 11) and accuracy. `score` is the unshaped reward, within MAX_SCORE of 0; None means
    the configured `reward.correct` / `reward.incorrect`. `error` is set when the verifier itself failed: then `correct`
    says nothing.
    """

    correct: bool
    extracted: str | None = None
    error: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Group:
    """G samples of one prompt with their verdicts. `index` is the submission order within the run."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]
    index: int = 0

    @property
    def num_correct(self) -> int:
        return sum(v.correct for v in self.verdicts)

    @property
    def num_errors(self) -> int:
        return sum(v.error is not None for v in self.verdicts)


@dataclass(frozen=True)
class OpenGroup:
    """A group that no step has taken yet: finished, or None where its samples are still being `drafted`."""

    index: int
    prompt: Prompt
    group: Group | None
    drafted: tuple[Sample, ...] = ()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those of the group, or what there is of them."""
        return self.group.samples if self.group else self.drafted


@dataclass
class TrainBatch:
    """B = N * G sequences, flat on the host; sequences of one group are adjacent.

    Every rank knows all sequences, and has the tokens of those that are `held`: the ones its replica trains on.

    Example with two sequences, `p` prompt and `r` response tokens:

        tokens            p p p r r | p p r r r      [T]  int32, the held sequences back to back
        lengths           5, 5                       [B]  int64
        prompt_lengths    3, 2                       [B]  int64
        rollout_logprobs  0 0 0 a b | 0 0 c d e      [T]  float32, of tokens[t]; 0 on prompt tokens
        advantages        A_0, A_1                   [B]  float32, Eq. 9: one value a sequence
        held              1, 1                       [B]  bool; None: all
        routes            the experts of tokens[t]   [T, L, K]  uint8 or int32, of the L layers that have any, or of all;
                                                                None: unknown
        newest            0 0 0 0 1 | 0 0 1 1 1      [T]  bool, whether the weights that this step trains from, and no older
                                                          ones, sampled tokens[t] of a response; None: all of them
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    held: Tensor | None = None
    routes: Tensor | None = None
    newest: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return self.lengths.numel()

    @property
    def num_response_tokens(self) -> int:
        """Of all sequences, held or not."""
        return int((self.lengths - self.prompt_lengths).sum())

    @property
    def held_lengths(self) -> Tensor:
        """[B] how many tokens of each sequence are here: all or none."""
        return self.lengths if self.held is None else self.lengths * self.held

    def token_indices(self, indices: Tensor) -> Tensor:
        """Positions in `tokens` of the held ones of the sequences `indices` [b] int64, in that order."""
        import torch  # here: reward workers read Prompt and Verdict without torch's 3 s and 300 MB

        spans = [torch.arange(span.start, span.stop) for span in self._spans(indices)]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def _spans(self, indices: Tensor) -> list[slice]:
        ends = self.held_lengths.cumsum(0)
        starts = (ends - self.held_lengths)[indices].tolist()
        return [slice(start, end) for start, end in zip(starts, ends[indices].tolist(), strict=True)]

    def select(self, indices: Tensor) -> TrainBatch:
        """The sub-batch of the sequences `indices` [b] int64, in that order."""
        import torch

        spans = self._spans(indices) or [slice(0)]
        return TrainBatch(
            tokens=torch.cat([self.tokens[span] for span in spans]),
            lengths=self.lengths[indices],
            prompt_lengths=self.prompt_lengths[indices],
            rollout_logprobs=torch.cat([self.rollout_logprobs[span] for span in spans]),
            advantages=self.advantages[indices],
            held=None if self.held is None else self.held[indices],
            routes=None if self.routes is None else torch.cat([self.routes[span] for span in spans]),
            newest=None if self.newest is None else torch.cat([self.newest[span] for span in spans]),
        )
