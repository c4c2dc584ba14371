"""Update, save, load in a second process, export: what a policy goes through between two jobs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.line import GIB, Line, seconds
from benchmarks.gpu.models import (
    HALF_BILLION,
    LOSS,
    SMALLEST,
    a_policy,
    hugging_face_logprobs,
    make_batch,
    response_positions,
    write_model,
)
from nemo_dapo.config import Precision
from nemo_dapo.telemetry.metrics import values
from nemo_dapo.types import TrainBatch

SIZES = {"cpu": SMALLEST, "cuda": HALF_BILLION}
LONGEST = {"cpu": 48, "cuda": 1024}
ROOT = Path(__file__).parents[2]


def measure(device: str) -> Iterator[Line]:
    batch = the_batch(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_model(folder / "model", **SIZES[device])
        with a_policy(path, Precision.bf16, 4 * LONGEST[device]) as policy:
            yield from train_and_save(policy, batch, folder, device)
        found = load_elsewhere(folder, device)
        yield Line("load in a second process", found["seconds"], "s")
        # The same kernels on the same numbers.
        yield Line("loaded: largest gap to what was saved", found["gap"], "nats", most=1e-6)
        yield Line("loaded: gap of the next update's gradient norm", found["grad_norm_gap"], "", most=1e-3)
        here = response_positions(batch)
        expected = torch.load(folder / "expected.pt")
        exported = hugging_face_logprobs(folder / "exported", torch.float32, batch, device)
        # bf16 arithmetic on bf16 weights against fp32 arithmetic on the same ones.
        yield Line(
            "exported: mean gap in Hugging Face", float((exported - expected)[here].abs().mean()), "nats", most=0.05
        )


def train_and_save(policy: Any, batch: TrainBatch, folder: Path, device: str) -> Iterator[Line]:
    before = policy.logprobs(batch)
    start = time.perf_counter()
    first = values(policy.update(batch, LOSS, None))
    yield Line("first update", time.perf_counter() - start, "s")
    yield Line("gradient norm", first["grad_norm"], "", most=1e6, least=1e-6)
    after = policy.logprobs(batch)
    torch.save(after, folder / "expected.pt")
    changed = (after - before).abs()[response_positions(batch)].mean()
    yield Line("log-probabilities moved by", float(changed), "nats", least=1e-4)
    (folder / "checkpoint").mkdir()
    yield Line("save", seconds(lambda: policy.take(folder / "checkpoint").complete(), device), "s")
    yield Line("export and write", seconds(lambda: policy.save_hf(folder / "exported"), device), "s")
    sizes: list[int] = []
    took = seconds(lambda: sizes.extend(weight.nbytes for _, weight in policy.export_weights()), device)
    yield Line("export alone", took, "s")
    yield Line("exported", sum(sizes) / GIB, "GiB", least=1e-6)
    (folder / "next.json").write_text(json.dumps(values(policy.update(batch, LOSS, None))["grad_norm"]))


def the_batch(device: str) -> TrainBatch:
    return make_batch(16, LONGEST[device], SIZES[device]["vocab"])


def load_elsewhere(folder: Path, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.gpu.lifecycle", str(folder), device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"the process that loads ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_and_compare(folder: Path, device: str) -> dict[str, float]:
    """In the second process."""
    batch = the_batch(device)
    with a_policy(folder / "model", Precision.bf16, 4 * LONGEST[device]) as policy:
        took = seconds(lambda: policy.load(folder / "checkpoint"), device)
        gap = (policy.logprobs(batch) - torch.load(folder / "expected.pt")).abs().max()
        norm = values(policy.update(batch, LOSS, None))["grad_norm"]
    expected = json.loads((folder / "next.json").read_text())
    return {"seconds": took, "gap": float(gap), "grad_norm_gap": abs(norm - expected) / expected}


if __name__ == "__main__":
    print(json.dumps(load_and_compare(Path(sys.argv[1]), sys.argv[2])))
