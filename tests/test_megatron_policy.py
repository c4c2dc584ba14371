"""The policy under every layout: gradients, first step, checkpoints, refused updates, reference model, schedule.

Everything ran in child processes (`policy_scenarios.py`); a test here looks at one result.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.policy_runs import PolicyRuns
from tests.policy_scenarios import CHANGED_OPTIONS, NUM_SEQUENCES, RARE_SEQUENCE

pytestmark = pytest.mark.slow

Tensors = dict[str, Tensor]
BUDGETS = ["1", "3", "8", "one_by_one"]


def distance(a: Tensors, b: Tensors) -> float:
    """|a - b| / |b| of all entries together."""
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in b)
    return float((difference / sum(b[k].double().square().sum() for k in b)).sqrt())  # type: ignore[union-attr]


def same_gradient(a: Tensors, b: Tensors) -> bool:
    # float32 sums in another order differ by about 3e-7 here; a wrong normaliser by more than 1e-2.
    return distance(a, b) < 1e-5


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_gradient_does_not_depend_on_micro_batches_or_ranks(
    policy_runs: PolicyRuns, ranks: int, budget: str
) -> None:
    whole = policy_runs.get(1, "gradients")["1"]["gradient"]
    for rank in range(ranks):
        assert same_gradient(policy_runs.get(ranks, "gradients", rank)[budget]["gradient"], whole)


def test_the_budgets_give_1_3_8_and_15_micro_batches(policy_runs: PolicyRuns) -> None:
    assert [policy_runs.get(1, "gradients")[b]["microbatches"] for b in BUDGETS] == [1, 3, 8, NUM_SEQUENCES]
    assert [policy_runs.get(2, "gradients")[b]["microbatches"] for b in BUDGETS] == [1, 2, 4, 8]


@pytest.mark.parametrize(("ranks", "budget"), [(1, "3"), (1, "8"), (1, "one_by_one"), (2, "1"), (2, "8")])
def test_a_normaliser_per_micro_batch_is_caught(policy_runs: PolicyRuns, ranks: int, budget: str) -> None:
    whole = policy_runs.get(1, "gradients")["1"]["gradient"]
    wrong = policy_runs.get(ranks, "gradients")[f"{budget} per micro-batch"]["gradient"]
    assert not same_gradient(wrong, whole)


@pytest.mark.parametrize("variant", ["gspo", "dr_grpo"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_with_another_denominator_has_one_gradient_too(
    policy_runs: PolicyRuns, ranks: int, variant: str
) -> None:
    whole = policy_runs.get(1, "gradients")[f"1 {variant}"]
    assert not same_gradient(whole["gradient"], policy_runs.get(1, "gradients")["1"]["gradient"])
    for budget in BUDGETS:
        other = policy_runs.get(ranks, "gradients")[f"{budget} {variant}"]
        assert same_gradient(other["gradient"], whole["gradient"])
        assert other["sums"]["loss"].value == pytest.approx(whole["sums"]["loss"].value, rel=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_normaliser_per_rank_is_caught(policy_runs: PolicyRuns, budget: str) -> None:
    whole = policy_runs.get(1, "gradients")["1"]["gradient"]
    assert not same_gradient(policy_runs.get(2, "gradients")[f"{budget} per rank"]["gradient"], whole)


def test_the_wrong_normalisers_are_right_where_they_may_be(policy_runs: PolicyRuns) -> None:
    """One micro-batch, one rank: there the mutations compute the true gradient, so nothing else is wrong in them."""
    results = policy_runs.get(1, "gradients")
    assert same_gradient(results["1 per micro-batch"]["gradient"], results["1"]["gradient"])
    assert same_gradient(results["8 per rank"]["gradient"], results["1"]["gradient"])


# ------------------------------------------------------------------ layouts

LAYOUTS = [(2, "tp2"), (2, "pp2"), (2, "dp2"), (2, "overlap"), (4, "tp2pp2")]


@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_untied"])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=[name for _, name in LAYOUTS])
def test_the_first_step_agrees_with_one_rank(policy_runs: PolicyRuns, ranks: int, layout: str, model: str) -> None:
    one = policy_runs.get(1, "first_step")[model]
    for rank in range(ranks):
        other = policy_runs.get(ranks, f"first_step {layout}", rank)[model]
        # Every metric is a mean over the same tokens: 1e-4 is what issue 2 asks, 1e-6 what float32 gives here.
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert same_gradient(other["gradient"], one["gradient"])
        # Adam divides by the gradient's size, so rounding of tiny entries grows: 3e-6 nats were seen after the step.
        torch.testing.assert_close(other["logprobs_after"], one["logprobs_after"], rtol=0, atol=1e-4)


def test_an_export_asks_other_stages_once_and_then_sends_nothing_but_tensors(policy_runs: PolicyRuns) -> None:
    for rank in range(4):
        result = policy_runs.get(4, "exports", rank)
        first, second = result["counts"]
        assert first > 0  # else the test counts in the wrong place
        assert second == 0
        assert result["exported"].keys() == result["plain"].keys()
        assert all(torch.equal(result["exported"][name], one) for name, one in result["plain"].items())


def test_layers_that_do_not_divide_step_as_on_one_rank(policy_runs: PolicyRuns) -> None:
    one = policy_runs.get(1, "uneven")["three_layers"]
    for rank in range(2):
        other = policy_runs.get(2, "uneven pp2", rank)["three_layers"]
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert same_gradient(other["gradient"], one["gradient"])


def test_the_step_changes_the_policy_and_the_metrics_say_what_they_are(policy_runs: PolicyRuns) -> None:
    metrics = policy_runs.get(1, "first_step")["qwen2_tied"]["metrics"]
    assert metrics["tokens"] == 1.0  # a mean over response tokens of 1
    assert metrics["clipped_high"] > 0  # the loss compared across layouts did see its clipping
    assert metrics["loss"] != 0
    assert metrics["grad_norm"] == pytest.approx(policy_runs.get(1, "first_step")["qwen2_tied"]["norm"])


def test_the_reported_norm_is_that_of_the_whole_gradient(policy_runs: PolicyRuns) -> None:
    result = policy_runs.get(1, "first_step")["qwen3_untied"]
    norm = torch.stack([g.double().norm() for g in result["gradient"].values()]).norm()
    assert result["metrics"]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize(("ranks", "scenario"), [(2, "shared_batch dp2"), (4, "shared_batch tp2")])
def test_each_replica_trains_alike_on_its_share_of_the_batch(
    policy_runs: PolicyRuns, ranks: int, scenario: str
) -> None:
    """Two replicas; with tp2 each has two ranks. The same numbers in the same order: nothing may differ by one bit."""
    results = [policy_runs.get(ranks, scenario, rank) for rank in range(ranks)]
    for result in results:
        whole, share = result["whole"], result["share"]
        assert share["metrics"] == whole["metrics"]
        assert share["old"] == whole["old"]
        assert share["old"] != 0
        assert all(torch.equal(weight, share["weights"][name]) for name, weight in whole["weights"].items())
    first, last = results[0]["share"]["tokens"], results[-1]["share"]["tokens"]
    assert first + last == results[0]["whole"]["tokens"]
    assert min(first, last) > 0


# ------------------------------------------------------------------ checkpoints


CHECKPOINTS = [(1, "checkpoint"), (2, "checkpoint pp2"), (4, "checkpoint"), (2, "by rank tp2"), (4, "by rank dp4")]


@pytest.mark.parametrize(("ranks", "scenario"), CHECKPOINTS)
def test_a_fresh_policy_continues_from_a_checkpoint_bit_for_bit(
    policy_runs: PolicyRuns, ranks: int, scenario: str
) -> None:
    result = policy_runs.get(ranks, scenario)
    assert equal(result["loaded"]["weights"], result["saved"])
    assert equal(result["loaded"]["next"], result["next"])
    assert result["loaded"]["metrics"] == result["next_metrics"]
    assert not equal(result["next"], result["saved"])


@pytest.mark.parametrize(("ranks", "scenario"), CHECKPOINTS)
def test_a_checkpoint_taken_apart_and_written_after_the_next_update_is_the_same_bytes(
    policy_runs: PolicyRuns, ranks: int, scenario: str
) -> None:
    assert policy_runs.get(ranks, scenario)["written behind differs in"] == []


def test_a_save_without_room_is_refused_with_what_it_takes(policy_runs: PolicyRuns) -> None:
    said = policy_runs.get(1, "refused saves")
    assert re.search(r"a copy of this rank's share takes 0\.\d+ GB, .* 1 ranks .* 1e-06 GB", said["no memory"])
    assert "set checkpoint.asynchronous=false" in said["no memory"]
    assert "files may have at most 10000 bytes here (ulimit -f) and it takes about 0.0" in said["small files"]


@pytest.mark.parametrize(("saved_by", "scenario"), [(1, "load from one rank"), (4, "load on one rank")])
def test_a_checkpoint_loads_under_another_layout(policy_runs: PolicyRuns, saved_by: int, scenario: str) -> None:
    """One rank <-> TP2 x PP2, with tied embeddings."""
    loaded, saved = policy_runs.get(4, scenario), policy_runs.get(saved_by, "checkpoint")
    assert equal(loaded["weights"], saved["saved"])
    assert distance(loaded["next"], saved["next"]) < 1e-5


@pytest.mark.parametrize("replicas", [(2, "by rank tp2", "by rank on twice the replicas"), (4, "by rank dp4", "alone")])
def test_what_lies_by_rank_loads_on_any_number_of_replicas(
    policy_runs: PolicyRuns, replicas: tuple[int, str, str]
) -> None:
    ranks, saving, loading = replicas
    saved = policy_runs.get(ranks, saving)
    loaded = policy_runs.get(4, "load on one rank")["by rank"] if loading == "alone" else policy_runs.get(4, loading)
    assert equal(loaded["weights"], saved["saved"])
    assert distance(loaded["next"], saved["next"]) < 1e-5


def test_what_lies_by_rank_is_refused_under_another_layout_with_the_one_that_it_is_of(policy_runs: PolicyRuns) -> None:
    for rank in range(4):
        said = policy_runs.get(4, "by rank under another layout", rank)
        assert "parallel.tensor_model_parallel_size=2, parallel.pipeline_model_parallel_size=1" in said
        assert "checkpoint.portable=always" in said


def test_the_same_state_is_the_same_bytes(policy_runs: PolicyRuns) -> None:
    for rank in range(2):
        first, second = policy_runs.get(2, "saved twice", rank)
        assert first == second


def test_lost_moments_would_be_noticed(policy_runs: PolicyRuns) -> None:
    saved = policy_runs.get(1, "checkpoint")
    assert distance(policy_runs.get(1, "forgetful load"), saved["next"]) > 1e-3


def test_without_bucket_padding_kept_the_checkpoint_of_tied_embeddings_is_wrong(policy_runs: PolicyRuns) -> None:
    """Guards `checkpoint.keep_bucket_padding`. When this fails, Megatron no longer needs it."""
    result = policy_runs.get(4, "checkpoint without padding")
    assert not equal(result["loaded"]["next"], result["next"])


@pytest.mark.parametrize("option", CHANGED_OPTIONS)
def test_an_option_changed_at_a_resume_holds_from_the_first_update(policy_runs: PolicyRuns, option: str) -> None:
    """The update is that of an optimizer built with the option, given the checkpoint's weights, moments and steps."""
    runs = policy_runs.get(1, "changed options")
    changed, before = runs[option], runs["nothing"]
    assert equal(changed["weights"], changed["weights by hand"])
    assert changed["lr"] == changed["lr by hand"]
    assert (
        distance(changed["weights"], before["weights"]) > 1e-6
    )  # about 1e-5 the smallest of them; rounding gives 1e-8


def test_nothing_changed_is_nothing_changed(policy_runs: PolicyRuns) -> None:
    unchanged = policy_runs.get(1, "changed options")["nothing"]
    assert equal(unchanged["weights"], unchanged["weights by hand"])
    # 3 steps taken, 2 of warm-up: one tenth of the way from 1e-3 to 1e-4
    assert unchanged["lr"] == pytest.approx(9.1e-4)


def test_changed_options_are_in_the_parameter_groups(policy_runs: PolicyRuns) -> None:
    runs = policy_runs.get(1, "changed options")
    assert runs["lr"]["groups"][0]["max_lr"] == CHANGED_OPTIONS["lr"]
    assert runs["min_lr"]["groups"][0]["min_lr"] == CHANGED_OPTIONS["min_lr"]
    assert [group["weight_decay"] for group in runs["weight_decay"]["groups"]] == [CHANGED_OPTIONS["weight_decay"], 0.0]
    assert runs["adam_beta1"]["groups"][0]["betas"] == (CHANGED_OPTIONS["adam_beta1"], 0.999)
    assert runs["adam_beta2"]["groups"][0]["betas"] == (0.9, CHANGED_OPTIONS["adam_beta2"])
    assert runs["adam_eps"]["groups"][0]["eps"] == CHANGED_OPTIONS["adam_eps"]
    assert {group["step"] for run in runs.values() for group in run["groups"]} == {3}


def test_no_pickle_in_a_checkpoint_is_executed(policy_runs: PolicyRuns) -> None:
    result = policy_runs.get(1, "payloads")
    assert result["control"], "the payload does nothing: this test could not fail"
    assert result["executed"] == []
    for place, said in result["said"].items():
        assert said.startswith(f"cannot read the checkpoint {policy_runs.folder}/payloads/{place}"), said
        assert "\n" not in said
        assert "system" in said


@pytest.mark.parametrize(
    ("what", "named"), [("cut shard", "/cut"), ("no common.pt", "common.pt"), ("another model", "/ck1")]
)
def test_what_cannot_be_read_is_said_in_a_line_with_the_remedy(policy_runs: PolicyRuns, what: str, named: str) -> None:
    said = policy_runs.get(1, "unreadable")[what]
    assert said.startswith("cannot read the checkpoint ")
    assert named in said
    assert said.endswith("start anew with checkpoint.resume=never")
    assert len(said) < 800
    assert "\n" not in said


# ------------------------------------------------------------------ refused updates


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
@pytest.mark.parametrize("cause", ["weight", "advantage"])
def test_a_non_finite_gradient_is_refused_on_every_rank(policy_runs: PolicyRuns, layout: str, cause: str) -> None:
    results = [policy_runs.get(2, f"non_finite {layout}", rank) for rank in range(2)]
    # Data-parallel: the rank with the sequence. Pipeline: both stages of the one replica.
    guilty = [rank for rank, result in enumerate(results) if result["holds_sequence"]]
    for result in results:
        refusal = result[cause]
        assert refusal["ranks"] == guilty
        assert refusal["sequences"] == [RARE_SEQUENCE]
        assert refusal["untouched"]
        assert f"ranks {guilty}" in refusal["message"]


def test_what_other_ranks_summed_into_this_ranks_shard_is_not_its_own_gradient(policy_runs: PolicyRuns) -> None:
    for rank in range(2):
        finite = policy_runs.get(2, "own_gradient", rank)
        assert finite["reduced", "own shard"]
        assert not finite["reduced", "other shard"]
        assert not finite["local", "own shard"]
        assert not finite["local", "other shard"]


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_the_update_after_a_refused_one_is_that_of_a_fresh_policy(policy_runs: PolicyRuns, layout: str) -> None:
    for rank in range(2):
        result = policy_runs.get(2, f"non_finite {layout}", rank)
        assert result["metrics"] == result["clean_metrics"]


# ------------------------------------------------------------------ reference model, schedule


def test_the_reference_model_stays_where_it_started(policy_runs: PolicyRuns) -> None:
    result = policy_runs.get(1, "reference_model")
    for reference in [*result["reference"], result["reference_end"]]:
        assert torch.equal(reference, result["start"])
    assert not torch.equal(result["end"], result["start"])


def test_the_kl_term_grows_from_zero(policy_runs: PolicyRuns) -> None:
    first, second, third = policy_runs.get(1, "reference_model")["kl"]
    assert first == 0.0
    assert 0.0 < second < third


def test_the_learning_rate_warms_up_and_stays(policy_runs: PolicyRuns) -> None:
    """4 optimizer steps below 1e-3, in equal strides from its fifth: no step is taken at 0."""
    expected = [2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3, 1e-3, 1e-3]
    assert policy_runs.get(1, "learning_rates")["constant"] == pytest.approx(expected)


def test_the_learning_rate_decays_linearly_to_its_minimum(policy_runs: PolicyRuns) -> None:
    """2 steps of warm-up, then from 1e-3 to 1e-4 by step 6."""
    expected = [1e-3 / 3, 2e-3 / 3, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4, 1e-4]
    assert policy_runs.get(1, "learning_rates")["linear"] == pytest.approx(expected)
