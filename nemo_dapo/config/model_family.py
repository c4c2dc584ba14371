"""Which models train here, told from a Hugging Face `config.json` alone, before Megatron or vLLM is imported.

An option is allowed by name and value, never refused by name: the trainer computes one forward pass, and a model whose
options ask for another would train on wrong log-probabilities without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIN_CPU_HEAD_SIZE = 32  # vllm.v1.attention.backends.cpu_attn: get_supported_head_sizes
CPU_LATENT_SIZE = 576  # vllm.v1.attention.backends.mla.cpu_mla: 512 of the latent, 64 of the rotary part

# Megatron-core's RotaryEmbedding._apply_scaling takes `factor` as an argument and has the others written in.
LLAMA3_ROPE: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Megatron's options that deal the layers to the pipeline stages otherwise than evenly, by model.megatron.
STAGE_OPTIONS = frozenset(
    (
        *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    )
)

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # the second is what transformers 5 writes

# Any value will do: the trainer takes it over, or it is a token.
COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *(*EXPERT_COUNTS, "num_experts_per_tok", "moe_intermediate_size"),
)
CONSTANTS = ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "initializer_range")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class")
# Any value will do: what the forward pass of a causal language model does not read.
METADATA = (
    *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "task_specific_params"),
    *("_name_or_path", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version", "is_llama_config"),
    "transformers.js_config",
    "router_aux_loss_coef",  # of a loss that RL leaves out
    "attention_dropout",  # dropout is off here whatever the model says: the ratio compares two equal passes
)
FREE = frozenset((*COUNTS, *CONSTANTS, *TOKENS, *METADATA))
YARN_NUMBERS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ROPE_OPTIONS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of the versions before it


@dataclass(frozen=True)
class Family:
    """One architecture: `fixed` options must have this value or be absent, `unread` ones have no effect beside them, and
    the trainer takes over its `own`, which other families have not. `ropes` are the kinds of rotary positions. Of `told`
    vLLM has other defaults than the model, so the fixed value must be there."""

    architecture: str
    fixed: dict[str, Any]
    unread: frozenset[str] = field(default_factory=frozenset)
    own: frozenset[str] = field(default_factory=frozenset)
    ropes: tuple[str, ...] = ("default", "llama3")
    told: tuple[str, ...] = ()


NO_WINDOW = {"use_sliding_window": False}
WINDOW_SIZES = frozenset({"sliding_window", "max_window_layers"})  # of a window that is not used
FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", {"hidden_act": "silu", **NO_WINDOW}, WINDOW_SIZES),
    "qwen3": Family("Qwen3ForCausalLM", {"hidden_act": "silu", "attention_bias": False, **NO_WINDOW}, WINDOW_SIZES),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            **NO_WINDOW,
        },
        WINDOW_SIZES,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"hidden_act": "silu", "sliding_window": None, "router_jitter_noise": 0.0, "output_router_logits": False},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "rope_interleave": True,
            "moe_layer_freq": 1,
            **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),  # such layers nobody would export
            "output_router_logits": False,
        },
        frozenset({"auto_map", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "qk_head_dim"}),
        frozenset(
            (
                *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
                *("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
            )
        ),
        ropes=("default", "yarn"),
        told=("scoring_func", "topk_method"),
    ),
    "llama": Family(
        "LlamaForCausalLM", {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    ),
}
SUPPORTED = ", ".join(f"{name} ({family.architecture})" for name, family in FAMILIES.items())


def read(path: str) -> dict[str, Any]:
    """The model's `config.json`. Raises ValueError in one line with the remedy when there is none or it is no object."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={path!r} has no config.json; {_where_from(path)}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"model.path={path!r}: config.json is not JSON ({error}); download the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"model.path={path!r}: config.json must hold an object; download the model again")
    for name in COUNTS:
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(
                f"model.path={path!r}: config.json has {name}={value!r}, which must be a whole number above 0"
            )
    return config


def _where_from(path: str) -> str:
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        folder = f"models/{path.partition('/')[2]}"
        return (
            f"for the model of that name on the Hugging Face hub: hf download {path} --local-dir {folder}, then "
            f"model.path={folder}"
        )
    return "give a Hugging Face model folder (for the demo: python examples/demo/prepare.py)"


def num_experts(config: dict[str, Any]) -> int:
    """Of each layer that has any, 0 of a dense model."""
    return next((config[name] for name in EXPERT_COUNTS if config.get(name)), 0)


def check_trainable(path: str, config: dict[str, Any]) -> Iterator[str]:
    """What of the model's architecture the trainer does not compute."""
    family = FAMILIES.get(str(config.get("model_type")))
    architectures = config.get("architectures")
    if family is None or architectures != [family.architecture]:
        yield (
            f"model.path={path!r} is a model_type={config.get('model_type')!r} with architectures={architectures}, "
            f"which does not train here; take one of {SUPPORTED}"
        )
        return
    where = f"model.path={path!r}: its config.json has"
    for name, value in config.items():
        if name in family.fixed and value != family.fixed[name]:
            yield f"{where} {name}={value!r}, but {family.architecture} trains here with {name}={family.fixed[name]!r} only"
        elif name in ROPE_OPTIONS:
            yield from (f"{where} {problem}" for problem in _check_rope(name, value or {}, family.ropes))
        elif name == "layer_types":
            if other := sorted({str(kind) for kind in value or ()} - {"full_attention"}):
                yield f"{where} layer_types with {', '.join(other)}, but models train here with full_attention only"
        elif value and name not in FREE | family.fixed.keys() | family.unread | family.own:
            yield (
                f"{where} {name}={_short(value)}, which no {family.architecture} that trains here has; if it changes "
                "nothing in the forward pass, delete it from the file, else take another model"
            )
    for name in family.told:
        if name not in config:
            yield f"{where} no {name}, which vLLM then takes otherwise; add it to the file: {name}={family.fixed[name]!r}"
    yield from (f"{where} {problem}" for problem in _check_groups(config))


def _check_groups(config: dict[str, Any]) -> Iterator[str]:
    """Groups of experts are chosen by their two best ones, in Megatron-core by as many as a token takes of a group."""
    groups, chosen, top_k = (config.get(name) for name in ("n_group", "topk_group", "num_experts_per_tok"))
    if groups and chosen and top_k and chosen < groups and top_k // chosen != 2:
        yield (
            f"n_group={groups}, topk_group={chosen} and num_experts_per_tok={top_k}, but Megatron-core chooses groups as "
            "the model does only where num_experts_per_tok // topk_group is 2"
        )


def _check_rope(name: str, rope: dict[str, Any], kinds: Collection[str]) -> Iterator[str]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in kinds:
        yield f"{name} of type {kind!r}, but such models train here with {' or '.join(kinds)} rotary positions only"
        return
    fixed = LLAMA3_ROPE if kind == "llama3" else {}
    numbers = {"llama3": ("factor",), "yarn": YARN_NUMBERS}.get(kind, ())
    for option in numbers:
        if not isinstance(value := rope.get(option), int | float) or (option == "factor" and value < 1):
            least = "a number of at least 1" if option == "factor" else "a number"
            yield f"{name}.{option}={value!r} of type {kind}, which must be {least}"
    expected = {**fixed, "partial_rotary_factor": 1.0}
    known = {"rope_type", "type", "rope_theta", *numbers, *expected}
    for option, value in (dict.fromkeys(fixed) | rope).items():
        if option in expected and value != expected[option]:
            yield f"{name}.{option}={value!r}, but Megatron-core has {option}={expected[option]} written in"
        elif value and option not in known:
            yield f"{name}.{option}={_short(value)}, which the trainer's rotary positions do not know"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_sizes(path: str, config: dict[str, Any]) -> Iterator[str]:
    """Heads that do not divide, and heads too small for vLLM's attention on a CPU host."""
    heads, groups, hidden = (config.get(k) for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    where = f"model.path={path!r}: its config.json has"
    if heads and groups and heads % groups:
        yield f"{where} num_attention_heads={heads}, no multiple of num_key_value_heads={groups}; take another model"
    if heads and hidden and hidden % heads and not config.get("head_dim"):
        yield f"{where} hidden_size={hidden}, no multiple of num_attention_heads={heads}; take another model"
    import torch  # here: the schema alone needs no torch

    if not torch.cuda.is_available():
        size = config.get("head_dim") or (hidden or 0) // (heads or 1)
        yield from (f"{where} {problem}" for problem in _check_cpu_heads(size, config))


def _check_cpu_heads(size: int, config: dict[str, Any]) -> Iterator[str]:
    """What vLLM's attention on a CPU has no kernel for."""
    latent, rotary = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if latent and rotary and latent + rotary != CPU_LATENT_SIZE:
        yield (
            f"kv_lora_rank={latent} and qk_rope_head_dim={rotary}, which must sum up to {CPU_LATENT_SIZE} for vLLM on a "
            "host without CUDA: take a model of DeepSeek's sizes"
        )
    if not latent and 0 < size < MIN_CPU_HEAD_SIZE:
        yield (
            f"head_dim={size}, which must be at least {MIN_CPU_HEAD_SIZE} for vLLM on a host without CUDA: take a model "
            "with fewer, larger heads"
        )


def layers_in_last_stage(layers: int, stages: int) -> int:
    """What is left for the last pipeline stage when every other one holds the same number, as few as that goes; 0 or less
    where nothing is left."""
    return layers - (stages - 1) * -(-layers // stages)


def check_stages(config: dict[str, Any], stages: int, asked: Collection[str]) -> Iterator[str]:
    """A pipeline with more stages than its layers can be dealt to; `asked` are the names passed by model.megatron."""
    layers = config.get("num_hidden_layers") or 0
    if layers and layers_in_last_stage(layers, stages) < 1 and not STAGE_OPTIONS & set(asked):
        fits = max(fewer for fewer in range(1, stages) if layers_in_last_stage(layers, fewer) > 0)
        yield (
            f"parallel.pipeline_model_parallel_size={stages} leaves the last stage none of the model's num_hidden_layers="
            f"{layers}; set it to {fits}, or deal them by model.megatron.pipeline_model_parallel_layout"
        )


def check_positions(path: str, config: dict[str, Any], tokens: int, asked_by: str) -> Iterator[str]:
    """Whether sequences of `tokens` tokens, as the options `asked_by` ask for, have positions in the model."""
    positions = config.get("max_position_embeddings")
    if positions and tokens > positions:
        yield (
            f"{asked_by} = {tokens} tokens exceed the max_position_embeddings={positions} of model.path={path!r}; lower "
            "them to fit, or take a model for longer texts"
        )
