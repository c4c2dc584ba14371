"""What leaves the device comes back bit for bit, under every layout; see `policy_scenarios.stage_round`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_dapo.telemetry.metrics import Max, Min
from nemo_dapo.types import Stage
from tests.policy_runs import PolicyRuns

pytestmark = pytest.mark.slow

ROUNDS = [
    pytest.param((f"stages {layout}", rank), id=f"{layout} rank {rank}")
    for layout in ("tp2", "pp2", "dp2", "dp2 fp32")
    for rank in range(2)
]


@pytest.fixture(params=ROUNDS)
def result(request: pytest.FixtureRequest, policy_runs: PolicyRuns) -> dict[str, Any]:
    scenario, rank = request.param
    return dict(policy_runs.get(2, scenario, rank))


def test_parameters_master_weights_and_moments_come_back_bit_for_bit(result: dict[str, Any]) -> None:
    equal = result["seen"]["equal"]
    gradients = equal.pop("gradients")
    assert all(equal.values())
    assert {name.split()[0] for name in equal} == {"parameter", "master", "exp_avg", "exp_avg_sq"}
    assert not gradients  # they are not kept
    assert result["seen"]["gradients"] == {0.0}


def test_while_servers_generate_no_storage_of_the_policy_holds_a_byte(result: dict[str, Any]) -> None:
    assert set(result["seen"][Stage.generate].values()) == {0}
    assert result["seen"]["reference after use"] == 0


def test_while_weights_are_sent_parameters_alone_hold_memory(
    result: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    sizes = result["seen"][Stage.sync]
    # float32 parameters are their own master weights.
    kept = ("parameter", "master") if "fp32" in request.node.name or "pp2" in request.node.name else ("parameter",)
    assert all((size > 0) == name.startswith(kept) for name, size in sizes.items())


def test_what_follows_a_round_is_what_follows_without_one(result: dict[str, Any]) -> None:
    expected, got = result["expected"], result["got"]
    assert got["first"] == expected["first"]
    assert got["next"] == expected["next"]
    assert torch.equal(got["scores"], expected["scores"])
    assert torch.equal(got["reference"], expected["reference"])
    assert not torch.equal(got["scores"], got["reference"])
    assert all(torch.equal(weight, got["weights"][name]) for name, weight in expected["weights"].items())


@pytest.mark.parametrize("stage", ["train", "sync", "generate"])
def test_a_checkpoint_of_any_stage_holds_the_same(result: dict[str, Any], stage: str) -> None:
    assert result["seen"][f"loaded {stage}"]


def test_stages_out_of_order_and_work_in_the_wrong_stage_are_refused(result: dict[str, Any]) -> None:
    refused = result["seen"]["refused"]
    assert {now for now, _ in refused} == {Stage.train, Stage.sync, Stage.generate}
    assert all(
        said.startswith(f"stage {then.value} cannot follow {now.value}") for (now, then), said in refused.items()
    )
    assert all("the policy is in generate" in said for said in result["seen"]["refused verbs"])
    assert "this needs stage train, and the policy is in score" in result["seen"]["refused update"]


def test_a_policy_that_is_not_trained_reads_the_weights_of_a_checkpoint_and_nothing_else(
    policy_runs: PolicyRuns,
) -> None:
    alone, saved = policy_runs.get(1, "weights alone"), policy_runs.get(1, "checkpoint")["saved"]
    assert alone["optimizer"] is None
    assert all(torch.equal(weight, saved[name]) for name, weight in alone["weights"].items())
    assert torch.equal(alone["scores"], alone["trained scores"])
    assert alone["bytes"] == 0
    assert "this needs stage train" in alone["refused"]


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [(Stage.sync, "the servers' weights 10.0 GiB"), (Stage.generate, "the servers' key-value cache 40.0 GiB")],
)
def test_a_rank_short_of_memory_stops_all_of_them_before_a_server_is_woken(
    policy_runs: PolicyRuns, stage: Stage, wanted: str
) -> None:
    (kind, said, now), (other, consequence, _) = (policy_runs.get(2, "ledger", rank)[stage] for rank in range(2))
    assert (kind, other) == ("MemoryShortError", "LeaderFailedError")
    assert said.startswith(f"rank 1: stage {stage.value} needs ")
    assert wanted in said
    assert "5.0 GiB of 80.0 GiB are free" in said
    assert "torch's unused cache 3.0 GiB, other processes, NCCL and CUDA itself 42.0 GiB" in said
    assert said in consequence
    assert now is not stage  # so its servers were not woken, see stages.Stages


def test_stages_are_measured(policy_runs: PolicyRuns) -> None:
    metrics = policy_runs.get(2, "ledger")["metrics"]
    assert metrics["memory/generate_free_gib"] == Min(60.0)
    assert metrics["memory/generate_needed_gib"] == Max(40.0)
    assert metrics["memory/moving_seconds"].value > 0
    assert policy_runs.get(2, "ledger")["then"] == {"memory/moving_seconds": Max(0.0)}
