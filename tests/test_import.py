"""The core works where the engines are not installed, and what is missing is named with the command that installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_dapo import entry

ROOT = Path(__file__).parents[1]
ENGINES = ("vllm", "transformer_engine", "apex", "nemo", "megatron", "flash_attn")
CORE = [
    "algorithm", "batching", "checkpoint", "config", "controller", "coordination", "entry", "evaluation", "interfaces",
    "losses", "sampling", "trainer", "types", "data.load", "data.loader", "rewards.math", "rewards.math_dapo",
    "rewards.pool", "rollout.engine", "rollout.servers", "telemetry.metrics", "telemetry.rollouts", "telemetry.sinks",
]  # fmt: skip
BLOCK = f"""
import sys, importlib.abc

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ENGINES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter in which no engine can be imported."""
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


FAMILY = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes | FAMILY | {"hidden_size": 128}))
    return tmp_path


@pytest.mark.slow
def test_the_core_imports_and_validates_a_configuration_without_any_engine(model: Path) -> None:
    code = f"""
import importlib
from pathlib import Path
for name in {CORE!r}:
    importlib.import_module("nemo_dapo." + name)
from nemo_dapo import config, entry
config.register()
run = entry.composed(Path("conf/config.yaml").resolve(), sys.argv[1:])
config.validate(run, 1)
print("valid", run.algorithm.group_size)
"""
    done = python(code, "experiment=demo", f"model.path={model}", "algorithm.group_size=8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["valid", "8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "missing"),
    [("train_dapo", ["nemo", "megatron.core", "megatron.bridge"]), ("evaluate", ["nemo"])],
)
def test_a_script_names_what_is_missing_and_the_command_that_installs_it(script: str, missing: list[str]) -> None:
    code = f"""
import runpy
sys.argv = ["{script}.py"]
runpy.run_path("examples/{script}.py", run_name="__main__")
"""
    done = python(code)
    assert done.returncode == 2
    first, *rest = done.stderr.strip().splitlines()
    assert first.startswith(f"error: {sys.executable} lacks")
    assert [line.split(":")[0].removeprefix("  - ") for line in rest] == missing
    assert all("`make setup`" in line for line in rest)
    assert "pip install --no-deps -r requirements/ngc.txt" in rest[0]


def test_every_module_that_can_be_asked_for_has_its_command() -> None:
    for module, command in entry.INSTALL.items():
        assert "`make setup`" in command, module


def test_a_module_is_found_without_importing_it() -> None:
    assert entry.is_installed("json.tool")
    assert not entry.is_installed("no_such_package")
    assert not entry.is_installed("no_such_package.below")


@pytest.mark.parametrize(("python_of_vllm", "needed"), [("", True), (sys.executable, False)])
def test_vllm_is_needed_here_only_where_no_other_interpreter_is_named(
    python_of_vllm: str, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(entry, "is_installed", lambda module: module != "vllm")
    run = entry.RunConfig()
    run.rollout.python = python_of_vllm
    if needed:
        with pytest.raises(ValueError, match=r"vllm: .*pip install vllm.*rollout\.python"):
            entry.require_vllm(run)
    else:
        entry.require_vllm(run)


def test_a_rank_that_starts_no_server_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(entry, "is_installed", lambda module: False)
    entry.require_vllm(entry.RunConfig())
