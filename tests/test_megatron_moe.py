"""A mixture of experts under RL, against Hugging Face's: how the experts' load is counted under every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.moe_scenarios import LAYERS, LAYOUTS, MODEL
from tests.policy_scenarios import make_train_batch

ROOT = Path(__file__).parents[1]
EXPERTS, TOP_K = 4, 2
EVERY = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    done = subprocess.run(
        [sys.executable, "-m", "tests.moe_scenarios", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Of every layout, by the scenario's name."""
    return {name: found for ranks in LAYOUTS for name, found in torch.load(folder / f"world{ranks}.pt").items()}


@pytest.fixture(scope="module")
def counts(folder: Path) -> Tensor:
    """[L, E]: tokens of the batch that go to each expert, as Hugging Face's router sends them."""
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / MODEL, dtype=torch.float32)
    batch, total = make_train_batch(), torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    with torch.no_grad():
        for tokens in batch.tokens.split(batch.lengths.tolist()):
            logits = model(tokens.unsqueeze(0), output_router_logits=True).router_logits  # L x [T, E]
            chosen = torch.stack(list(logits)).topk(TOP_K).indices
            total += torch.nn.functional.one_hot(chosen, EXPERTS).sum((1, 2))
    assert int(total.sum()) == LAYERS * TOP_K * batch.tokens.numel()
    return total


@pytest.mark.parametrize("name", [f"{name}{how}" for name in EVERY for how in ("", ", recomputed")])
def test_each_token_is_counted_once_where_its_router_sends_it(
    name: str, results: dict[str, Any], counts: Tensor
) -> None:
    load = counts.amax(1) / counts.double().mean(1)
    found = results[f"load, {name}"]
    assert torch.equal(found["counts"][0], counts)
    assert int(found["counts"][1].sum()) == int(counts.sum()), "the second update counts anew"
    assert not torch.equal(found["counts"][1], counts), "it has other weights"
    assert found["moe_load"] == pytest.approx(float(load.mean()), rel=1e-12)
    assert found["moe_load_max"] == pytest.approx(float(load.max()), rel=1e-12)
    assert found["moe_unused"] == float((counts == 0).double().mean())


@pytest.mark.parametrize("name", EVERY)
def test_attention_under_context_parallelism_is_told_the_filled_up_lengths(name: str, results: dict[str, Any]) -> None:
    """Transformer Engine asserts `cu_seqlens_q_padded` and `cu_seqlens_kv_padded` there for packed sequences."""
    for said in results[f"attention, {name}"]:
        for of in ("q", "kv"):
            filled_up = said[f"cu_seqlens_{of}_padded"]
            if name == "context":
                assert torch.equal(filled_up, said[f"cu_seqlens_{of}"])
                assert not (filled_up.diff() % 4).any()
            else:
                assert filled_up is None
