"""What lies in a run's folder describes that run: a start that cannot go on from its checkpoint leaves it as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from examples.train_dapo import begin_records
from nemo_dapo import hf_folder, origin
from nemo_dapo.config import ModelConfig, Precision, RunConfig
from nemo_dapo.config.schema import LoraConfig
from nemo_dapo.data.load import PromptSet
from nemo_dapo.data.loader import PromptLoader
from nemo_dapo.data.problem import LoadReport
from nemo_dapo.types import Prompt

ADAPTERS = LoraConfig(rank=8, alpha=16.0, target_modules=["linear_qkv", "linear_proj"])
RECORDS = ("config.yaml", "manifest.json", "metrics.jsonl")


def loader(seed: int = 1, *, accept_changed: bool = False) -> PromptLoader:
    prompts = (Prompt("a" * 64, (1,), "1 + 1 =", "2"),)
    only = PromptSet("a", prompts, LoadReport("a", 1, 0, {}, 1, "a" * 64), 1.0)
    return PromptLoader([only], seed=seed, accept_changed=accept_changed)


def run_in(folder: Path) -> RunConfig:
    """A run with a checkpoint of step 2 and its records."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 4}')
    save_file({"weight": torch.zeros(4)}, model / "model.safetensors")
    config = RunConfig(model=ModelConfig(path=str(model), lora=ADAPTERS), output_dir=str(folder))
    state = {"step": 2, "model": hf_folder.fingerprint(model), "precision": "bf16", "loader": loader().state_dict()}
    state |= {"adapters": origin.adapters(ADAPTERS)}
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "checkpoints" / "step_000002" / "state.json").write_text(json.dumps(state))
    for name in RECORDS:
        (folder / name).write_text("of the run")
    return config


def begin(config: RunConfig, prompts: PromptLoader, resumed: int | None = 2) -> None:
    begin_records(config, Path(config.output_dir), prompts, [], resumed)


def with_other_weights(config: RunConfig) -> PromptLoader:
    save_file({"weight": torch.ones(4)}, Path(config.model.path) / "model.safetensors")
    return loader()


def with_other_precision(config: RunConfig) -> PromptLoader:
    config.model.precision = Precision.fp32
    return loader()


def with_another_seed(_: RunConfig) -> PromptLoader:
    return loader(seed=2)


def with_adapters(**changed: Any) -> Callable[[RunConfig], PromptLoader]:
    def change(config: RunConfig) -> PromptLoader:
        config.model.lora = replace(ADAPTERS, **changed)
        return loader()

    return change


def without_adapters(config: RunConfig) -> PromptLoader:
    config.model.lora = LoraConfig()
    return loader()


def beside_weights_alone(config: RunConfig) -> PromptLoader:
    place = Path(config.output_dir) / "checkpoints" / "step_000002" / "state.json"
    saved = json.loads(place.read_text())
    place.write_text(
        json.dumps({name: saved[name] for name in ("step", "model", "precision")} | {"weights_alone": True})
    )
    return loader()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_other_weights, "of step 2 is of another model .*: weights differ"),
        (with_other_precision, r"model\.precision bf16 -> fp32"),
        (with_another_seed, "data order has seed 1, this run 2"),
        (with_adapters(alpha=32.0), r"of step 2 is of other adapters: model\.lora\.alpha 16\.0 -> 32\.0; take"),
        (with_adapters(rank=4), r"model\.lora\.rank 8 -> 4; take"),
        (
            with_adapters(target_modules=["linear_qkv"]),
            r"\['linear_proj', 'linear_qkv'\] -> \['linear_qkv'\]; take",
        ),
        (without_adapters, r"model\.lora\.rank 8 -> 0; take"),
        (
            beside_weights_alone,
            r"weights alone, and model\.lora\.rank=8 trains adapters beside .*set model\.lora\.rank=0",
        ),
    ],
)
def test_a_refused_resume_leaves_the_records_as_they_were(
    change: Callable[[RunConfig], PromptLoader], said: str, tmp_path: Path
) -> None:
    config = run_in(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=said):
        begin(config, change(config))
    assert [(tmp_path / name).read_text() for name in RECORDS] == ["of the run"] * 3
    assert sorted(tmp_path.iterdir()) == before


def test_an_accepted_one_records_this_start_and_keeps_what_was_measured(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    begin(config, loader(seed=2, accept_changed=True))
    assert f"path: {config.model.path}" in (tmp_path / "config.yaml").read_text()
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["output_dir"] == str(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "of the run"


def test_the_order_in_which_layers_are_named_is_no_other_adapters(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    begin(config, with_adapters(target_modules=ADAPTERS.target_modules[::-1])(config))


def test_a_run_anew_sets_the_measurements_of_the_one_before_aside(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    begin(config, loader(), resumed=None)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "metrics.jsonl.previous1").read_text() == "of the run"
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["output_dir"] == str(tmp_path)
