"""Checkpoints into Hugging Face folders and back: the same numbers, in little memory, and nothing overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.convert_checkpoint import arguments, check, options_of
from nemo_dapo.config import Fp8
from nemo_dapo.hf_folder import FolderTensors, weight_files
from tests.child import run_module
from tests.conversion_scenarios import LORA, RUNS, SHARD_BYTES, SHARD_OF_WIDE, WIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("conversion")
    run_module("conversion_scenarios", made)
    return made


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, folder: Path) -> Path:
    return folder / str(request.param)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_a_checkpoint_becomes_what_the_policy_itself_exports(run: Path) -> None:
    require_equal(tensors(run / "converted"), tensors(run / "trained"))


def test_it_was_trained_and_its_adapters_are_in_the_sum(run: Path, folder: Path) -> None:
    base = tensors(folder / "models" / RUNS[run.name][1])
    assert any(not torch.equal(one, base[name].to(one.dtype)) for name, one in tensors(run / "converted").items())


def test_files_are_as_large_as_asked_and_described_as_the_source(run: Path, folder: Path) -> None:
    files = weight_files(run / "converted")
    assert len(files) > 1
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= SHARD_BYTES or len(load_file(file)) == 1
    for name in ("config.json", "tokenizer.json"):
        source = folder / "models" / RUNS[run.name][1] / name
        assert (run / "converted" / name).read_bytes() == source.read_bytes()


def test_there_and_back_is_bit_equal(run: Path) -> None:
    require_equal(tensors(run / "again"), tensors(run / "converted"))
    state = json.loads((run / "begun" / "checkpoints" / "step_000000" / "state.json").read_text())
    assert state["weights_alone"]


def test_memory_holds_one_file_and_one_tensor(folder: Path) -> None:
    peaks = torch.load(folder / "world1.pt")["peaks"]
    tensor = WIDE["vocab"] * WIDE["hidden"] * 4
    assert peaks.keys() == {"hf", "megatron"}
    for way, peak in peaks.items():
        assert peak < 1.3 * SHARD_OF_WIDE + tensor, way


def test_a_policy_goes_on_from_converted_weights_as_from_their_folder(folder: Path) -> None:
    found = torch.load(folder / "world2.pt")["beginning"]
    require_equal(found["checkpoint, before"], tensors(folder / "models" / "trained"))
    require_equal(found["checkpoint, after"], found["folder, after"])
    assert any(not torch.equal(one, found["folder, before"][name]) for name, one in found["folder, after"].items())


def test_objects_of_megatrons_own_are_written_beside_the_weights(folder: Path) -> None:
    read = torch.load(folder / "world1.pt")["beside objects"]
    assert torch.equal(read["model"]["weight"], torch.arange(4.0))
    assert read["common_state"] == {"form": 1}


# ------------------------------------------------------------------ what is refused


def given(to: str, source: Path, target: Path, *more: str) -> Any:
    return arguments(["--to", to, str(source), str(target), *more])


@pytest.mark.parametrize(
    ("to", "source", "target", "more", "said"),
    [
        ("hf", "nowhere", "new", [], r"nowhere has no manifest\.json; expected a checkpoint for --to hf"),
        ("megatron", "step_000001", "step_000000", [], r"has no config\.json; expected a Hugging Face folder"),
        ("hf", "step_000001", "model", [], r"model is there already; name another target, or remove it"),
        ("megatron", "model", "step_000001x", [], r"expected that in place of step_000001x"),
        ("hf", "step_000001", "new", ["--precision", "fp32"], r"as they were saved"),
        ("hf", "step_000001", "new", ["--max-shard-bytes", "0"], r"--max-shard-bytes=0 must be above 0"),
    ],
)
def test_a_wrong_command_is_refused_in_a_line(
    tmp_path: Path, to: str, source: str, target: str, more: list[str], said: str
) -> None:
    for name, marker in (("step_000001", "manifest.json"), ("model", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).touch()
    with pytest.raises(ValueError, match=said):
        check(given(to, tmp_path / source, tmp_path / target, *more))


def test_the_options_are_the_runs(folder: Path, tmp_path: Path) -> None:
    found = options_of(given("hf", folder / "adapters" / "checkpoints" / "step_000001", tmp_path))
    assert (found.lora, Path(found.path).name) == (LORA, "dense")
    moved = options_of(given("hf", folder / "adapters" / "checkpoints" / "step_000001", tmp_path, "--model", "x"))
    assert (moved.lora, moved.path) == (LORA, "x")
    with pytest.raises(ValueError, match=r"no .*config\.yaml: say by --model which folder the run started from"):
        options_of(given("hf", tmp_path / "a" / "b" / "step_000001", tmp_path))


def test_a_run_with_products_in_eight_bits_is_converted_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x, fp8: blockwise}\n")
    assert options_of(given("hf", tmp_path / "checkpoints" / "step_000001", tmp_path)).fp8 is Fp8.none


def test_a_config_of_another_version_names_the_option(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: x, presicion: bf16}\n")
    with pytest.raises(ValueError, match=r"config\.yaml: model\.presicion"):
        options_of(given("hf", tmp_path / "checkpoints" / "step_000001", tmp_path))


def test_what_cannot_be_converted_leaves_no_target(folder: Path) -> None:
    refused = torch.load(folder / "world1.pt")["refused"]
    assert "is damaged (policy/" in refused["damaged"]
    assert "restore it from a copy" in refused["damaged"]
    assert "is of another model than model.path=" in refused["another model"]
    assert "holds adapters, against model.lora of the run's config.yaml" in refused["of no run"]
    assert "has not the weights of --model" in refused["other weights"]
    assert not list(folder.glob("refused/target*/*"))


def test_a_folder_that_ends_early_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100.0), "b": torch.arange(100.0)}, tmp_path / "model.safetensors")
    found = FolderTensors(tmp_path)
    assert torch.equal(found["b"], torch.arange(100.0))
    assert list(found) == ["a", "b"]
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "whole")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"ends within b; restore it from a copy"):
        found["b"]
