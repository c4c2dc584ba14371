"""The five interfaces between rooms, as structural Protocols: an object that has the methods fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from nemo_dapo.telemetry.metrics import Metric
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams, Stage, TrainBatch, Verdict

if TYPE_CHECKING:
    from nemo_dapo.batching import MicroBatch
    from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan

LossFn = Callable[[Tensor, Tensor | None, "MicroBatch"], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs [T], entropy [T] or None, micro-batch) -> (loss summed over its response tokens, sums of metrics).

The sum over the mini-batch is divided once, by its response tokens; a `denominator` among the sums, a whole number, is
added up over all micro-batches and divides instead.
"""

RewardFn = Callable[[Prompt, str], Verdict]
"""(prompt, response text) -> Verdict; may be a coroutine function."""


class NonFiniteGradientError(RuntimeError):
    """An update was refused: `ranks` held a non-finite gradient, `sequences` a non-finite log-probability or advantage."""

    def __init__(self, grad_norm: float, ranks: Sequence[int], sequences: Sequence[int]) -> None:
        self.grad_norm, self.ranks, self.sequences = grad_norm, list(ranks), list(sequences)
        super().__init__(
            f"gradient norm {grad_norm}: non-finite gradient on ranks {self.ranks}, non-finite log-probability or "
            f"advantage in sequences {self.sequences} of the mini-batch; the weights were left as they were"
        )


class TakenPolicy(Protocol):
    """What a rank is to write of one checkpoint."""

    def write(self) -> list[Path]:
        """Write it; returns the files. No collective: it may run on another thread."""
        ...

    def finish(self) -> list[Path]:
        """Once every rank has written, and on the thread of all collectives: further files that this rank wrote."""
        ...


class Policy(Protocol):
    """The model that is trained. Every method is collective: all ranks call it, in the same order."""

    @property
    def replica(self) -> int:
        """The data-parallel replica that this rank belongs to; all its ranks work on the same sequences."""
        ...

    @property
    def stage(self) -> Stage:
        """What the policy is ready for, the same on every rank."""
        ...

    def enter(self, stage: Stage) -> None:
        """Have on the device what `stage` needs and nothing else, where servers share it. Raises RuntimeError for an order
        that cannot be. Called by `nemo_dapo.stages.Stages`, which moves the servers as well."""
        ...

    def memory_record(self) -> dict[str, Metric]:
        """What this rank measured of its memory at the stages since the last call."""
        ...

    def owners(self, lengths: Tensor, minibatches: Sequence[Tensor]) -> Tensor:
        """[B] int64: the replica that trains on each sequence of `lengths` [B] when `minibatches` (indices) are its
        optimizer steps; the same on every rank."""
        ...

    def logprobs(self, batch: TrainBatch, minibatches: Sequence[Tensor] | None = None) -> Tensor:
        """Log-probability of every token of `batch` given the ones before it: [T] float32 on the host, the same on every
        rank of the replica, aligned with `batch.tokens`; 0 on prompt tokens and on what other replicas train on."""
        ...

    def reference_logprobs(self, batch: TrainBatch, minibatches: Sequence[Tensor] | None = None) -> Tensor:
        """The same under the frozen reference model, which exists only with a KL term."""
        ...

    def update(
        self, batch: TrainBatch, loss_fn: LossFn, old_logprobs: Tensor | None, ref_logprobs: Tensor | None = None
    ) -> dict[str, Metric]:
        """One optimizer step on `batch`; the loss is divided once by its number of response tokens. `old_logprobs` [T]
        None means theta_old = theta (the first update of a rollout step). Returns what to record, the same on every rank.
        Raises NonFiniteGradientError on every rank."""
        ...

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, by its Hugging Face name, full and unsharded, on every rank."""
        ...

    def take(self, path: Path, *, portable: bool, apart: bool) -> TakenPolicy:
        """Its state at this moment, to be written to the existing, empty directory `path`; taken `apart`, the policy may
        change before it is written. A portable checkpoint can be loaded under any layout of ranks."""
        ...

    def load(self, path: Path) -> None: ...


class RolloutEngine(Protocol):
    """The model that samples. Lives on rank 0."""

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        """`n` samples; with `drafts`, one each, from what these have, which are kept up to date meanwhile."""
        ...

    def begin_update(self, version: int, seats: Sequence[Seat]) -> UpdatePlan:
        """Who sends the weights of `version` to whom, given where each rank is."""
        ...

    def finish_update(self, everyone: Sequence[Sent]) -> None:
        """Have the servers load what the ranks sent; must follow `begin_update`."""
        ...

    @property
    def must_repeat(self) -> bool:
        """Whether all servers died of the last update to their devices and are back without it: it must be sent again."""
        ...

    def sleep(self) -> None:
        """Give up the device, weights included, where the servers share it with the trainer."""
        ...

    def wake_weights(self) -> None:
        """Have room for weights again: `finish_update` may be called, `generate` not yet."""
        ...

    def wake_up(self) -> None:
        """Have room for everything: `generate` may be called."""
        ...

    def metrics(self) -> dict[str, float]:
        """What is worth recording of the time since the last call, by full name."""
        ...


class Rewarder(Protocol):
    """Scores the samples of one prompt; an error of the verifier is a Verdict with `error`, never an exception."""

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]: ...


class PromptLoader(Protocol):
    """Endless, seeded, reshuffled each epoch; `state_dict` restores the exact position."""

    def next(self) -> Prompt: ...

    def record(self, uid: str, correct: int, attempts: int) -> None:
        """What became of one visit of a problem."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
