"""Rollouts on disk: every field, one row a sample, bounded in size, never half a file."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from nemo_dapo.detokenizer import Ids
from nemo_dapo.telemetry.rollouts import SCHEMA, RolloutDump, write_rollouts
from nemo_dapo.types import Group, Prompt, Sample, Verdict, VersionSpan


def write(path: Path, groups: list[Group], rewards: Any, advantages: Any, *, step: int, max_mb: int) -> RolloutDump:
    def decode(responses: Sequence[Ids]) -> list[str]:
        return ["".join(map(chr, ids)) for ids in responses]

    return write_rollouts(path, groups, rewards, advantages, decode=decode, step=step, max_mb=max_mb)


def group(index: int, texts: list[str]) -> Group:
    prompt = Prompt(f"uid{index}", (1, 2, 3), "1+1?", "2", source="sums")
    samples = tuple(
        Sample(
            [*map(ord, text)],
            [*np.linspace(-0.5, -1.5, len(text))],
            "stop",
            (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
        )
        for text in texts
    )
    return Group(prompt, samples, tuple(Verdict(text[0] == "2", extracted=text) for text in texts), index)


def test_every_field_of_a_sample_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step-7.parquet"
    dump = write(path, [group(11, ["2!", "3!"])], [[1.0, -1.0]], [[0.7, -0.7]], step=7, max_mb=1)
    assert (dump.groups_written, dump.groups_left_out) == (1, 0)
    rows = pq.read_table(path).to_pylist()
    assert rows[1] == {
        "step": 7,
        "group": 11,
        "sample": 1,
        "uid": "uid11",
        "source": "sums",
        "problem": "1+1?",
        "ground_truth": "2",
        "response": "3!",
        "correct": False,
        "extracted": "3!",
        "error": None,
        "score": None,
        "reward": -1.0,
        "advantage": -0.7,
        "prompt_tokens": 3,
        "response_tokens": 2,
        "finish_reason": "stop",
        "mean_logprob": -1.0,
        "versions": [{"version": 3, "start": 0, "end": 1}, {"version": 4, "start": 1, "end": 2}],
    }
    assert rows[0]["correct"] is True


def test_a_verifier_error_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    failed = Group(Prompt("u", (1,), "p", "2"), group(0, ["2"]).samples, (Verdict(False, error="timeout"),))
    write(tmp_path / "a.parquet", [failed], [[0.0]], [[0.0]], step=0, max_mb=1)
    row = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert (row["correct"], row["error"]) == (None, "timeout")


def test_a_dump_stays_within_its_bound_and_counts_what_it_left_out(tmp_path: Path) -> None:
    rng = random.Random(0)  # random characters, so that compression cannot help
    groups = [group(i, ["".join(chr(rng.randrange(0x100, 0x7FF)) for _ in range(20_000))] * 2) for i in range(40)]
    numbers = [[0.0, 0.0]] * 40
    dump = write(tmp_path / "a.parquet", groups, numbers, numbers, step=0, max_mb=1)
    assert os.path.getsize(tmp_path / "a.parquet") <= 2**20
    assert dump.groups_written + dump.groups_left_out == 40
    rows = pq.read_table(tmp_path / "a.parquet")
    assert rows["group"].to_pylist() == [i for i in range(dump.groups_written) for _ in range(2)]
    assert 5 <= dump.groups_written < 40


def test_odd_text_is_written(tmp_path: Path) -> None:
    odd = "\x00 \ud800 \u202e \U0001f600"
    write(tmp_path / "a.parquet", [group(0, [odd])], [[0.0]], [[0.0]], step=0, max_mb=1)
    assert pq.read_table(tmp_path / "a.parquet")["response"][0].as_py() == "\x00 ? \u202e \U0001f600"


def test_a_dump_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, [group(0, ["2"])], [[1.0]], [[0.0]], step=0, max_mb=1)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        write(path, [group(1, ["2", "3"])], [[1.0]], [[0.0]], step=1, max_mb=1)
    assert pq.read_table(path)["step"].to_pylist() == [0]
    with pytest.raises(ValueError, match="1 groups need as many rows of rewards and advantages, got 2 and 1"):
        write(path, [group(1, ["2"])], [[1.0], [1.0]], [[0.0]], step=1, max_mb=1)


def test_an_empty_step_gives_a_file_with_the_schema(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [], [], [], step=0, max_mb=1)
    assert pq.read_table(tmp_path / "a.parquet").schema.names == SCHEMA.names
