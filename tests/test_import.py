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
def test_a_script_names_what_is_missing_and_the_command_that_installs_it() -> None:
    code = """
import runpy
sys.argv = ["train_dapo.py"]
runpy.run_path("examples/train_dapo.py", run_name="__main__")
"""
    done = python(code)
    assert done.returncode == 2
    first, *rest = done.stderr.strip().splitlines()
    assert first.startswith(f"error: {sys.executable} lacks")
    assert [line.split(":")[0].removeprefix("  - ") for line in rest] == ["megatron.core", "megatron.bridge"]
    assert all("`make setup`" in line for line in rest)


RUN_BY_HYDRA = """
import json, os, sys
from pathlib import Path
from nemo_dapo import config, entry
config.register()
def task(cfg):
    print(json.dumps([cfg.algorithm.group_size, cfg.optimizer.lr, os.getcwd(), sorted(os.listdir())]))
given, nemo = list(sys.argv), entry.is_installed("nemo.core")
entry.run_by_hydra(task, Path(os.environ["PYTHONPATH"]) / "conf" / "config.yaml")
assert sys.argv == given
print(nemo)
"""


@pytest.mark.slow
@pytest.mark.skipif(not entry.is_installed("nemo"), reason="NeMo is not installed in this environment")
def test_without_nemo_a_run_is_composed_as_nemo_does_it(tmp_path: Path) -> None:
    said = []
    for number, blocked in enumerate(("", BLOCK)):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", blocked + RUN_BY_HYDRA, "algorithm.group_size=5", "optimizer.lr=0.25"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert json.loads(lines[0]) == [5, 0.25, str(folder), []]  # in place, without a folder or file of Hydra's
        said.append(lines[-1])
    assert said == ["True", "False"]


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
        with pytest.raises(ValueError, match=r"vllm: .*container\.sh vllm .*rollout\.python"):
            entry.require_vllm(run)
    else:
        entry.require_vllm(run)


def test_a_rank_that_starts_no_server_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(entry, "is_installed", lambda module: False)
    entry.require_vllm(entry.RunConfig())
