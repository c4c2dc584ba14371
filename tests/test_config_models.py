"""Models are taken or refused by their config.json alone: what trains here, and every option that would train wrongly."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from nemo_dapo import config as schema
from nemo_dapo import entry
from nemo_dapo.config import model_family, validate, validate_evaluation
from nemo_dapo.config.model_family import (
    FAMILIES,
    FREE,
    ROPE_OPTIONS,
    check_stages,
    check_trainable,
    layers_in_last_stage,
)
from tests import mixture_scenarios, tiny
from tests.policy_scenarios import MODELS
from tests.tiny import save_tiny_model

CONF = Path(__file__).parents[1] / "conf"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "initializer_range": 0.02,
    "use_cache": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}

# As these models are published, beside SIZES.
TRAINS: dict[str, dict[str, Any]] = {
    "Qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645,
        "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    },
    "Qwen2.5 distilled, with a switched-off multimodal option": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_mrope": False, "sliding_window": 4096,
        "max_window_layers": 28, "use_sliding_window": False, "rope_theta": 10000,
    },
    "Qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "max_window_layers": 36, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "bfloat16",
    },
    "Llama 2": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "_name_or_path": "meta", "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False, "pad_token_id": 0,
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 1, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "rope_scaling": LLAMA3,
        "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    "Mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8,
        "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None, "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "Moonlight": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001,
        "ep_size": 1, "first_k_dense_replace": 1, "kv_lora_rank": 512, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True, "num_experts_per_tok": 6,
        "num_key_value_heads": 32, "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": None, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
    },
    "SmolLM2": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "is_llama_config": True,
        "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "mlp_bias": False,
    },
    "written by transformers 5": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "layer_types": ["full_attention"] * 16,
        "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "id2label": {"0": "LABEL_0"}, "return_dict": True,
    },
}  # fmt: skip

# Model types that do not train: the published pair of model type and architecture.
OTHERS = {
    "mistral": "MistralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
}

# Options of a family that trains, which would train wrongly: the base, what differs, what the line must hold.
WRONG: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a window in force": ("Qwen2.5", {"use_sliding_window": True}, ["use_sliding_window=True", "=False only"]),
    "a window in some layers": (
        "written by transformers 5",
        {"layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types with sliding_attention", "full_attention only"],
    ),
    "linear attention": ("Qwen3", {"layer_types": ["linear_attention"]}, ["layer_types with linear_attention"]),
    "a window that vLLM would use": ("Llama 2", {"sliding_window": 4096}, ["sliding_window=4096", "no LlamaForCausalLM"]),
    "attention bias": ("Llama 2", {"attention_bias": True}, ["attention_bias=True", "=False only"]),
    "attention bias of Qwen3": ("Qwen3", {"attention_bias": True}, ["attention_bias=True", "=False only"]),
    "mlp bias": ("Llama 3.2", {"mlp_bias": True}, ["mlp_bias=True", "=False only"]),
    "another activation": ("Llama 2", {"hidden_act": "gelu_pytorch_tanh"}, ["hidden_act='gelu_pytorch_tanh'", "'silu'"]),
    "sliced matrices": ("Llama 2", {"pretraining_tp": 2}, ["pretraining_tp=2", "=1 only"]),
    "capped logits": ("Llama 2", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0", "another model"]),
    "scaled embeddings": ("Llama 2", {"embedding_multiplier": 12.0}, ["embedding_multiplier=12.0", "delete it"]),
    "quantised weights": ("Qwen2.5", {"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
    "code of its own": ("Qwen2.5", {"auto_map": {"AutoModel": "x.Y"}}, ["auto_map={'AutoModel': 'x.Y'}"]),
    "long and short attention": ("Qwen2.5", {"dual_chunk_attention_config": {"chunk": 1}}, ["dual_chunk_attention"]),
    "a classifier": ("Llama 2", {"architectures": ["LlamaForSequenceClassification"]}, ["ForSequenceClassification"]),
    "no architecture": ("Llama 2", {"architectures": None}, ["architectures=None", "llama (LlamaForCausalLM)"]),
    "no family": ("Llama 2", {"model_type": None}, ["model_type=None"]),
    "stretched positions": (
        "Qwen2.5",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        ["rope_scaling of type 'yarn'", "default or llama3"],
    ),
    "linearly stretched positions": ("Llama 2", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, ["'linear'"]),
    "positions of three axes": ("Qwen2.5", {"rope_scaling": {"type": "mrope"}}, ["'mrope'"]),
    "positions in a part of the head": (
        "written by transformers 5",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["rope_parameters.partial_rotary_factor=0.5", "1.0"],
    ),
    "another llama3": (
        "Llama 3.2",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}},
        ["original_max_position_embeddings=4096", "=8192"],
    ),
    "half a llama3": (
        "Llama 3.2",
        {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        ["original_max_position_embeddings=None"],
    ),
    "llama3 without a factor": ("Llama 3.2", {"rope_scaling": LLAMA3 | {"factor": None}}, ["factor=None", "at least 1"]),
    "a window of Mixtral": ("Mixtral", {"sliding_window": 4096}, ["sliding_window=4096", "=None only"]),
    "layers that predict further tokens": (
        "Moonlight", {"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers=1", "=0 only"],
    ),
    "groups chosen otherwise": (
        "Moonlight",
        {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 8},
        ["n_group=8, topk_group=2 and num_experts_per_tok=8", "num_experts_per_tok // topk_group is 2"],
    ),
    "scores of another kind": ("Moonlight", {"scoring_func": "softmax"}, ["scoring_func='softmax'", "'sigmoid' only"]),
    "half a yarn": (
        "Moonlight",
        {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0}},
        ["rope_scaling.mscale_all_dim=None", "must be a number"],
    ),
    "llama3 for yarn": ("Moonlight", {"rope_scaling": LLAMA3}, ["type 'llama3'", "default or yarn"]),
    "an option of another family": ("Mixtral", {"n_shared_experts": 2}, ["n_shared_experts=2", "no MixtralForCausalLM"]),
    "positions by layer": (
        "written by transformers 5",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        ["rope_parameters.full_attention="],
    ),
}  # fmt: skip


def complaints(name: str, **changes: Any) -> list[str]:
    return list(check_trainable("my/model", SIZES | TRAINS[name] | changes))


@pytest.mark.parametrize("name", TRAINS)
def test_a_published_model_of_a_tested_family_trains(name: str) -> None:
    assert complaints(name) == []


@pytest.mark.parametrize("name", MODELS)
def test_what_the_parity_tests_train_is_what_is_taken(name: str, tmp_path: Path) -> None:
    options = dict(MODELS[name])
    save_tiny_model(tmp_path, family=options.pop("family"), tied=options.pop("tied"), **options)
    assert list(check_trainable(str(tmp_path), model_family.read(str(tmp_path)))) == []


def test_every_family_that_is_taken_has_a_parity_test() -> None:
    models = [*MODELS.values(), *mixture_scenarios.MODELS.values()]
    assert set(FAMILIES) == {tiny.FAMILIES[options["family"]].model_type for options in models}


@pytest.mark.parametrize(("name", "value"), [("scoring_func", "'sigmoid'"), ("topk_method", "'noaux_tc'")])
def test_options_of_which_vllm_has_another_default_must_be_in_the_file(name: str, value: str) -> None:
    config = SIZES | TRAINS["Moonlight"]
    del config[name]
    (line,) = check_trainable("my/model", config)
    assert f"has no {name}, which vLLM then takes otherwise; add it to the file: {name}={value}" in line


@pytest.mark.parametrize("model_type", OTHERS)
def test_another_family_is_refused_in_one_line_that_names_those_that_train(model_type: str) -> None:
    (line,) = complaints("Llama 2", model_type=model_type, architectures=[OTHERS[model_type]])
    for part in ("model.path='my/model'", repr(model_type), OTHERS[model_type], *FAMILIES):
        assert part in line
    assert "\n" not in line


@pytest.mark.parametrize("case", WRONG)
def test_an_option_that_would_train_wrongly_is_refused_by_name_and_value(case: str) -> None:
    base, changes, parts = WRONG[case]
    lines = complaints(base, **changes)
    assert any(all(part in line for part in ["model.path='my/model'", *parts]) for line in lines), lines


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3", "Llama 3.2"])
def test_an_option_that_nobody_has_thought_of_is_named(name: str) -> None:
    (line,) = complaints(name, resonance={"depth": list(range(100))})
    assert "resonance={'depth': [0, 1, " in line
    assert len(line) < 320  # however long the value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_of_transformers_class_is_known_to_us(family: str) -> None:
    """Another version of transformers that adds an option to a family must not slip by: here it is decided upon."""
    options = transformers.AutoConfig.for_model(family)
    own = {option.name for option in fields(type(options))} - {
        option.name for option in fields(transformers.PreTrainedConfig)
    }
    known = FREE | FAMILIES[family].fixed.keys() | FAMILIES[family].unread | FAMILIES[family].own
    assert own <= known | {"layer_types", *ROPE_OPTIONS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    schema.register()
    return tmp_path


def write(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps(SIZES | TRAINS["Qwen3"] | changes))
    return str(folder)


def check(path: str, *arguments: str, name: str = "config") -> str:
    """What a training command, or an evaluation, of the model in `path` is refused with; empty if it is not."""
    arguments = (
        f"model.path={path}",
        *(["experiment=demo"] if name == "config" else ["benchmark=[gsm8k]", "rollout.max_response_length=1024"]),
        "reward.overlong.buffer=0",
        *arguments,
    )
    run = entry.composed(CONF / f"{name}.yaml", list(arguments))
    assert run is not None
    try:
        (validate if name == "config" else validate_evaluation)(run, 1)
    except ValueError as error:
        return str(error)
    return ""


def test_a_refused_model_is_refused_before_anything_starts(folder: Path) -> None:
    assert check(write(folder)) == ""
    refusal = check(write(folder, model_type="gemma2", architectures=["Gemma2ForCausalLM"]))
    assert refusal.count("\n") == 1
    assert "does not train here" in refusal


def test_what_does_not_train_may_be_evaluated_unless_a_checkpoint_is_to_be_loaded_into_it(folder: Path) -> None:
    path = write(folder, model_type="mistral", architectures=["MistralForCausalLM"])
    assert check(path, name="evaluate") == ""
    (folder / "step_1" / "policy").mkdir(parents=True)
    assert "does not train here" in check(path, f"evaluation.checkpoint={folder}/step_1", name="evaluate")


def test_texts_longer_than_the_model_has_positions_for_are_refused(folder: Path) -> None:
    path = write(folder, max_position_embeddings=100)
    assert check(path) == ""  # the demo's servers take 96
    line = check(path, "rollout.vllm.max_model_len=128")
    assert "rollout.vllm.max_model_len = 128 tokens exceed the max_position_embeddings=100" in line
    line = check(path, "rollout.max_prompt_length=80", "rollout.vllm.max_model_len=null")
    assert "max_prompt_length + max_response_length = 144 tokens exceed the max_position_embeddings=100" in line
    assert "max_position_embeddings=100" in check(path, name="evaluate")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=32, no multiple of num_key_value_heads=3"),
        ({"hidden_size": 2050, "head_dim": None}, "hidden_size=2050, no multiple of num_attention_heads=32"),
        ({"hidden_size": 0}, "hidden_size=0, which must be a whole number above 0"),
        ({"vocab_size": "many"}, "vocab_size='many', which must be a whole number above 0"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes: dict[str, Any], part: str, folder: Path) -> None:
    assert part in check(write(folder, **changes))


@pytest.mark.parametrize("changes", [{"head_dim": 16}, {"hidden_size": 512, "head_dim": None}])
def test_heads_too_small_for_vllm_are_refused_without_cuda_alone(
    changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, **changes)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "head_dim=16, which must be at least 32" in check(path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert check(path) == ""


def test_latent_attention_of_a_size_that_vllm_has_no_kernel_for_is_refused_without_cuda_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = "kv_lora_rank=256 and qk_rope_head_dim=64, which must sum up to 576"
    path = write(folder, **TRAINS["Moonlight"] | {"kv_lora_rank": 256})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert part in check(path)
    assert "sum up" not in check(write(folder, **TRAINS["Moonlight"]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert part not in check(write(folder, **TRAINS["Moonlight"] | {"kv_lora_rank": 256}))


@pytest.mark.parametrize(
    ("text", "part"), [("{", "config.json is not JSON (Expecting"), ("[]", "must hold an object"), ("", "is not JSON")]
)
def test_a_damaged_config_json_is_named(text: str, part: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    for name in ("config", "evaluate"):
        line = check(str(folder), name=name)
        assert part in line
        assert f"model.path='{folder}'" in line


def test_a_name_on_the_hub_is_answered_with_the_command_that_downloads_it(folder: Path) -> None:
    line = check("Qwen/Qwen2.5-0.5B")
    assert "hf download Qwen/Qwen2.5-0.5B --local-dir models/Qwen2.5-0.5B" in line
    assert "then model.path=models/Qwen2.5-0.5B" in line
    assert "hf download" not in check(f"{folder}/nothing/here")


@pytest.mark.parametrize(
    ("layers", "stages", "last"),
    [(94, 8, 10), (61, 4, 13), (64, 4, 16), (28, 8, 0), (5, 4, -1), (7, 1, 7)],
)
def test_the_last_pipeline_stage_gets_what_the_others_leave(layers: int, stages: int, last: int) -> None:
    assert layers_in_last_stage(layers, stages) == last
    asked = {"num_hidden_layers": layers}
    assert bool([*check_stages(asked, stages, ())]) == (last < 1)
    assert not [*check_stages(asked, stages, ("pipeline_model_parallel_layout",))]


def test_a_pipeline_too_long_for_its_layers_names_one_that_fits() -> None:
    (line,) = check_stages({"num_hidden_layers": 28}, 8, ())
    assert "set it to 7" in line
