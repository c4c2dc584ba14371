"""The GPU proof is ready for a machine with a GPU: its rows take their way on a CPU, at a tiny size, and its parts fit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks.gpu import table, update
from benchmarks.gpu.line import Line
from benchmarks.gpu.models import SMALLEST
from nemo_dapo.types import TrainBatch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Line]]:
    """Of all rows, run dry in one process of their own, by row and by what they say."""
    file = tmp_path_factory.mktemp("gpu_proof") / "lines"
    command = [sys.executable, "-m", "benchmarks.gpu.table", "--device", "cpu", "--lines", str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
    found: dict[str, dict[str, Line]] = {row: {} for row in table.ROWS}
    for text in file.read_text().splitlines():
        said = json.loads(text)
        found[said["row"]][said["line"]["what"]] = Line(**said["line"])
    return found


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU tests/test_gpu.py runs them on it")
@pytest.mark.parametrize("row", table.ROWS)
def test_a_row_takes_its_way_on_a_cpu(row: str, lines: dict[str, dict[str, Line]]) -> None:
    assert len(lines[row]) > 1
    for line in lines[row].values():
        assert math.isfinite(line.value), line
        assert line.holds, line


def test_a_line_holds_within_its_bounds_and_never_without_a_number() -> None:
    assert Line("x", 2.0, most=2.0, least=2.0).holds
    assert not Line("x", 2.1, most=2.0).holds
    assert not Line("x", 1.9, least=2.0).holds
    assert not Line("x", math.nan, most=2.0).holds
    assert not table.failed("why").holds


def test_a_row_that_fails_is_a_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(device: str):
        yield Line("before", 1.0)
        raise MemoryError(device)

    monkeypatch.setattr("benchmarks.gpu.update.measure", measure)
    found = list(table.in_this_process("update", "cpu"))
    assert [line.what for line in found] == ["before", "failed: MemoryError"]
    assert "MemoryError: cpu" in capsys.readouterr().err
    assert table.render("update", found[1]).endswith("| ≤ 0 | **does not hold** |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("arguments", "said"), [([], "torch sees no CUDA device"), (["scorers"], "no row scorers")])
def test_what_cannot_run_is_refused_before_anything_does(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["table", *arguments])
    with pytest.raises(SystemExit):
        table.arguments()
    assert said in capsys.readouterr().err


def test_the_arithmetic_of_an_update_counts_weights_and_causal_pairs() -> None:
    """Per layer: query and output 64², key and value 64 · 32 each, three matrices of 64 · 128; the head 320 · 64."""
    lengths = torch.tensor([10, 30])
    batch = TrainBatch(torch.zeros(40, dtype=torch.int64), lengths, lengths // 2, torch.zeros(40), torch.zeros(2))
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 320 * 64
    # A pair of tokens: 2 · 64 for its score and 2 · 64 for the value, in each layer, three times with the backward pass.
    pairs = (10**2 + 30**2) / 2
    assert update.training_flops(batch, **SMALLEST) == 6 * weights * 40 + 3 * 2 * (2 * 64 + 2 * 64) * pairs


def test_the_wheels_are_of_the_versions_that_are_tested_here() -> None:
    def pins(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / name).read_text().splitlines()
        found = [Requirement(line) for line in text if line[:1].isalpha()]
        return {requirement.name.lower().replace("_", "-"): str(requirement.specifier) for requirement in found}

    tested, carried = pins("cpu.txt"), pins("gpu_proof.txt")
    assert {"megatron-core", "megatron-bridge", "hydra-core", "omegaconf"} <= carried.keys()
    for name, version in carried.items():
        assert tested[name] == version, name
