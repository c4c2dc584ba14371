"""Fixtures that several test files share: tiny models, and one vLLM server for the whole session."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.rollout.engine import VLLMEngine
from tests.policy_runs import PolicyRuns
from tests.tiny import save_tiny_model

ROPE_THETA = 500000.0  # not 10,000: an importer that ignores the model's value must fail
# Lean settings for a model of this size on a CPU host; each cuts start-up time or memory.
TINY_VLLM = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 256}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, saying so, on a host without CUDA."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with their tokenizers: `tied` (Qwen2, shared embeddings) and `untied` (Qwen3)."""
    folder = tmp_path_factory.mktemp("tiny_models")
    # vLLM on a CPU has no heads smaller than 32.
    size: dict[str, Any] = {"hidden": 128, "heads": 4, "rope_theta": ROPE_THETA}
    return {
        "tied": save_tiny_model(folder / "tied", family="qwen2", tied=True, **size),
        "untied": save_tiny_model(folder / "untied", family="qwen3", tied=False, seed=1, **size),
    }


def tiny_engine(model_path: Path, run_dir: Path, **rollout: object) -> VLLMEngine:
    """A float32 engine with one server on `model_path`; the caller closes it. Skips where vLLM is not installed."""
    from transformers import AutoTokenizer

    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this environment")
    options: dict[str, object] = {"max_prompt_length": 128, "max_response_length": 384, "vllm": TINY_VLLM, **rollout}
    config = RolloutConfig(**options)  # type: ignore[arg-type]
    return VLLMEngine.start(
        config, model_path, Precision.fp32, run_dir, AutoTokenizer.from_pretrained(model_path), seed=0
    )


@pytest.fixture(scope="session")
def vllm_engine(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    """The one server of the session, on `tiny_models["tied"]`. Its weights are whatever the last test left: a test that
    looks at numbers pushes the weights it means first (`update_weights`, about 0.1 s)."""
    with pytest.MonkeyPatch.context() as patch:
        root = Path(__file__).parents[1]
        patch.setenv("PYTHONPATH", f"{root / 'tests' / 'vllm_site'}:{root}", prepend=":")
        with tiny_engine(tiny_models["tied"], tmp_path_factory.mktemp("vllm_run")) as engine:
            yield engine


@pytest.fixture(scope="session")
def policy_runs(tmp_path_factory: pytest.TempPathFactory) -> PolicyRuns:
    """Results of the Megatron jobs on 1, 2 and 4 ranks, which start when the first test asks for one."""
    return PolicyRuns(tmp_path_factory.mktemp("policy_runs"))
