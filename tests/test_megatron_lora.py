"""Adapters: what trains, what is exported and saved, and that no layout of ranks changes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.child import run_module
from tests.lora_scenarios import ALPHA, MODELS, RANK, SCENARIOS
from tests.parallel_matrix import distance

SCALE = ALPHA / RANK
HEADS, GROUPS, HEAD = 4, 2, 16  # of tests.tiny's models
TOLERANCE = 1e-5  # relative, of all changes together, in float32; an unsummed gradient is at 1e-1


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lora")
    run_module("lora_scenarios", folder)
    return {name: found for ranks in SCENARIOS for name, found in torch.load(folder / f"world{ranks}.pt").items()}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trained(model: str, results: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = results[f"training, {model}"]
    return found


def test_adapters_begin_as_nothing(trained: dict[str, Any]) -> None:
    for name, weight in trained["plain"].items():
        assert torch.equal(trained["at start"][name], weight), name
    assert torch.equal(trained["scores at start"], trained["plain scores"])


def test_adapters_alone_are_trained_and_optimized(trained: dict[str, Any]) -> None:
    assert trained["trained"]
    assert all(".adapter." in name for name in trained["trained"])
    assert trained["optimized"] == sum(p.numel() for p in trained["adapters"].values())
    assert trained["base is frozen"]
    assert trained["metrics"]["grad_norm"] > 0
    assert all(bool(p.any()) for p in trained["adapters"].values()), "B is not 0 any more"


def change_by_hand(adapters: dict[str, Tensor], layer: int, module: str) -> Tensor:
    of = f"decoder.layers.{layer}.{module}.adapter"
    return SCALE * (adapters[f"{of}.linear_out.weight"] @ adapters[f"{of}.linear_in.weight"])


def changes_by_hand(model: str, adapters: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """B A alpha / r by Hugging Face's names: Megatron's linear_qkv has, group after group, queries, a key and a value."""
    qkv = change_by_hand(adapters, layer, "self_attention.linear_qkv")
    heads = qkv.view(GROUPS, HEADS // GROUPS + 2, HEAD, -1)
    changes = {
        "self_attn.q_proj": heads[:, :-2].flatten(0, 2),
        "self_attn.k_proj": heads[:, -2].flatten(0, 1),
        "self_attn.v_proj": heads[:, -1].flatten(0, 1),
        "self_attn.o_proj": change_by_hand(adapters, layer, "self_attention.linear_proj"),
    }
    if model == "experts":
        return changes
    gate, up = change_by_hand(adapters, layer, "mlp.linear_fc1").chunk(2)
    down = change_by_hand(adapters, layer, "mlp.linear_fc2")
    return changes | {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}


def test_an_export_is_the_base_and_the_product_of_its_adapters(model: str, trained: dict[str, Any]) -> None:
    plain, exported, adapters = trained["plain"], trained["merged"], trained["adapters"]
    assert {name: p.shape for name, p in exported.items()} == {name: p.shape for name, p in plain.items()}
    changed = {
        f"model.layers.{layer}.{name}.weight": change
        for layer in range(2)
        for name, change in changes_by_hand(model, adapters, layer).items()
    }
    assert 2 * len(adapters) >= len(changed) > 0
    for name, weight in plain.items():
        if (change := changed.get(name)) is None:
            assert torch.equal(exported[name], weight), name
        else:
            assert change.abs().max() > 1e-4
            torch.testing.assert_close(exported[name], weight + change, rtol=1e-6, atol=1e-7)


def test_the_exported_model_scores_as_the_adapted_one(trained: dict[str, Any]) -> None:
    assert (trained["scores"] - trained["scores at start"]).abs().max() > 1e-3
    torch.testing.assert_close(trained["exported scores"], trained["scores"], rtol=0, atol=2e-5)


def test_the_reference_is_the_base_and_no_second_model(trained: dict[str, Any]) -> None:
    assert trained["models of the reference"] is None
    assert torch.equal(trained["reference scores"], trained["plain scores"])
    assert torch.equal(trained["scores after the reference"], trained["scores"])


def test_a_checkpoint_holds_the_adapters_alone_and_resumes_exactly(trained: dict[str, Any]) -> None:
    for name, weight in trained["merged"].items():
        assert torch.equal(trained["resumed"][name], weight), name
    for name, weight in trained["next"].items():
        assert torch.equal(trained["next after resuming"][name], weight), name
    adapters = sum(p.numel() for p in trained["adapters"].values())
    assert trained["saved weights"] == adapters
    # With their master weights and both moments, and some filling; the base alone has several times as many.
    assert 4 * adapters <= trained["saved numbers"] < 5 * adapters < sum(p.numel() for p in trained["plain"].values())


@pytest.mark.parametrize(
    "name",
    [name for ranks in SCENARIOS for name in SCENARIOS[ranks] if not name.startswith(("training", "one rank, ti"))],
)
def test_layouts_go_on_from_one_rank_s_checkpoint_as_it_does(name: str, results: dict[str, Any]) -> None:
    found, one = results[name], results[f"one rank, {name.split(', ')[-1]}"]
    assert distance(found["before"], one["before"]) < 1e-7
    assert (found["scores"] - one["scores"]).abs().max() < 2e-5
    assert found["grad_norm"] == pytest.approx(one["grad_norm"], rel=TOLERANCE)
    assert distance(found["change"], one["change"]) < TOLERANCE
