"""A mixture of experts under RL, against Hugging Face's: how the experts' load is counted under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_dapo.megatron.router_replay import columns_of
from tests.child import run_module
from tests.moe_scenarios import LAYOUTS, MODEL
from tests.parallel_matrix import distance
from tests.policy_scenarios import make_train_batch

EXPERTS, TOP_K = 4, 2
EVERY = [name for layouts in LAYOUTS.values() for name in layouts]


def test_routes_of_all_layers_and_of_those_with_experts_are_told_apart_and_another_model_s_refused() -> None:
    with_experts = {2: 0, 4: 1}  # layers 1 and 3 of four have none
    assert columns_of(torch.zeros(5, 2, 8), with_experts, num_layers=4, top_k=8) == {2: 0, 4: 1}
    assert columns_of(torch.zeros(5, 4, 8), with_experts, num_layers=4, top_k=8) == {2: 1, 4: 3}
    for shape in ((5, 3, 8), (5, 2, 4)):
        with pytest.raises(ValueError, match="another model"):
            columns_of(torch.zeros(shape), with_experts, num_layers=4, top_k=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    run_module("moe_scenarios", folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Of every layout, by the scenario's name."""
    return {name: found for ranks in LAYOUTS for name, found in torch.load(folder / f"world{ranks}.pt").items()}


@pytest.fixture(scope="module")
def routes(folder: Path) -> Tensor:
    """[T, L, K] int64: the experts of each token of the batch, in rising order, as Hugging Face's router has it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / MODEL, dtype=torch.float32)
    batch, chosen = make_train_batch(), []
    with torch.no_grad():
        for tokens in batch.tokens.split(batch.lengths.tolist()):
            logits = model(tokens.unsqueeze(0), output_router_logits=True).router_logits  # L x [T, E]
            chosen.append(torch.stack(list(logits), dim=1).topk(TOP_K).indices)
    return torch.cat(chosen).sort(-1).values


def counts_of(routes: Tensor) -> Tensor:
    """[L, E]: tokens that go to each expert."""
    return torch.nn.functional.one_hot(routes.long(), EXPERTS).sum((0, 2))


@pytest.fixture(scope="module")
def counts(routes: Tensor) -> Tensor:
    return counts_of(routes)


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


def of_this_replica(name: str, recorded: Tensor) -> Tensor:
    """[T] bool: tokens of rank 0's replica, which knows their routes alone; a token's experts differ, so not both are 0."""
    mine = recorded.long().sum((1, 2)) > 0
    assert mine.any()
    assert mine.all() == (not name.startswith(("data", "experts"))), "with two replicas each has some of the tokens"
    return mine


HOW = [f"{name}{how}" for name in EVERY for how in ("", ", recomputed")]


@pytest.mark.parametrize("name", HOW)
def test_recorded_routes_are_the_routers_and_replayed_give_the_recorded_pass_bit_for_bit(
    name: str, results: dict[str, Any], routes: Tensor
) -> None:
    found = results[f"replay, {name}"]
    mine = of_this_replica(name, found["routes"])
    assert torch.equal(found["routes"][mine].long().sort(-1).values, routes[mine])
    assert torch.equal(found["recorded"], found["plain"]), "recording changes nothing"
    assert torch.equal(found["replayed"], found["recorded"])
    for weight, gradient in found["plain gradient"].items():
        assert torch.equal(found["gradient"][weight], gradient), weight


@pytest.mark.parametrize("name", HOW)
def test_another_router_keeps_the_routes_forward_backward_and_in_what_is_computed_again(
    name: str, results: dict[str, Any], routes: Tensor
) -> None:
    found = results[f"replay, {name}"]
    mine = of_this_replica(name, found["routes"])
    own = found["routes of the other"][mine].long().sort(-1).values
    assert (own != routes[mine]).any(-1).double().mean() > 0.05, "by itself it would have gone elsewhere"
    assert (found["other"] - found["other by itself"]).abs().max() > 1e-3
    assert torch.equal(found["counts of the other"], counts_of(routes))
    fills = found["counts of all its calls"] - counts_of(routes) * (2 if "recomputed" in name else 1)
    assert not fills[:, TOP_K:].any(), "filling goes to the first K experts"
    assert bool((fills[:, :1] == fills[:, :TOP_K]).all())
    one = results["replay, one rank"]
    assert distance(found["other gradient"], one["other gradient"]) < 1e-5
    assert (found["other"] - one["other"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", HOW)
def test_the_reference_routes_by_itself_and_a_selection_keeps_its_routes(name: str, results: dict[str, Any]) -> None:
    found = results[f"replay, {name}"]
    assert torch.equal(found["reference"], found["plain"])
    assert found["selected"]


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
