"""Rank 0 leads: it samples and evaluates while the other ranks wait, and hands them the batch.

A rollout may take an hour, and no wait may be without a deadline. So rank 0 says every few seconds that it is at work: the
others wait for the next word only, and a rank 0 that hangs or dies is noticed within the group's own timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.types import TrainBatch

T = TypeVar("T")
AT_WORK, DONE = 0, 1
SECONDS_BETWEEN_WORDS = 15.0


def lead(work: Callable[[], Awaitable[T]], group: dist.ProcessGroup | None) -> T | None:
    """Run `work()` on rank 0 in an event loop of its own and return its result there; other ranks wait and return None.

    Raises what `work` raises on rank 0, which ends the job; on the others a RuntimeError of gloo's when rank 0 is silent
    for longer than the timeout of `group`.
    """
    if dist.get_rank() == 0:
        return asyncio.run(_with_words(work, group))
    word = torch.tensor(AT_WORK)
    while word.item() != DONE:
        dist.broadcast(word, src=0, group=group)
    return None


async def _with_words(work: Callable[[], Awaitable[T]], group: dist.ProcessGroup | None) -> T:
    finished = asyncio.Event()
    words = asyncio.create_task(_say_at_work(finished, group))
    try:
        result = await work()
    finally:
        finished.set()
        await words
    dist.broadcast(torch.tensor(DONE), src=0, group=group)
    return result


async def _say_at_work(finished: asyncio.Event, group: dist.ProcessGroup | None) -> None:
    while True:
        try:
            await asyncio.wait_for(finished.wait(), SECONDS_BETWEEN_WORDS)
            return
        except asyncio.TimeoutError:
            await asyncio.to_thread(dist.broadcast, torch.tensor(AT_WORK), 0, group)


def share_batch(batch: TrainBatch | None, group: dist.ProcessGroup | None) -> TrainBatch:
    """Rank 0's batch on every rank; the others pass None. Tensors travel as they are, nothing is pickled."""
    sizes = torch.zeros(2, dtype=torch.int64)
    if batch is not None:
        sizes = torch.tensor([batch.num_sequences, batch.tokens.numel()])
    dist.broadcast(sizes, src=0, group=group)
    sequences, tokens = sizes.tolist()

    def share(name: str, size: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(size, dtype=dtype) if batch is None else getattr(batch, name).contiguous()
        if size:
            dist.broadcast(values, src=0, group=group)
        return values

    return TrainBatch(
        tokens=share("tokens", tokens, torch.int64),
        lengths=share("lengths", sequences, torch.int64),
        prompt_lengths=share("prompt_lengths", sequences, torch.int64),
        rollout_logprobs=share("rollout_logprobs", tokens, torch.float32),
        advantages=share("advantages", sequences, torch.float32),
    )


def share_number(value: int, group: dist.ProcessGroup | None) -> int:
    """Rank 0's integer on every rank."""
    shared = torch.tensor(value)
    dist.broadcast(shared, src=0, group=group)
    return int(shared)
