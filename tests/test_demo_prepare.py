"""The demo's warm start and its report, on a model that trains for two steps."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import prepare, report
from nemo_dapo.config import RunConfig
from nemo_dapo.config.model_family import check_trainable, read
from nemo_dapo.data.formats.arithmetic import Sum, generate

RECIPE = prepare.Recipe(template="{problem}\n", max_digits=4, hidden=32, intermediate=64, layers=1, steps=2, batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    assert prepare.prepare(path, dataclasses.replace(RECIPE, problems=64))
    return path


# The warm start


def test_every_text_of_the_demo_survives_the_loader_that_trainer_and_vllm_use(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for item in generate(50, seed=0, max_digits=4):
        for text in (f"{item.problem}\n", item.solution):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("Answer: \\boxed{½} \t été\n\n")) == "Answer: \\boxed{½} \t été\n\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\nAnswer: 12")) == ["Ċ", "Answer", ":", "Ġ", "1", "2"]
    assert tokenizer.eos_token_id == prepare.EOS


def test_the_saved_model_has_the_recipe_s_shape_and_an_unusual_rope_theta(folder: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.rope_parameters["rope_theta"] == RECIPE.rope_theta != 10000
    assert config.vocab_size % 8 == 0
    assert config.vocab_size >= len(AutoTokenizer.from_pretrained(folder))


def test_a_second_run_of_the_same_recipe_does_nothing_and_another_seed_does(folder: Path, tmp_path: Path) -> None:
    written = (folder / "model.safetensors").stat().st_mtime_ns
    recipe = dataclasses.replace(RECIPE, problems=64)
    assert not prepare.prepare(folder, recipe)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert not prepare.is_cached(folder, dataclasses.replace(recipe, seed=1))
    assert not prepare.is_cached(tmp_path, recipe)


def test_only_the_response_and_its_end_are_targets(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    recipe = dataclasses.replace(RECIPE, forget_carry=0.0, miscount=0.0)
    rows = prepare.training_rows([Sum(9, 1), Sum(1234, 5)], tokenizer, recipe, random.Random(0))
    inputs, targets = prepare.padded(rows)
    scored = targets[0][targets[0] != prepare.IGNORED]
    assert tokenizer.decode(scored[:-1]) == Sum(9, 1).solution
    assert scored[-1] == prepare.EOS
    where = torch.nonzero(targets[0] != prepare.IGNORED)[:, 0]
    assert torch.equal(inputs[0][where + 1], scored)  # each target is the next input
    assert tokenizer.decode(inputs[0][: where[0] + 1]) == "9+1=?\n"


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    """Of all parameters, one behind the other."""
    parts = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
    return torch.cat(parts)


def test_rows_in_several_passes_have_the_gradient_of_all_at_once(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), prepare.build_model(RECIPE)
    sums = [Sum(9, 1), Sum(1234, 5), Sum(7, 7), Sum(22, 93), Sum(123, 4)]
    rows = prepare.training_rows(sums, tokenizer, RECIPE, random.Random(0))
    assert [len(part) for part in prepare.passes(rows, 80)] == [2, 1, 1, 1]
    assert prepare.passes(rows, 400) == [rows]
    found = []
    for limit in (400, 80, 1):
        model.zero_grad()
        loss = prepare.backward(model, rows, limit)
        found.append((loss, gradient_of(model)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)  # sums in another order


def test_the_demo_s_experiment_and_its_warm_start_ask_in_the_same_words() -> None:
    recipe = prepare.recipe_of("demo", seed=3)
    assert recipe.seed == 3
    assert "{problem}" in recipe.template
    longest = Sum(10**recipe.max_digits - 1, 10**recipe.max_digits - 1)
    assert len(longest.solution) < 64


def test_the_mixture_is_warm_started_and_read_as_one(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, problems=64, experts=prepare.recipe_of("demo_moe", seed=0).experts)
    assert prepare.prepare(tmp_path / "model", recipe)
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    model, loading = both
    assert not loading["missing_keys"]
    assert (model.config.model_type, model.config.num_experts, model.config.num_experts_per_tok) == ("qwen3_moe", 4, 2)
    assert not [*check_trainable("model", read(str(tmp_path / "model")))]
    assert not prepare.prepare(tmp_path / "model", recipe)


# The report


def row(step: int, accuracy: float, **more: float) -> dict[str, float]:
    values = {"accuracy": accuracy, "reward": 2 * accuracy - 1, "entropy": 0.1, "groups_sampled": 20, "groups_kept": 16}
    values |= {"response_length": 30, "generated_tokens": 1000, "logprob_gap": 1e-6, "seconds": 2.0}
    return {"step": step} | {report.KEYS[name]: value for name, value in values.items()} | more


def write_run(path: Path, rows: list[dict[str, float]]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path / "metrics.jsonl"


def test_the_summary_adds_up_what_the_metrics_say(tmp_path: Path) -> None:
    before = {
        "step": 0,
        "eval/sums/avg@1": 0.4,
        "eval/sums/avg@1_low": 0.3,
        "rollout/logprob_gap": 0.0,
        "time/eval": 2.0,
    }
    after = {"eval/sums/avg@1": 0.9, "time/eval": 3.0, "time/save": 1.0}
    file = write_run(tmp_path, [before, row(1, 0.5), row(2, 0.8, **after)])
    summary = report.summarise(report.read_metrics(file), started=100.0, now=150.0)
    assert summary == report.Summary(
        accuracy_before=0.4,
        accuracy_after=0.9,
        steps=2,
        seconds_total=50.0,
        seconds_setup=42.0,
        seconds_train=4.0,
        completion_tokens_per_second=500.0,
        groups_sampled=40,
        groups_kept=32,
        mean_abs_logprob_gap=1e-6,
    )


def test_a_step_that_a_resumed_run_repeats_counts_once_and_its_last_line_wins(tmp_path: Path) -> None:
    rows = report.read_metrics(write_run(tmp_path, [row(1, 0.1), row(2, 0.2), row(2, 0.3), row(3, 0.4)]))
    assert report.series(rows, "accuracy") == [(1, 0.1), (2, 0.3), (3, 0.4)]


def test_the_picture_and_the_table_are_made_from_a_run_that_lacks_some_metrics(tmp_path: Path) -> None:
    rows = report.read_metrics(write_run(tmp_path, [row(1, 0.1), {"step": 2, "time/step": 1.0}]))
    report.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "1-1" in report.table(rows)


def test_a_run_without_steps_or_evaluations_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: run the training first"):
        report.read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="ended before its first step"):
        report.read_metrics(write_run(tmp_path, [{"step": 0, "eval/sums/avg@1": 0.4}]))
    with pytest.raises(ValueError, match="evaluation before and after training, found 0"):
        report.summarise([row(1, 0.5)], started=None, now=0.0)


def test_the_experiment_s_keys_are_those_of_the_schema() -> None:
    OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(prepare.EXPERIMENT))
