"""Mixtral and DeepSeek's architecture against Hugging Face's models, and every layout against one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_dapo.config import model_family
from tests.child import run_module
from tests.mixture_scenarios import LAYERS, MODELS, SCENARIOS, train_batch
from tests.parallel_matrix import distance

EVERY = [name for scenarios in SCENARIOS.values() for name in scenarios if name != "bf16"]
TWO_RANKS = list(SCENARIOS[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    run_module("mixture_scenarios", folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return {name: found for ranks in SCENARIOS for name, found in torch.load(folder / f"world{ranks}.pt").items()}


@pytest.fixture(scope="module")
def of_transformers(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By model: log-probabilities [T], 0 of a sequence's first token, and experts [T, L, K] in rising order."""
    return {model: score(folder / "models" / model) for model in MODELS}


def score(path: Path) -> tuple[Tensor, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch, logprobs, routes = train_batch(), [], []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda router, inputs, output: chosen.append(output[2]))
    with torch.no_grad():
        for tokens in batch.tokens.split(batch.lengths.tolist()):
            chosen: list[Tensor] = []
            log_softmax = model(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
            logprobs.append(torch.nn.functional.pad(log_softmax.gather(1, tokens[1:, None])[:, 0], (1, 0)))
            routes.append(torch.stack(chosen, dim=1))
    return torch.cat(logprobs), torch.cat(routes).sort(-1).values


def test_the_models_are_ones_that_train_here(folder: Path) -> None:
    for model in MODELS:
        config = json.loads((folder / "models" / model / "config.json").read_text())
        assert [*model_family.check_trainable(model, config)] == []
        assert model_family.num_experts(config) in (4, 8)


@pytest.mark.parametrize("name", EVERY)
def test_a_response_has_the_log_probabilities_of_transformers(
    name: str, results: dict[str, Any], of_transformers: dict[str, tuple[Tensor, Tensor]]
) -> None:
    logprobs, _ = of_transformers[name.partition(",")[0]]
    found = results[name]["logprobs"]
    assert (found - logprobs)[found != 0].abs().max() < 1e-5
    assert torch.equal(found != 0, response_tokens())


def response_tokens() -> Tensor:
    batch = train_batch()
    spans = zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)
    return torch.cat([torch.arange(length) >= prompt for length, prompt in spans])


@pytest.mark.parametrize("name", EVERY)
def test_what_is_exported_is_what_was_imported_bit_for_bit(name: str, folder: Path, results: dict[str, Any]) -> None:
    saved = load_file(folder / "models" / name.partition(",")[0] / "model.safetensors")
    saved = {weight: tensor for weight, tensor in saved.items() if not weight.endswith("inv_freq")}
    exported = results[name]["imported"]
    assert exported.keys() == saved.keys()
    for weight, tensor in saved.items():
        assert torch.equal(exported[weight], tensor), weight


def test_a_model_in_bf16_keeps_its_routers_biases_in_float32(folder: Path, results: dict[str, Any]) -> None:
    saved = load_file(folder / "models" / "deepseek_v3" / "model.safetensors")
    for name, weight in results["bf16"].items():
        is_bias = name.endswith("e_score_correction_bias")
        assert weight.dtype == (torch.float32 if is_bias else torch.bfloat16), name
        assert torch.equal(weight, saved[name].to(weight.dtype)), name


@pytest.mark.parametrize("name", EVERY)
def test_routes_are_the_routers_and_are_followed(
    name: str, results: dict[str, Any], of_transformers: dict[str, tuple[Tensor, Tensor]]
) -> None:
    _, routes = of_transformers[name.partition(",")[0]]
    found = results[name]
    recorded = found["routes"].long().sort(-1).values
    mine = recorded.sum((1, 2)) > 0  # of two replicas each knows those of its own tokens
    assert mine.all() == (not name.endswith(", experts"))
    assert torch.equal(recorded[mine], routes[mine])
    assert torch.equal(found["full, replayed"], found["full, recorded"])
    # What fills a pack up has no routes to follow, and an expert's product of up to 3 rows rounds otherwise than of more.
    assert (found["replayed"] - found["logprobs"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_have_the_gradient_and_the_update_of_one(name: str, results: dict[str, Any]) -> None:
    found, one = results[name], results[f"{name.partition(',')[0]}, one rank"]
    assert distance(found["gradient"], one["gradient"]) < 1e-5
    assert distance(found["updated"], one["updated"]) < 1e-5
    for metric in ("grad_norm", "moe_load", "moe_load_max", "moe_unused"):
        assert found["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-5)


@pytest.mark.parametrize("model", ["deepseek_v3", "moonlight"])
def test_an_update_moves_every_weight_but_no_routers_bias(model: str, results: dict[str, Any]) -> None:
    found = results[f"{model}, one rank"]
    biases = {name for name in found["updated"] if name.endswith("e_score_correction_bias")}
    assert len(biases) == LAYERS - 1, "the first layer has no experts"
    for name, weight in found["updated"].items():
        assert torch.equal(weight, found["imported"][name]) == (name in biases), name
