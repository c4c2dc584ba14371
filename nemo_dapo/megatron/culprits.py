"""Who made a gradient non-finite: the ranks whose own part of it was, and the sequences with a number that was.

Shapes: T packed tokens of a micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.batching import MicroBatch
from nemo_dapo.collectives import gather_json


class Culprits:
    """What the micro-batches since `clear` showed on this rank; everything is left on the device until it is asked for."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._bad_tokens: list[tuple[Tensor, Tensor]] = []
        self._gradient_finite = torch.ones((), dtype=torch.bool)

    def see_tokens(self, logprobs: Tensor, micro: MicroBatch) -> None:
        """One micro-batch, whose tokens scored `logprobs` [T]."""
        finite = logprobs.detach().isfinite() & micro.advantages.isfinite()
        self._bad_tokens.append((micro.sequence, micro.mask & ~finite))

    def see_gradient(self, model: list[Any]) -> None:
        """This rank's gradient, before it is reduced over ranks."""
        own = [part for chunk in model for b in chunk.buffers + chunk.expert_parallel_buffers for part in own_parts(b)]
        self._gradient_finite = torch.stack([part.isfinite().all() for part in own]).all()

    def gather(self) -> tuple[list[int], list[int]]:
        """Ranks whose own gradient was not finite, and the sequences with a non-finite number. Collective."""
        sequences = {int(s) for sequence, bad in self._bad_tokens for s in sequence[bad].tolist()}
        everyone = gather_json((bool(self._gradient_finite), sorted(sequences)))
        ranks = [rank for rank, (finite, _) in enumerate(everyone) if not finite]
        return ranks, sorted(set(itertools.chain.from_iterable(found for _, found in everyone)))


def own_parts(buffer: Any) -> Iterator[Tensor]:
    """The parts of a gradient buffer that hold nothing but this rank's own sums.

    That is all of it, unless `overlap_grad_reduce` has begun to reduce: the reduce-scatter writes the sum over ranks into
    this rank's shard, where another rank's non-finite value would look like ours.
    """
    group = buffer.data_parallel_group
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    is_reduced = size > 1 and buffer.ddp_config.overlap_grad_reduce
    for bucket in buffer.buckets:
        shards = bucket.grad_data.view(size, -1)
        yield from (shards[shard] for shard in range(size) if not (is_reduced and shard == rank))
