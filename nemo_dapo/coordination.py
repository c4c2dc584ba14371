"""Rank 0 leads: it samples and evaluates while the other ranks wait, and hands them the batch.

A rollout may take an hour, and no wait may be without a deadline. So rank 0 says every few seconds that it is at work: the
others wait for the next word only, and a rank 0 that hangs or dies is noticed within the group's own timeout. A rank 0 that
fails says so as its last word; one that cannot reach another rank any more stops its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.types import TrainBatch

log = logging.getLogger(__name__)

T = TypeVar("T")
AT_WORK, DONE, FAILED, STOPPED = 0, 1, 2, 3
SECONDS_BETWEEN_WORDS = 15.0
SECONDS_BETWEEN_LOOKS = 0.5  # of rank 0 at whether it is to stop
LAST_WORD_SECONDS = 10.0  # for telling the others of a failure: some of them may be gone
CANCEL_SECONDS = 60.0  # for work to end that is cancelled


class LeaderFailedError(RuntimeError):
    """Rank 0 failed at what the other ranks waited for; the cause is in its own error."""

    is_consequence = True  # see ending.Ending.say


class StoppedError(Exception):
    """The run was asked to stop; what rank 0 was at, if anything, was cancelled."""


def lead(
    work: Callable[[], Awaitable[T]], group: dist.ProcessGroup | None, stop: threading.Event | None = None
) -> T | None:
    """Run `work()` on rank 0 in an event loop of its own and return its result there; other ranks wait and return None.

    Raises what `work` raises on rank 0, and LeaderFailedError then on the others; StoppedError on every rank when rank 0's
    `stop` is set before the work is done. A rank that is gone is a RuntimeError on rank 0 at its next word; a rank 0 that
    is gone, or silent for longer than the timeout of `group`, is gloo's RuntimeError on the others.
    """
    if dist.get_rank() == 0:
        return asyncio.run(_lead(work, group, stop or threading.Event()))
    word = torch.tensor(AT_WORK)
    while word.item() == AT_WORK:
        dist.broadcast(word, src=0, group=group)
    if word.item() == FAILED:
        raise LeaderFailedError("rank 0 failed while this rank waited for it: its error names the cause")
    if word.item() == STOPPED:
        raise StoppedError
    return None


def found_alike(error: Exception) -> Exception:
    """What to raise for an error that every rank finds at once: rank 0 says it, the others leave the word to it."""
    return error if dist.get_rank() == 0 else LeaderFailedError(f"as rank 0 says: {error}")


@contextlib.contextmanager
def found_by_all() -> Iterator[None]:
    """A ValueError inside is one that every rank finds at once."""
    try:
        yield
    except ValueError as error:
        raise found_alike(error) from error


async def never() -> Any:
    """Stands for the work on the ranks that do not lead."""
    raise AssertionError("only rank 0 leads")


async def _lead(work: Callable[[], Awaitable[T]], group: dist.ProcessGroup | None, stop: threading.Event) -> T:
    task = asyncio.ensure_future(work())
    try:
        await _say_at_work_until_done(task, group, stop)
    except RuntimeError as problem:
        await _cancel(task)
        raise RuntimeError(
            f"another rank is gone while rank 0 was at work; its error names the cause: {problem}"
        ) from problem
    if not task.done():
        await _cancel(task)
        dist.broadcast(torch.tensor(STOPPED), src=0, group=group)
        raise StoppedError
    if task.exception() is not None:
        _say_failed(group)
    else:
        dist.broadcast(torch.tensor(DONE), src=0, group=group)
    return task.result()


async def _cancel(task: asyncio.Future[T]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_SECONDS)


async def _say_at_work_until_done(
    task: asyncio.Future[T], group: dist.ProcessGroup | None, stop: threading.Event
) -> None:
    """Returns when the task is done or `stop` is set."""
    said = time.monotonic()
    while not (await asyncio.wait({task}, timeout=min(SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_WORDS)))[0]:
        if stop.is_set():
            return
        if time.monotonic() - said >= SECONDS_BETWEEN_WORDS:
            await asyncio.to_thread(dist.broadcast, torch.tensor(AT_WORK), 0, group)
            said = time.monotonic()


def _say_failed(group: dist.ProcessGroup | None) -> None:
    try:
        word = dist.broadcast(torch.tensor(FAILED), src=0, group=group, async_op=True)
        word.wait(datetime.timedelta(seconds=LAST_WORD_SECONDS))
    except RuntimeError as problem:  # the work's own error is the one to raise
        log.warning("rank 0 failed and could not tell every other rank: %s", problem)


def share_batch(
    batch: TrainBatch | None,
    group: dist.ProcessGroup | None,
    replicas: Sequence[int],
    owners: Callable[[Tensor], Tensor],
) -> TrainBatch:
    """Rank 0's batch, to each rank its part of it; the others pass None. Tensors travel as they are, nothing is pickled.

    All ranks receive what is one number a sequence; tokens go from rank 0 to the first rank of the replica that trains on
    them, and from there to its others, so that rank 0 sends each token once, however many ranks there are. `replicas`
    holds each rank's replica; `owners(lengths)` [B] int64, the same on every rank, names each sequence's.
    """
    sequences = share_number(0 if batch is None else batch.num_sequences, group)

    def share(name: str, dtype: torch.dtype) -> Tensor:
        values = torch.empty(sequences, dtype=dtype) if batch is None else getattr(batch, name).contiguous()
        if sequences:
            dist.broadcast(values, src=0, group=group)
        return values

    lengths, prompt_lengths = share("lengths", torch.int64), share("prompt_lengths", torch.int64)
    advantages = share("advantages", torch.float32)
    kinds = _share_kinds(batch, group)
    owner = owners(lengths)
    rank = dist.get_rank()
    # The others' parts first: rank 0's own replica waits for nobody else.
    for replica in sorted(set(replicas), key=lambda one: (one == replicas[0], one)):
        ranks = [r for r, its in enumerate(replicas) if its == replica]
        if rank != 0 and rank not in ranks:
            continue
        held = owner == replica
        size = int((lengths * held).sum())
        if batch is None:
            here = {name: kind.new_empty(size, *kind.shape[1:]) for name, kind in kinds.items()}
        else:
            part = batch.select(held.nonzero().flatten())
            here = {name: getattr(part, name) for name in kinds}
        for values in here.values():
            if size:
                _pass_on(values, ranks, group)
    return TrainBatch(lengths=lengths, prompt_lengths=prompt_lengths, advantages=advantages, held=held, **here)


def _share_kinds(batch: TrainBatch | None, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """On every rank the names of what rank 0's batch has of each token, with empty tensors of their kinds."""
    kinds = {"tokens": torch.empty(0, dtype=torch.int32), "rollout_logprobs": torch.empty(0, dtype=torch.float32)}
    routes = _share_kind_of_routes(None if batch is None else batch.routes, group)
    if routes is not None:
        kinds["routes"] = routes
    if share_number(int(batch is not None and batch.newest is not None), group):
        kinds["newest"] = torch.empty(0, dtype=torch.bool)
    return kinds


def _share_kind_of_routes(routes: Tensor | None, group: dist.ProcessGroup | None) -> Tensor | None:
    """On every rank an empty tensor [0, L, K] of the dtype of rank 0's routes; None where it has none."""
    kind = torch.zeros(3, dtype=torch.int64)
    if routes is not None:
        kind = torch.tensor([*routes.shape[1:], routes.element_size()])
    dist.broadcast(kind, src=0, group=group)
    layers, top_k, width = kind.tolist()
    return torch.empty(0, layers, top_k, dtype=torch.uint8 if width == 1 else torch.int32) if width else None


def _pass_on(values: Tensor, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """From rank 0 to the first of `ranks`, and from that one to the others."""
    rank, first = dist.get_rank(), ranks[0]
    if rank == 0 and first != 0:
        dist.send(values, first, group=group)
    elif rank != first:
        dist.recv(values, first, group=group)
    else:
        if first != 0:
            dist.recv(values, 0, group=group)
        for other in ranks[1:]:
            dist.send(values, other, group=group)


def share_number(value: int, group: dist.ProcessGroup | None) -> int:
    """Rank 0's integer on every rank."""
    shared = torch.tensor(value)
    dist.broadcast(shared, src=0, group=group)
    return int(shared)


def is_true_anywhere(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether `flag` holds on some rank, on every rank."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags)
