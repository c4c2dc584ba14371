"""Presets of published models: each fits its ranks and its model, and its shards are that model, whole."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_dapo import config as schema
from nemo_dapo.config.compose import compose_file, typed
from tests import presets

ROOT = Path(__file__).parents[1]
H100_GIB = 80 - 15  # of 80: one layer at work, a sleeping server and NCCL's buffers need the rest
EXPERIMENTS = {"dapo_qwen2.5_32b": "qwen2.5-32b", "dapo_qwen2.5_math_7b": "qwen2.5-7b"}


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_preset_is_valid_on_as_many_ranks_as_its_name_says(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # colocated servers need it, and an H100 has it
    run = presets.compose_preset(preset, tmp_path)
    schema.validate(run, presets.world_size(preset))
    servers, replica = run.rollout.num_servers, int(run.rollout.vllm["tensor_parallel_size"])
    assert servers * replica == 8, "the servers of a node have all of its GPUs"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_runs_are_valid_on_their_presets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    schema.register()
    (tmp_path / "config.json").write_text(json.dumps(presets.MODELS[EXPERIMENTS[name]]))
    run = typed(compose_file(presets.CONF / "config.yaml", [f"experiment={name}", f"model.path={tmp_path}"]))
    ranks = 128 if "32b" in name else 64
    schema.validate(run, ranks)
    assert (run.algorithm.prompts_per_step, run.algorithm.group_size, run.algorithm.minibatch_size) == (512, 16, 512)
    assert run.reward.overlong.buffer == 4096
    assert run.data.train.keys() == {"dapo_math_17k"}


def leaves(options: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in options.items():
        yield from leaves(value, f"{above}{name}.") if isinstance(value, dict) else [f"{above}{name}"]


def attributes_read() -> set[str]:
    """Names that follow a dot somewhere in the trainer, but for the schema and its checks, which read every option."""
    read = set()
    for file in (ROOT / "nemo_dapo").rglob("*.py"):
        if file.parent.name != "config":
            read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    return read


def engine_arguments_of_vllm() -> set[str]:
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs vLLM's sources")
    source = Path(package.submodule_search_locations[0]) / "engine/arg_utils.py"
    classes = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ClassDef)]
    engine = next(each for each in classes if each.name == "EngineArgs")
    return {
        node.target.id for node in engine.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_nothing_in_a_preset_is_read_by_nobody() -> None:
    ours, vllms = attributes_read(), engine_arguments_of_vllm()
    for preset in presets.PRESETS:
        for option in leaves(yaml.safe_load((presets.CONF / "preset" / f"{preset}.yaml").read_text())):
            group, name = option.rsplit(".", 1)
            assert name in (vllms if group == "rollout.vllm" else ours), f"{preset}: {option}"


@pytest.mark.slow
def test_the_shards_of_a_preset_are_the_model_and_fit_the_gpu(tmp_path: Path) -> None:
    """One dense and one mixture of experts, each stage and expert rank; `python benchmarks/presets.py` builds all."""
    wanted = ["qwen2.5-7b/gpus8", "qwen3-30b-a3b/gpus16"]
    done = subprocess.run(
        [sys.executable, "benchmarks/presets.py", *wanted],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for result in json.loads(done.stdout.splitlines()[-1]):
        assert result["parameters"] == result["published"]
        assert sum(result["memory"].values()) < H100_GIB
