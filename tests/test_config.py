"""Options: composed as the entry composes them, checked before anything starts, and every error with its remedy."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_dapo import config as schema
from nemo_dapo import ending, entry
from nemo_dapo.config import OverlongConfig, RunConfig, validate, validate_evaluation
from nemo_dapo.config import checks as checks_between_options
from nemo_dapo.config import layout as checks_of_layouts
from nemo_dapo.config.placement import split_address

CONF = Path(__file__).parents[1] / "conf"
MODEL = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "hidden_size": 128,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture
def command(model: Path) -> list[str]:
    return ["experiment=demo", f"model.path={model}"]


@pytest.fixture(autouse=True)
def _schema() -> None:
    schema.register()


def compose(*arguments: str, name: str = "config") -> RunConfig:
    run = entry.composed(CONF / f"{name}.yaml", list(arguments))
    assert run is not None
    return run


def complaint(*arguments: str, world_size: int = 1) -> str:
    """What a command line is refused with."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the callers look at
        validate(compose(*arguments), world_size)
    return str(caught.value)


def test_the_defaults_are_the_papers() -> None:
    run = compose("model.path=somewhere")
    a, o, r = run.algorithm, run.optimizer, run.rollout
    assert (a.clip_low, a.clip_high, a.group_size, a.prompts_per_step, a.kl_coeff) == (0.2, 0.28, 16, 512, 0.0)
    assert (o.lr, o.weight_decay, o.clip_grad) == (1e-6, 0.1, 1.0)
    assert (r.temperature, r.top_p, r.max_response_length) == (1.0, 1.0, 20480)
    assert (run.reward.overlong, run.reward.correct, run.reward.incorrect) == (OverlongConfig(4096, 1.0), 1.0, -1.0)


@pytest.mark.parametrize("experiment", ["demo", "own_data"])  # those of a preset: test_presets.py
@pytest.mark.parametrize("parallel", ["single", "tp2", "pp2", "tp2pp2"])
def test_every_experiment_and_layout_is_valid(experiment: str, parallel: str, model: Path) -> None:
    validate(compose(f"experiment={experiment}", f"parallel={parallel}", f"model.path={model}"), world_size=4)


@pytest.mark.parametrize(
    "group",
    sorted(
        f"{path.parent.name}={path.stem}"
        for path in CONF.glob("*/*.yaml")
        if path.parent.name not in ("experiment", "parallel")
    ),
)
def test_every_group_composes(group: str) -> None:
    compose(group, "model.path=somewhere")


def test_the_configuration_of_the_evaluation_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PYTHON", "/opt/vllm/bin/python")
    mine = "+data.eval.mine={format: columns, path: mine.jsonl}"
    run = compose("model.path=m", "model=fp32", "reward=dapo", mine, name="evaluate")
    assert (run.model.precision.value, run.reward.style.value) == ("fp32", "dapo")
    assert run.rollout.python == "/opt/vllm/bin/python"
    assert run.data.eval["mine"].path == "mine.jsonl"
    assert (run.evaluation.samples, run.evaluation.top_p) == (32, 0.7)


def test_benchmarks_join_the_sets_that_are_named_otherwise() -> None:
    mine = "+data.eval.mine={format: columns, path: mine.jsonl}"
    for name in ("config", "evaluate"):
        run = compose("model.path=m", "benchmark=[aime24,aime25,amc23,math500,gsm8k]", mine, name=name)
        assert list(run.data.eval) == ["aime24", "aime25", "amc23", "math500", "gsm8k", "mine"]
        assert all(one.hub for one in list(run.data.eval.values())[:-1])


@pytest.mark.parametrize(
    ("arguments", "ranks", "part"),
    [
        ([], 1, "data.eval is empty; choose sets (benchmark=[aime24,math500])"),
        (["benchmark=[aime24]"], 2, "2 ranks were started; start it without torchrun"),
        (["benchmark=[aime24]", "evaluation.temperature=0"], 1, "evaluation.samples=32 with evaluation.temperature=0"),
        (["benchmark=[aime24]", "evaluation.checkpoint=nowhere"], 1, "evaluation.checkpoint='nowhere' has no folder"),
        (["benchmark=[aime24]", "model.path=nowhere"], 1, "model.path='nowhere' has no config.json"),
        (["benchmark=[aime24]", "rollout.transport=device"], 1, "transport=device is of a trainer's ranks"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_it_starts(
    arguments: list[str], ranks: int, part: str, model: Path
) -> None:
    validate_evaluation(compose(f"model.path={model}", "benchmark=[aime24]", name="evaluate"), world_size=1)
    with pytest.raises(ValueError, match=re.escape(part)):
        validate_evaluation(compose(f"model.path={model}", *arguments, name="evaluate"), ranks)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("algorithm.group_sise=4", ["algorithm.group_sise", "did you mean group_size?"]),
        ("algoritm.group_size=4", ["algoritm", "'RunConfig'", "did you mean algorithm?"]),
        ("+rollout.max_promt_length=4", ["rollout.max_promt_length", "did you mean max_prompt_length?"]),
        ("+data.train.mine={format: columns, paht: x}", ["data.train.mine.paht", "did you mean path?"]),
        ("data.trian.mine={format: columns}", ["data.trian", "'DataConfig'", "did you mean train?"]),
        ("data.train.mine.path=x", ["data.train.mine.format", "mandatory"]),
        ("rollout.vlm.max_num_seqs=3", ["rollout.vlm", "did you mean vllm?"]),
        ("reward.extra.style.functoin=m:f", ["reward.extra.style.functoin", "did you mean function?"]),
        ("zzz=1", ["zzz", "'RunConfig'"]),
        ("algorithm.group_size=many", ["algorithm.group_size", "'many'", "Integer"]),
        ("model.precision=fp64", ["model.precision", "fp64", "bf16, fp32"]),
        ("experiment=demoo", ["experiment/demoo", "demo"]),
        ("trainer.max_steps=[1", ["trainer.max_steps=[1"]),
    ],
)
def test_a_bad_argument_is_named_in_one_line(argument: str, parts: list[str], command: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        compose(*command, argument)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_right_key_with_a_wrong_type_is_not_called_misspelt(command: list[str]) -> None:
    with pytest.raises(ValueError, match="group_size") as caught:
        compose(*command, "algorithm.group_size=many")
    assert "did you mean" not in str(caught.value)


def test_a_model_that_was_not_named_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"model\.path"):
        compose()


# Every check between options: arguments beside the demo's, and what the message must hold: value, expectation, remedy.
CONTRADICTIONS = {
    "minibatch": (
        ["algorithm.minibatch_size=7", "algorithm.prompts_per_step=2", "algorithm.group_size=4"],
        ["algorithm.minibatch_size=7", "must divide prompts_per_step * group_size", "2 * 4 = 8"],
    ),
    "microbatch": (
        ["trainer.tokens_per_microbatch=79"],
        ["trainer.tokens_per_microbatch=79", "must hold one sequence", "= 80"],
    ),
    "overlong": (
        ["reward.overlong.buffer=65"],
        ["reward.overlong.buffer=65", "rollout.max_response_length=64", "set it to 0"],
    ),
    "model length": (
        ["rollout.vllm.max_model_len=79"],
        ["rollout.vllm.max_model_len=79", "must hold max_prompt_length + max_response_length = 80"],
    ),
    "model length in words": (
        ["rollout.vllm.max_model_len=32k"],
        ["rollout.vllm.max_model_len='32k'", "whole number", "80"],
    ),
    "evaluation length": (
        ["evaluation.max_response_length=81"],
        ["evaluation.max_response_length=81", "servers' 96 tokens", "rollout.vllm.max_model_len=97"],
    ),
    "evaluation length, default": (
        ["evaluation.max_response_length=65", "rollout.vllm.max_model_len=null"],
        ["evaluation.max_response_length=65", "servers' 80 tokens", "rollout.vllm.max_model_len=81"],
    ),
    "decay": (
        ["optimizer.decay_steps=10", "optimizer.warmup_steps=10"],
        ["optimizer.decay_steps=10", "exceed warmup_steps=10", "decay_style=linear"],
    ),
    "min lr": (["optimizer.min_lr=1"], ["optimizer.min_lr=1", "not exceed optimizer.lr=0.00015"]),
    "last port": (
        ["rollout.port=65535", "rollout.num_servers=2"],
        ["rollout.port=65535", "num_servers=2", "set it to 0"],
    ),
    "nothing to prefer": (
        ["reward.correct=0", "reward.incorrect=0"],
        ["reward.correct=0.0", "exceed reward.incorrect=0.0", "1 and -1"],
    ),
    "a function that is none": (["reward.function=nope"], ["reward.function='nope'", "package.module:name", "http(s)"]),
    "a loss that is none": (
        ["algorithm.loss=my_losses"],
        ["algorithm.loss='my_losses'", "dapo, cispo, dr_grpo, gspo", "package.module:name", "LossFn"],
    ),
    "a term that is none": (
        ["reward.extra.style.function=a/b.py:f"],
        ["reward.extra.style.function='a/b.py:f'", "my_package.rewards:my_function"],
    ),
    "no name": (["name=''"], ["name=''", "must not be empty", "set name="]),
    "no folder": (["output_dir=' '"], ["output_dir=' '", "must not be empty", "leave it out"]),
    "top p": (["rollout.top_p=0.9"], ["rollout.top_p=0.9", "set 1.0 and -1"]),
    "top k": (["rollout.top_k=20"], ["top_k=20", "set 1.0 and -1"]),
    "top p, corrected in vain": (
        ["rollout.top_p=0.9", "algorithm.importance_cap=2"],
        ["rollout.top_p=0.9", "algorithm.importance_cap cannot correct", "among the kept tokens"],
    ),
    "Megatron's layout": (
        ["model.megatron.context_parallel_size=2"],
        ["model.megatron.context_parallel_size=2", "set by the trainer", "change parallel.context_parallel_size"],
    ),
    "Megatron's data type": (["model.megatron.bf16=true"], ["model.megatron.bf16=True", "change model.precision"]),
    "Megatron's learning rate": (["optimizer.megatron.lr=1"], ["optimizer.megatron.lr=1", "change optimizer.lr"]),
    "a gather that goes on": (
        ["parallel.ddp.overlap_param_gather=true", "optimizer.megatron.overlap_param_gather=true"],
        ["parallel.ddp.overlap_param_gather", "optimizer.megatron.overlap_param_gather", "between two steps"],
    ),
    "a head of one side": (
        ["rollout.vllm.hf_overrides={head_dtype: float32}"],
        ["head_dtype on one side alone", "model.fp32_logits=true"],
    ),
    "loss without its constant": (
        ["algorithm.loss=dr_grpo"],
        ["algorithm.loss_length=0", "rollout.max_response_length"],
    ),
    "weights of tokens": (["algorithm=gspo", "algorithm.importance_cap=2"], ["importance_cap=2.0", "set it to 0"]),
    "weights of tokens, low": (
        ["algorithm=gspo", "algorithm.importance_low=0.5"],
        ["importance_low=0.5", "set it to 0"],
    ),
    "bounds of nothing": (
        ["algorithm.importance_sequence_high=2"],
        ["importance_sequence_low=0.0, _high=2.0", "set algorithm.importance_sequence=mean or product"],
    ),
    "a ratio without bounds": (
        ["algorithm.importance_sequence=mean"],
        ["algorithm.importance_sequence=mean without a bound", "set one, or none"],
    ),
    "dual clip of none": (["algorithm=cispo", "algorithm.dual_clip=10"], ["dual_clip=10.0", "set it to null"]),
    "devices": (["rollout.visible_devices=['0','1']"], ["visible_devices has 2", "num_servers=1", "one each"]),
    "evaluation of copies": (
        ["evaluation.temperature=0", "evaluation.samples=4"],
        ["evaluation.samples=4", "evaluation.temperature=0", "set 1 or a temperature"],
    ),
    "evaluation of copies, one set": (
        ["evaluation.temperature=0", "evaluation.samples=1", "+data.eval.arithmetic.samples=8"],
        ["data.eval.arithmetic.samples=8", "evaluation.temperature=0", "set 1 or a temperature"],
    ),
    "no evaluation set": (["~data.eval.arithmetic"], ["evaluation.every=5", "data.eval is empty", "set it to 0"]),
    "no training set": (["~data.train.arithmetic"], ["data.train is empty", "data=gsm8k"]),
    "layout": (["parallel=tp2pp2"], ["1 ranks", "2 * 2 * 1", "--nproc-per-node"]),
    "virtual stages of none": (
        ["parallel.virtual_pipeline_model_parallel_size=2"],
        ["virtual_pipeline_model_parallel_size=2", "there is 1", "to 1"],
    ),
    "responses cut by context parallelism": (
        ["algorithm=gspo", "parallel.context_parallel_size=2"],
        ["algorithm.loss=gspo", "context_parallel_size=2", "set it to 1"],
    ),
    "responses weighed under context parallelism": (
        [
            "algorithm.importance_sequence=mean",
            "algorithm.importance_sequence_high=2",
            "parallel.context_parallel_size=2",
        ],
        ["algorithm.importance_sequence=mean", "context_parallel_size=2", "set it to none"],
    ),
    "experts of more ranks": (
        ["parallel.expert_model_parallel_size=4"],
        ["1 ranks", "expert_model_parallel_size * expert_tensor_parallel_size", "= 4"],
    ),
    "sequence parallel": (["parallel.sequence_parallel=true"], ["sequence_parallel=true", "there is 1", "to false"]),
    "export over the model": (
        ["output_dir=runs/x", "model.path=runs/x/trained"],
        ["model.path='runs/x/trained'", "writes its trained model", "checkpoint.export=false"],
    ),
    "key file": (["rollout.api_key_file=/nowhere"], ["rollout.api_key_file='/nowhere'", "is no file"]),
    "tokens of no dump": (["logger.rollout_tokens=true"], ["logger.rollout_every=0", "set rollout_every=1"]),
    "replay of nothing": (
        ["rollout.replay=nowhere", "evaluation.every=0", "evaluation.at_start=false"],
        ["rollout.replay='nowhere'", "holds no step_*.parquet"],
    ),
    "replay of itself": (["output_dir=runs/x", "rollout.replay=runs/x/rollouts"], ["own folder", "another output_dir"]),
    "replay of an evaluation": (["rollout.replay=nowhere"], ["no answers to evaluation", "set evaluation.every=0"]),
    "no model": (["model.path=nowhere"], ["model.path='nowhere'", "no config.json", "prepare.py"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_told_with_value_expectation_and_remedy(case: str, command: list[str]) -> None:
    arguments, parts = CONTRADICTIONS[case]
    message = complaint(*command, *arguments)
    for part in parts:
        assert part in message


def test_no_check_between_options_is_without_a_test() -> None:
    """Each `yield` of a check is one complaint, provoked above or by other models below."""
    checks = Path(checks_between_options.__file__).read_text() + Path(checks_of_layouts.__file__).read_text()
    complaints = len(re.findall(r"^ +yield (?!from)", checks, re.MULTILINE))
    by_models = 17  # sizes that do not divide, experts, adapters, routes, products in eight bits
    no_yield_of_their_own = {
        "no model",  # of model_family.py
        "top k",
        "a term that is none",
        "evaluation length, default",
        "evaluation of copies, one set",
        "top p, corrected in vain",
        "weights of tokens, low",
        "Megatron's layout",
        "Megatron's data type",
        "Megatron's learning rate",
        "a gather that goes on",
    }
    assert complaints == len(CONTRADICTIONS.keys() - no_yield_of_their_own) + by_models


def test_all_contradictions_are_told_at_once(command: list[str]) -> None:
    message = complaint(*command, "algorithm.minibatch_size=7", "rollout.top_k=20")
    assert "algorithm.minibatch_size=7" in message
    assert "top_k=20" in message


def rewrite(model: Path, **changes: Any) -> None:
    (model / "config.json").write_text(json.dumps(MODEL | changes))


@pytest.mark.parametrize(
    ("changes", "parallel", "parts"),
    [
        ({"num_attention_heads": 3}, "tp2", ["tensor_model_parallel_size=2", "num_attention_heads=3"]),
        ({"num_key_value_heads": 1}, "tp2", ["tensor_model_parallel_size=2", "num_key_value_heads=1"]),
        ({"vocab_size": 321}, "tp2", ["tensor_model_parallel_size=2", "vocab_size=321"]),
        ({"num_hidden_layers": 1}, "pp2", ["pipeline_model_parallel_size=2", "num_hidden_layers=1", "set it to 1"]),
    ],
)
def test_a_model_that_the_layout_does_not_divide_is_refused(
    changes: dict[str, int], parallel: str, parts: list[str], model: Path, command: list[str]
) -> None:
    rewrite(model, **changes)
    message = complaint(*command, f"parallel={parallel}", world_size=2)
    for part in parts:
        assert part in message


EXPERTS = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6}
SAVED_BY_TRANSFORMERS_5 = {"num_local_experts" if key == "num_experts" else key: EXPERTS[key] for key in EXPERTS}


@pytest.mark.parametrize(
    ("changes", "arguments", "parts"),
    [
        ({}, ["expert_model_parallel_size=2"], ["expert_model_parallel_size=2", "the model has none", "to 1"]),
        (EXPERTS, ["expert_model_parallel_size=4"], ["expert_model_parallel_size=4", "num_experts=6"]),
        (SAVED_BY_TRANSFORMERS_5, ["expert_model_parallel_size=4"], ["expert_model_parallel_size=4", "num_experts=6"]),
        (
            {"num_hidden_layers": 6},
            ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"],
            ["virtual_pipeline_model_parallel_size=2", "4 equal parts", "num_hidden_layers=6"],
        ),
        (EXPERTS, ["tensor_model_parallel_size=2"], ["sequence_parallel=false", "set it to true"]),
        (
            EXPERTS,
            ["tensor_model_parallel_size=2", "sequence_parallel=true", "expert_tensor_parallel_size=1"],
            ["expert_tensor_parallel_size=1", "tensor_model_parallel_size=2", "set it to null"],
        ),
    ],
)
def test_a_layout_that_cannot_hold_the_models_parts_is_refused(
    changes: dict[str, Any], arguments: list[str], parts: list[str], model: Path, command: list[str]
) -> None:
    rewrite(model, **changes)
    message = complaint(*command, *(f"parallel.{argument}" for argument in arguments), world_size=4)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "arguments", "parts"),
    [
        ({}, ["model.lora.rank=3", "parallel=tp2"], ["model.lora.rank=3", "tensor_model_parallel_size=2", "multiple"]),
        ({}, ["model.lora.rank=4", "model.lora.target_modules=[q_proj]"], ["target_modules=['q_proj']", "linear_qkv"]),
        ({}, ["model.lora.rank=4", "model.lora.target_modules=[]"], ["target_modules=[]", "some of linear_qkv"]),
        (EXPERTS, ["model.lora.rank=4"], ["linear_fc1, linear_fc2", "experts'", "[linear_qkv,linear_proj]"]),
        ({"kv_lora_rank": 32}, ["model.lora.rank=4"], ["model.lora.rank=4", "multi-latent attention", "to 0"]),
    ],
)
def test_adapters_that_the_model_cannot_have_are_refused(
    changes: dict[str, Any], arguments: list[str], parts: list[str], model: Path, command: list[str]
) -> None:
    rewrite(model, **changes)
    message = complaint(*command, *arguments, world_size=2)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "capability", "parts"),
    [
        ([], None, ["model.fp8=blockwise", "no GPU here", "set model.fp8=none"]),
        ([], (8, 9), ["Hopper", "compute capability is 8.9", "set model.fp8=none"]),
        (["model.precision=fp32"], (9, 0), ["model.precision=fp32", "set model.precision=bf16"]),
        (
            ["parallel=tp2", "model.lora.rank=16"],
            (9, 0),
            ["multiples of 16", "lora.rank over", "=2 is 8"],
        ),
    ],
)
def test_products_in_eight_bits_that_cannot_be_are_refused(
    arguments: list[str],
    capability: tuple[int, int] | None,
    parts: list[str],
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "transformer_engine")
    message = complaint(*command, "model.fp8=blockwise", *arguments, world_size=2)
    for part in parts:
        assert part in message


def test_without_transformer_engine_there_are_no_products_in_eight_bits(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "this interpreter has no transformer_engine" in complaint(*command, "model.fp8=blockwise")


@pytest.mark.parametrize(
    ("changes", "arguments", "parts"),
    [
        ({}, [], ["model.replay_routes=true", "dense", "false"]),
        (EXPERTS, ["model.megatron.moe_router_fusion=true"], ["moe_router_fusion=true", "leave one"]),
        (
            EXPERTS,
            ["rollout.return_routes=true", "model.replay_routes=false"],
            ["nothing follows", "replay_routes=true"],
        ),
        (EXPERTS, ["rollout.return_routes=true", "+rollout.vllm.pipeline_parallel_size=2"], ["pipeline_parallel_size"]),
        (EXPERTS, ["rollout.return_routes=true", "+rollout.vllm.enable_prefix_caching=false"], ["prefix cache"]),
    ],
)
def test_routes_that_cannot_be_replayed_are_refused(
    changes: dict[str, Any], arguments: list[str], parts: list[str], model: Path, command: list[str]
) -> None:
    rewrite(model, **changes)
    message = complaint(*command, "model.replay_routes=true", *arguments)
    for part in parts:
        assert part in message


def test_the_demo_of_a_mixture_deals_its_experts_to_its_two_ranks(model: Path) -> None:
    rewrite(model, **SAVED_BY_TRANSFORMERS_5)
    run = compose("experiment=demo_moe", f"model.path={model}")
    validate(run, world_size=2)
    assert (run.parallel.expert_model_parallel_size, run.model.precision.value) == (2, "fp32")
    assert run.optimizer.lr == compose("experiment=demo", f"model.path={model}").optimizer.lr


def test_the_demo_of_adapters_is_the_demo_at_another_rate(model: Path) -> None:
    run, plain = (compose(f"experiment={name}", f"model.path={model}") for name in ("demo_lora", "demo"))
    validate(run, world_size=2)
    assert (run.model.lora.rank, run.optimizer.lr > plain.optimizer.lr) == (16, True)
    run.model.lora, run.optimizer.lr = plain.model.lora, plain.optimizer.lr
    run.name, run.output_dir = plain.name, plain.output_dir
    assert run == plain


def test_a_request_for_anything_but_one_run_is_left_to_hydra() -> None:
    for arguments in (["--cfg", "all"], ["--info", "searchpath"], ["--hydra-help"], ["--config-name", "mine"]):
        assert entry.composed(CONF / "config.yaml", arguments) is None
        assert schema.asked_to_print(CONF / "config.yaml", arguments) is None


def refused(check: Callable[[RunConfig], None], *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of the entry for a command line that it refuses; hydra_runner is never reached."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(ending, "StopSignals", lambda say, is_rank_zero: None)  # signals stay pytest's
    monkeypatch.setattr(ending.Ending, "exit", lambda self, code: sys.exit(code))
    with pytest.raises(SystemExit) as caught:
        entry.start(lambda cfg, _: pytest.fail("started"), CONF / "config.yaml", ("torch",), check)
    return int(str(caught.value.code))


def test_the_entry_refuses_with_one_line_and_exit_code_two(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(os.environ, "RANK", raising=False)
    assert refused(lambda run: None, *command, "algorithm.group_sise=4", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: algorithm.group_sise")
    assert error.count("\n") == 1


def test_of_many_ranks_that_find_the_same_the_first_speaks_and_the_others_give_it_time_to(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")

    def wait(seconds: float) -> None:
        waited.append(seconds)
        print("waited", file=sys.stderr)

    monkeypatch.setattr(ending.time, "sleep", wait)
    assert refused(lambda run: None, *command, "algorithm.group_sise=4", monkeypatch=monkeypatch) == 2
    assert waited == [ending.ALIKE_SECONDS]
    assert capsys.readouterr().err.startswith("waited\nerror: algorithm.group_sise")


def test_an_error_says_where_its_rank_was_and_on_which_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(ending, "StopSignals", lambda say, is_rank_zero: SimpleNamespace(saves_first=False, name=""))
    one = ending.Ending()
    one.output_dir, one.phase.name, one.phase.step = tmp_path, "update", 12
    one.say(RuntimeError("no memory"))
    where = f"update of step 12 on {socket.gethostname()}"
    traceback = tmp_path / "errors" / "rank_3.log"
    assert capsys.readouterr().err == f"error: rank 3: RuntimeError: no memory ({where}; traceback in {traceback})\n"
    assert where in traceback.read_text()


def test_a_warning_carries_its_time_and_rank_and_what_merely_informs_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    said = [
        entry.Dated().format(logging.LogRecord("dapo", level, "file", 1, "a %s", ("word",), None))
        for level in (logging.INFO, logging.WARNING)
    ]
    assert said[0] == "a word"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 3: a word", said[1])


def test_an_interpreter_for_vllm_that_does_not_exist_is_refused(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(os.environ, "RANK", raising=False)
    arguments = [*command, "rollout.python=/nowhere/python"]
    assert refused(lambda run: None, *arguments, monkeypatch=monkeypatch) == 2
    assert "rollout.python='/nowhere/python' is no program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["rollout.placement=dedicated"], "rollout.nodes=0 waits for nobody"),
        (["rollout.nodes=2"], "rollout.nodes=2 is for rollout.placement=dedicated, and it is local"),
        (["rollout.servers=[http://127.0.0.1:8000]"], "rollout.servers is for rollout.placement=attach"),
        (["rollout.placement=attach"], "needs your servers"),
        (["rollout.placement=attach", "rollout.servers=[127.0.0.1:8000]"], "must be http://host:port"),
        (["rollout.placement=attach", "rollout.servers=['http://far:1']"], "'http://far:1' is on another host"),
        (
            ["rollout.placement=attach", "rollout.servers=['http://localhost:1','http://localhost:1']"],
            "names a server twice",
        ),
        (
            ["rollout.placement=attach", "rollout.servers=['http://localhost:1']", "rollout.transport=device"],
            "rollout.transport=device sends into the GPUs of servers that the run started",
        ),
        (["rollout.min_servers=3", "rollout.num_servers=2"], "rollout.min_servers=3 exceeds the 2 server(s)"),
        (
            ["rollout.placement=dedicated", "rollout.nodes=2", "rollout.min_servers=3"],
            "rollout.min_servers=3 exceeds the 2 server(s)",
        ),
        (["rollout.listen=head"], "rollout.listen='head' must be host:port"),
        (["rollout.listen='head:99999'"], "must be host:port"),
    ],
)
def test_placements_that_contradict_themselves_are_refused_with_the_remedy(
    options: list[str], said: str, command: list[str]
) -> None:
    assert said in complaint(*command, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "set algorithm.importance_cap=2, or max_staleness=0"),
        (["algorithm=gspo"], "gspo has no such correction: choose another loss, or max_staleness=0"),
        (["algorithm.importance_cap=2", "rollout.vllm.enable_sleep_mode=true"], "these servers sleep then"),
        (["algorithm.importance_cap=2", "rollout.placement=colocated"], "these servers sleep then"),
        (["algorithm.importance_cap=2", "rollout.replay=nowhere"], "played back step by step"),
    ],
)
def test_generation_during_updates_is_refused_where_it_cannot_be(
    options: list[str], said: str, command: list[str]
) -> None:
    asked = complaint(*command, "rollout.max_staleness=2", *options)
    assert "rollout.max_staleness=2" in asked
    assert said in asked


def test_an_address_to_listen_on_may_leave_the_host_open() -> None:
    found = [split_address(one) for one in ("", ":29600", "head:29600", "[fd00::1]:1")]
    assert found == [("", 0), ("", 29600), ("head", 29600), ("fd00::1", 1)]
