"""Layouts against one rank: a subset in which every two settings meet; `make matrix` runs them all."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parallelism
from tests.parallel_matrix import Case, case_of, cases, compared, is_equal, pairs_of, pairwise
from tests.policy_scenarios import Layout

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_layout_has_the_gradient_of_one_rank() -> None:
    command = [sys.executable, "-c", "import runpy; runpy.run_path('benchmarks/parallelism.py', run_name='__main__')"]
    done = subprocess.run(
        [*command, "--pairwise"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["failed"] == 0
    assert said["combinations"] == len(pairwise(cases()))


def test_the_subset_lets_every_two_settings_meet_that_meet_anywhere() -> None:
    every = cases()
    chosen = pairwise(every)
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, every))
    assert len(chosen) < len(every) / 8


def test_the_matrix_has_every_kind_of_parallelism_alone_and_together() -> None:
    layouts = {(case.layout, case.ranks) for case in cases()}
    for layout, ranks in (
        (Layout(), 4),
        (Layout(tp=4, sp=True), 4),
        (Layout(pp=4), 4),
        (Layout(pp=2, vpp=2, cp=2), 4),
        (Layout(cp=4), 4),
        (Layout(ep=4), 4),
        (Layout(tp=2, sp=True, cp=2, ep=4), 4),
        (Layout(pp=2, vpp=2, ep=2), 4),
    ):
        assert (layout, ranks) in layouts
    assert Case("dense, tied", 4, Layout(tp=2, cp=2), "packs").data_parallel == 1


def test_a_run_that_was_cut_goes_on_behind_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, asked = cases()[:4], []

    def run(folder: Path, cases: list[Case]) -> Iterator[dict[str, Any]]:
        asked.append(cases)
        yield from (asdict(case) for case in cases)

    monkeypatch.setattr(parallelism.matrix, "run", run)
    cut = [*itertools.islice(parallelism.measured(wanted, tmp_path / "results"), 2)]
    again = [*parallelism.measured(wanted, tmp_path / "results")]
    assert asked == [wanted, wanted[2:]]
    assert again[:2] == cut
    assert [case_of(result) for result in again] == wanted


def test_a_difference_is_seen() -> None:
    import torch

    one = {"gradient": {"w": torch.ones(4)}, "norm": 2.0, "weights": {"w": torch.ones(4)}, "logprobs": torch.zeros(3)}
    assert is_equal(compared(one, one))
    for name, wrong in (
        ("gradient", {"w": torch.tensor([1.0, 1.0, 1.0, 1.0001])}),
        ("norm", 2.0001),
        ("weights", {"w": torch.full((4,), 1.0001)}),
        ("logprobs", torch.tensor([0.0, 2e-4, 0.0])),
    ):
        assert not is_equal(compared(one | {name: wrong}, one))
