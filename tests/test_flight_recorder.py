"""What a rank has not ended, of a real group over gloo, and of records as GPUs leave them."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C import _distributed_c10d as c10d

from nemo_dapo.flight_recorder import READERS, Unfinished, unfinished


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.new_group(timeout=datetime.timedelta(seconds=200), group_desc="tests")
    assert group is not None
    dist.all_reduce(torch.ones(1), group=group)
    wait_until_all_ended()
    if rank == 0:
        began = time.time()
        work = dist.all_reduce(torch.ones(1), group=group, async_op=True)
        (found,) = unfinished()
        assert (found.operation, found.number, found.group, found.timeout) == ("gloo:all_reduce", 2, "tests", 200.0)
        assert began <= found.since <= time.time()
        assert str(found) == "gloo:all_reduce 2 of tests"
        (folder / "seen").touch()
        work.wait()
    else:
        while not (folder / "seen").exists():
            time.sleep(0.01)
        dist.all_reduce(torch.ones(1), group=group)
    wait_until_all_ended()
    dist.destroy_process_group()


def wait_until_all_ended() -> None:
    deadline = time.monotonic() + 60  # a thread of gloo's, or NCCL's watchdog, says so
    while unfinished() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert unfinished() == []


def test_a_collective_is_unfinished_until_all_ranks_have_come(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(tmp_path,), nprocs=2)


def entry(
    record: int, group: int, *, retired: bool, number: int = 7, p2p: bool = False, **others: Any
) -> dict[str, Any]:
    return {
        "record_id": record,
        "pg_id": group,
        "process_group": [str(group), ["DATA_PARALLEL_GROUP", "undefined"][group]],
        "profiling_name": "nccl:recv" if p2p else "nccl:all_gather",
        "collective_seq_id": 0 if p2p else number,
        "p2p_seq_id": number if p2p else 0,
        "is_p2p": p2p,
        "retired": retired,
        "time_created_ns": record * 10**9,
        "timeout_ms": 600_000,
    } | others


def recorded(monkeypatch: pytest.MonkeyPatch, reader: str, entries: list[dict[str, Any]]) -> None:
    def read(include_collectives: bool, only_active: bool) -> str:
        assert include_collectives
        assert not only_active
        return json.dumps({"entries": entries} if entries else {})

    monkeypatch.setattr(c10d, reader, read, raising=False)


def test_the_oldest_of_all_groups_and_of_both_kinds_of_device_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    of_gpus, of_cpus = READERS
    recorded(monkeypatch, of_gpus, [entry(9, 0, retired=False), entry(5, 1, retired=False, p2p=True, number=3)])
    recorded(monkeypatch, of_cpus, [entry(7, 0, retired=False, profiling_name="gloo:barrier")])
    assert unfinished() == [
        Unfinished("nccl:recv", 3, "group 1", 5.0, 600.0),
        Unfinished("gloo:barrier", 7, "DATA_PARALLEL_GROUP", 7.0, 600.0),
        Unfinished("nccl:all_gather", 7, "DATA_PARALLEL_GROUP", 9.0, 600.0),
    ]


def test_nothing_is_believed_before_the_last_of_a_group_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph captured, and each part of a batch of sends, is never marked as ended."""
    parts = [entry(2, 1, retired=False, p2p=True), entry(3, 1, retired=False, p2p=True), entry(4, 1, retired=True)]
    hung = entry(6, 0, retired=False, number=8)
    recorded(monkeypatch, READERS[0], [hung, entry(1, 0, retired=False), *parts, entry(5, 0, retired=True)])
    recorded(monkeypatch, READERS[1], [])
    assert [one.number for one in unfinished()] == [8]


def test_what_was_begun_before_the_phase_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of which a graph has captured all collectives has none that ended."""
    recorded(monkeypatch, READERS[0], [entry(4, 0, retired=False), entry(9, 1, retired=False)])
    recorded(monkeypatch, READERS[1], [])
    assert [one.since for one in unfinished()] == [4.0, 9.0]
    assert [one.since for one in unfinished(9.0)] == [9.0]


def test_a_recorder_that_cannot_be_read_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: bool) -> str:
        raise RuntimeError("CUDA error: operation not permitted on an event last recorded in a capturing stream")

    monkeypatch.setattr(c10d, READERS[0], refuse, raising=False)
    recorded(monkeypatch, READERS[1], [entry(1, 0, retired=False)])
    assert len(unfinished()) == 1


@pytest.mark.parametrize(("age", "expected"), [(530.0, False), (550.0, True)])
def test_it_is_about_to_end_in_the_last_tenth_of_its_time(age: float, expected: bool) -> None:
    assert Unfinished("nccl:all_gather", 1, "g", time.time() - age, 600.0).is_about_to_end() is expected
