"""A Hugging Face folder as files: what is expected of an export, and an export that is there whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_dapo.hf_folder import (
    ExpectedWeights,
    _write_shards,
    buckets,
    check_weights,
    expected_weights,
    weight_files,
    write_model,
)

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
EXPECTED = ExpectedWeights({"a": (2, 3), "b": (4,)})


def test_a_tied_model_may_come_with_or_without_its_output_layer(tiny_models: dict[str, Path]) -> None:
    expected = expected_weights(tiny_models["tied"])
    sent = dict(expected.shapes)
    assert "lm_head.weight" not in sent
    check_weights(sent, expected)
    check_weights(sent | {"lm_head.weight": sent["model.embed_tokens.weight"]}, expected)


def test_an_untied_model_needs_its_output_layer(tiny_models: dict[str, Path]) -> None:
    expected = expected_weights(tiny_models["untied"])
    sent = {name: shape for name, shape in expected.shapes.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        check_weights(sent, expected)


def test_names_are_read_from_every_file_of_an_index(tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        save_file({name: tensor}, tmp_path / f"part{number}.safetensors")
    weight_map = {name: f"part{number}.safetensors" for number, name in enumerate(WEIGHTS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    assert expected_weights(tmp_path) == replace(EXPECTED, dtypes={"a": "float32", "b": "bfloat16"})
    assert expected_weights(tmp_path).num_elements == 10


def test_a_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors files; save the model with safe serialization"):
        expected_weights(tmp_path)


def test_buckets_are_bounded_keep_the_order_and_do_not_share_memory() -> None:
    shared = torch.zeros(4)  # 16 bytes
    stream = [("a", shared), ("b", shared[:2]), ("c", shared), ("large", torch.zeros(100)), ("d", shared)]
    groups = list(buckets(iter(stream), limit=24))
    assert [list(group) for group in groups] == [["a", "b"], ["c"], ["large"], ["d"]]
    shared.fill_(1.0)  # an exporter that reuses its buffer
    assert groups[0]["a"].sum() == 0
    assert groups[0]["b"].data_ptr() != groups[0]["a"].data_ptr()


# ------------------------------------------------------------------ writing


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def changed(folder: Path) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in weights_of(folder).items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000], ids=["one file", "several"])
def test_a_written_model_loads_in_transformers(tiny_models: dict[str, Path], tmp_path: Path, shard_bytes: int) -> None:
    source, new = tiny_models["untied"], changed(tiny_models["untied"])
    write_model(tmp_path / "trained", iter(new.items()), source, shard_bytes)
    assert (len(weight_files(tmp_path / "trained")) > 1) == (shard_bytes == 100_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in new.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").encode("1+1") == [
        *AutoTokenizer.from_pretrained(source).encode("1+1")
    ]
    assert (tmp_path / "trained" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_buffer_that_only_the_source_holds_takes_nothing_along(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Old Llama folders hold rotary_emb.inv_freq, which is no parameter and is not exported."""
    source = tmp_path / "source"
    source.mkdir()
    weights = weights_of(tiny_models["untied"])
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(weights | buffer, source / "model.safetensors")
    (source / "config.json").write_bytes((tiny_models["untied"] / "config.json").read_bytes())
    write_model(tmp_path / "trained", weights.items(), source)
    assert weights_of(tmp_path / "trained").keys() == weights.keys()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tiny_models: dict[str, Path], tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_model(tmp_path / "trained", weights_of(tiny_models["tied"]).items(), tiny_models["tied"], 100_000)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "trained").iterdir()}
    assert modes == {0o666 & ~umask}


def without_one(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return (item for item in weights.items() if item[0] != "model.norm.weight")


def transposed_one(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.T if name == "model.embed_tokens.weight" else tensor) for name, tensor in weights.items())


def one_twice(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from weights.items()
    yield from weights.items()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (without_one, r"1 missing: model\.norm\.weight"),
        (transposed_one, r"1 of the wrong shape: model\.embed_tokens\.weight"),
        (one_twice, "exported twice"),
    ],
)
def test_an_incomplete_export_is_an_error_and_the_earlier_folder_stays(
    tiny_models: dict[str, Path], tmp_path: Path, wrong: object, message: str
) -> None:
    source, place = tiny_models["tied"], tmp_path / "trained"
    write_model(place, changed(source).items(), source)
    with pytest.raises(ValueError, match=message):
        write_model(place, wrong(weights_of(source)), source)  # type: ignore[operator]
    assert torch.equal(weights_of(place)["model.norm.weight"], weights_of(source)["model.norm.weight"] + 1)
    write_model(place, weights_of(source).items(), source)
    assert [file.name for file in tmp_path.iterdir()] == ["trained"]
    assert torch.equal(weights_of(place)["model.norm.weight"], weights_of(source)["model.norm.weight"])


def test_a_shard_is_gone_when_the_next_one_fills(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    alive: list[weakref.ref[Tensor]] = []

    def shards() -> Iterator[dict[str, Tensor]]:
        for number in range(3):
            assert not any(tensor() is not None for tensor in alive)
            shard = {f"tensor {number}": torch.zeros(4)}
            alive.append(weakref.ref(shard[f"tensor {number}"]))
            yield shard
            del shard

    _write_shards(tmp_path, shards())
    assert len(alive) == len(weight_files(tmp_path)) == 3
