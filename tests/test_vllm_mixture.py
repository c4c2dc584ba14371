"""A mixture of experts in vLLM's CPU build: what an update loads is what its kernel computes with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.vllm
def test_updates_reach_the_experts_kernel_in_the_layout_that_it_reads(tmp_path: Path) -> None:
    """One engine in one process, some 20 s: a whole server for it would take another minute."""
    pytest.importorskip("vllm")
    for seed, name in enumerate(("one", "other")):
        save_tiny_model(tmp_path / name, family="qwen3_moe", tied=True, heads=2, kv_heads=1, seed=seed)
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_mixture", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert [*gaps] == ["loaded", "updated", "updated again"]
    assert max(gaps.values()) < 1e-4, gaps
