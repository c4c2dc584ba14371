"""A mixture of experts in vLLM's CPU build: what an update loads is what its kernel computes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.child import run_module
from tests.tiny import save_tiny_model


@pytest.mark.slow
@pytest.mark.vllm
def test_updates_reach_the_experts_kernel_in_the_layout_that_it_reads(tmp_path: Path) -> None:
    """One engine in one process, some 20 s: a whole server for it would take another minute."""
    pytest.importorskip("vllm")
    for seed, name in enumerate(("one", "other")):
        save_tiny_model(tmp_path / name, family="qwen3_moe", tied=True, heads=2, kv_heads=1, seed=seed)
    said = run_module("vllm_mixture", tmp_path)
    gaps = json.loads(said.splitlines()[-1])
    assert [*gaps] == ["loaded", "updated", "updated again"]
    assert max(gaps.values()) < 1e-4, gaps
