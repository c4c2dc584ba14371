"""Rank 0 leads, the others wait with a deadline: two real processes over gloo."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nemo_dapo import coordination
from nemo_dapo.coordination import LeaderFailedError, found_alike, lead, share_batch, share_number
from nemo_dapo.parity import Parity
from nemo_dapo.types import TrainBatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORD_SECONDS = 0.5
GROUP_TIMEOUT_SECONDS = 4.0
WORK_SECONDS = 7.0  # longer than the timeout of the group: without words in between the others would give up


def batch_of(lengths: list[int], prompt_lengths: list[int]) -> TrainBatch:
    tokens = sum(lengths)
    return TrainBatch(
        tokens=torch.arange(tokens, dtype=torch.int32) + 5,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.int64),
        rollout_logprobs=-torch.arange(tokens, dtype=torch.float32) / 7,
        advantages=torch.linspace(-1, 1, len(lengths)),
        routes=routes_of(tokens) if len(lengths) != 1 else None,  # with experts, and without
        newest=torch.arange(tokens) % 3 == 1 if len(lengths) != 2 else None,  # with older tokens, and without
    )


def routes_of(tokens: int) -> Tensor:
    return (torch.arange(tokens * 6, dtype=torch.int32) * 7).view(tokens, 2, 3)


async def _work() -> str:
    await asyncio.sleep(WORK_SECONDS)
    return "sampled"


def _leads_for_long(rank: int, group: dist.ProcessGroup) -> object:
    result = lead(_work, group)
    again = lead(_quick, group)  # the words of the first one must not be taken for the second one's
    return [result, again, share_number(7 if rank == 0 else 0, group)]


async def _quick() -> str:
    return "again"


def _shares_batches(rank: int, group: dist.ProcessGroup) -> object:
    """As one replica, and as two."""
    batches = [batch_of(*sizes) if rank == 0 else None for sizes in BATCHES]
    return [share_batch(batch, group, [0, 0], torch.zeros_like) for batch in batches], [
        share_batch(batch, group, [0, 1], _odd_ones_to_the_second) for batch in batches
    ]


def _judges_a_pair(rank: int, group: dist.ProcessGroup) -> object:
    """Of two replicas the second alone holds newest tokens, an eighth of a nat apart; the others are one apart."""
    batch = batch_of([5, 5], [3, 2]) if rank == 0 else None
    if batch is not None:
        batch.newest = torch.arange(10) >= 8  # the last two of the odd sequence
        batch.rollout_logprobs[batch.newest.logical_not()] = -1.0
    mine = share_batch(batch, group, [0, 1], _odd_ones_to_the_second)
    assert mine.newest is not None
    scores = torch.where(mine.newest, mine.rollout_logprobs + 0.125, 0.0)
    found: list[object] = []
    for limit in (0.25, 0.1):
        pair = Parity(limit, group)
        found.append(pair.can_judge(mine))
        try:
            pair.judge(mine, scores)
            found.append(pair.can_judge(mine))
        except RuntimeError as error:
            found.append(str(error))
    return found


def _odd_ones_to_the_second(lengths: Tensor) -> Tensor:
    return torch.arange(lengths.numel()) % 2


BATCHES: list[tuple[list[int], list[int]]] = [([5, 5, 3], [3, 2, 1]), ([4, 2], [1, 1]), ([2], [1]), ([], [])]


async def _die() -> None:
    await asyncio.sleep(2 * WORD_SECONDS)
    os._exit(9)


async def _hang() -> None:
    time.sleep(60)  # blocks the event loop: no word is said


async def _raise() -> None:
    raise ValueError("no prompts left")


def _rank_zero_dies(rank: int, group: dist.ProcessGroup) -> object:
    return lead(_die, group)


def _rank_zero_hangs(rank: int, group: dist.ProcessGroup) -> object:
    return lead(_hang, group)


def _rank_zero_raises(rank: int, group: dist.ProcessGroup) -> object:
    return lead(_raise, group)


def _all_find_it(rank: int, group: dist.ProcessGroup) -> object:
    raise found_alike(ValueError("too far apart"))


def _rank_one_dies(rank: int, group: dist.ProcessGroup) -> object:
    if rank == 1:
        os._exit(9)
    return lead(_sleep_long, group)


async def _sleep_long() -> None:
    await asyncio.sleep(60)


def _rank_zero_raises_and_nobody_listens(rank: int, group: dist.ProcessGroup) -> object:
    coordination.LAST_WORD_SECONDS = 1.0
    if rank == 1:
        time.sleep(60)
    started = time.monotonic()
    try:
        return lead(_raise, group)
    except ValueError as error:
        return str(error), time.monotonic() - started


def _rank(rank: int, scenario: Callable[[int, dist.ProcessGroup], object], folder: Path) -> None:
    torch.set_num_threads(1)
    coordination.SECONDS_BETWEEN_WORDS = WORD_SECONDS
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_SECONDS))
    dist.barrier()  # rank 0 may end at once: the other one must have connected by then
    try:
        outcome = scenario(rank, group)
    except Exception as error:
        traceback.print_exc()
        outcome = error.__class__, str(error)
    torch.save(outcome, folder / f"rank_{rank}")
    os._exit(0)  # an orderly end would wait for a rank that is gone


def run(scenario: Callable[[int, dist.ProcessGroup], object], folder: Path, wait_for: tuple[int, ...] = (0, 1)) -> list:
    """What `scenario` returned or raised on the ranks `wait_for`; the others are killed then."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, scenario, folder), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for rank in wait_for:
            ranks[rank].join(timeout=90)
            assert ranks[rank].exitcode == 0, f"rank {rank} did not end: {ranks[rank].exitcode}"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [torch.load(folder / f"rank_{rank}", weights_only=False) for rank in wait_for]


def test_the_others_wait_through_work_that_outlasts_the_timeout_of_their_group(tmp_path: Path) -> None:
    leader, follower = run(_leads_for_long, tmp_path)
    assert leader == ["sampled", "again", 7]
    assert follower == [None, None, 7]


def test_a_batch_arrives_as_it_was_sent_at_the_ranks_that_train_on_it(tmp_path: Path) -> None:
    (of_one, share), (also_of_one, other_share) = run(_shares_batches, tmp_path)
    for i, sizes in enumerate(BATCHES):
        batch = batch_of(*sizes)
        everything = torch.arange(batch.num_sequences)
        for received, indices in (
            (of_one[i], everything),
            (also_of_one[i], everything),
            (share[i], everything[::2]),
            (other_share[i], everything[1::2]),
        ):
            part = batch.select(indices)
            assert received.held.nonzero().flatten().tolist() == indices.tolist()
            for name in ("tokens", "rollout_logprobs"):
                assert_same(getattr(received, name), getattr(part, name))
            for name in ("lengths", "prompt_lengths", "advantages"):
                assert_same(getattr(received, name), getattr(batch, name))
            for name in ("routes", "newest"):
                assert (getattr(received, name) is None) == (getattr(batch, name) is None)
                if getattr(batch, name) is not None:
                    assert_same(getattr(received, name), getattr(part, name))


def test_ranks_judge_a_pair_together_by_the_newest_tokens_that_any_of_them_holds(tmp_path: Path) -> None:
    leader, follower = run(_judges_a_pair, tmp_path)
    assert leader[:3] == follower[:3] == [True, False, True]
    assert "by 0.12 nats on average, expected at most rollout.max_logprob_gap=0.1" in leader[3]
    assert follower[3] == f"as rank 0 says: {leader[3]}"


def assert_same(value: Tensor, expected: Tensor) -> None:
    assert torch.equal(value, expected)
    assert value.dtype == expected.dtype


@pytest.mark.parametrize("scenario", [_rank_zero_dies, _rank_zero_hangs])
def test_a_leader_that_is_gone_ends_the_others_with_an_error(
    scenario: Callable[[int, dist.ProcessGroup], object], tmp_path: Path
) -> None:
    ((kind, message),) = run(scenario, tmp_path, wait_for=(1,))
    assert issubclass(kind, RuntimeError)
    assert message


def test_what_the_work_raises_is_raised_on_the_leader_and_the_others_are_told(tmp_path: Path) -> None:
    (kind, message), (other, told) = run(_rank_zero_raises, tmp_path)
    assert (kind, message) == (ValueError, "no prompts left")
    assert other is LeaderFailedError
    assert "rank 0 failed" in told


def test_what_all_ranks_find_alike_is_said_by_the_leader(tmp_path: Path) -> None:
    assert run(_all_find_it, tmp_path) == [
        (ValueError, "too far apart"),
        (LeaderFailedError, "as rank 0 says: too far apart"),
    ]


def test_a_leader_stops_its_work_when_another_rank_is_gone(tmp_path: Path) -> None:
    ((kind, message),) = run(_rank_one_dies, tmp_path, wait_for=(0,))
    assert kind is RuntimeError
    assert message.startswith("another rank is gone")


def test_a_leader_that_fails_does_not_wait_for_ranks_that_do_not_listen(tmp_path: Path) -> None:
    ((message, seconds),) = run(_rank_zero_raises_and_nobody_listens, tmp_path, wait_for=(0,))
    assert message == "no prompts left"
    assert seconds < 10  # one second's deadline, on a machine that may be busy; the work raises at once
