"""What the model is built with: Megatron-Bridge's provider of a Hugging Face directory, and our settings on it.

A provider is a Megatron TransformerConfig that can build its GPTModel. What the user passes by `model.megatron` comes last
and may change any of our settings but those that `config.reserved` keeps.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_dapo.config import Fp8, ModelConfig, ParallelConfig, Precision, reserved
from nemo_dapo.config.model_family import LLAMA3_ROPE, STAGE_OPTIONS, layers_in_last_stage
from nemo_dapo.megatron.parallel import expert_tensor_size, virtual_stages

log = logging.getLogger(__name__)

# apex's kernel that adds a weight's gradient to its float32 sum. Megatron-core's layers raise without it wherever the
# fusion is on, and Megatron-Bridge switches it on for Transformer Engine alone (seen in 0.5.0).
WGRAD_KERNEL = "fused_weight_gradient_mlp_cuda"
FULL_RECOMPUTATION = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# Fused routing chooses before it looks at what is to be replayed (seen in megatron-core 0.16.1).
ROUTES_REPLAYED = {"moe_enable_routing_replay": True, "moe_router_fusion": False}
# Tokens that share a scale in a weight's gradient under Transformer Engine's Float8BlockScaling.
FP8_BLOCK = 128
# On a GPU packs are filled up to a multiple of this: of a few lengths, the allocator finds the last one's blocks again.
TOKENS_ALIKE = 256
# Names of a yarn scaling in config.json -> in Megatron's MLATransformerConfig.
YARN_ROPE = {
    "factor": "rotary_scaling_factor",
    **{
        name: name
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    },
}


def make_provider(bridge: Any, model: ModelConfig, parallel: ParallelConfig) -> Any:
    """The finished model configuration. Raises ValueError for an option that Megatron does not know or may not be set."""
    problems = [*reserved.problems("model.megatron", model.megatron)]
    if problems:
        raise ValueError("; ".join(problems))
    provider = bridge.to_megatron_provider(load_weights=True)
    settings = {
        **numerics(model.precision),
        **layout(provider.num_layers, parallel, model.megatron),
        **rotary_positions(bridge.hf_pretrained.config, provider),
        **latent_attention(bridge.hf_pretrained.config, provider),
        **without_side_losses(provider, model.megatron),
        **(transformer_engine(provider) if has_transformer_engine() else plain_torch()),
        **eight_bits(model.fp8),
        **(recomputation(model.megatron) if torch.cuda.is_available() else {}),
        **(ROUTES_REPLAYED if model.replay_routes else {}),
        **model.megatron,
    }
    check_known("model.megatron", settings, provider)
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    return provider


def has_transformer_engine() -> bool:
    """Whether the policy runs on Transformer Engine's layers: it is installed and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def numerics(precision: Precision) -> dict[str, Any]:
    """Data types, and what the sums over micro-batches and the policy ratio rely on."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    return {
        "bf16": dtype is torch.bfloat16,
        "fp16": False,
        **dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), dtype),
        # Micro-batches differ in length, and their loss is divided once, by the tokens of the whole mini-batch.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # the default one refuses variable lengths, for dense models too
        "calculate_per_token_loss": True,
        "moe_router_dtype": "fp32",  # of experts' scores: close ones must not tie by rounding
        # The policy ratio compares two forward passes: they must not differ by a random mask.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Bridge switches initialisation off when it loads weights, and with it the marks that tell Megatron which
        # parameters are split over tensor-parallel ranks: without them the gradient norm leaves shards out.
        "perform_initialization": True,
    }


def layout(num_layers: int, parallel: ParallelConfig, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Every kind of parallelism; where layers do not divide, the last stage, which has the head, gets fewer."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual_stages(parallel),
        # Of two interleaved stages each is the other's next and previous: a batch of messages would mix the two up.
        "overlap_p2p_comm": virtual_stages(parallel) is not None,
        "batch_p2p_comm": virtual_stages(parallel) is None,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_size(parallel),
        "sequence_parallel": parallel.sequence_parallel and tp > 1,
    }
    if num_layers % pp and not asked.keys() & STAGE_OPTIONS:
        settings["num_layers_in_last_pipeline_stage"] = layers_in_last_stage(num_layers, pp)
    return settings


def rotary_positions(hf_config: Any, provider: Any) -> dict[str, Any]:
    """Base and scaling of the rotary frequencies as the model's config.json has them.

    Bridge 0.3 under transformers 5 reads them where they no longer are and falls back to its defaults in silence. Raises
    ValueError for frequencies that differ between layers, and for a scaling that would be left out in silence.
    """
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    if any(isinstance(value, Mapping) for value in rope.values()) or isinstance(provider.rotary_base, tuple | list):
        raise ValueError(
            f"the model's rotary positions differ between layers ({rope or provider.rotary_base}); models train here with "
            "one base for all: take another model"
        )
    base = float(rope.get("rope_theta") or getattr(hf_config, "rope_theta", None) or provider.rotary_base)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if provider.multi_latent_attention:
        return {"rotary_base": base, **_latent_rope(kind, rope)}
    if kind == "default" or kind == provider.position_embedding_type:
        return {"rotary_base": base}
    differing = {name: rope.get(name) for name, value in LLAMA3_ROPE.items() if rope.get(name) != value}
    if kind != "llama3" or differing:
        raise ValueError(
            f"the model's rope_type={kind!r} {differing or ''} has no counterpart here; Megatron-core scales rotary "
            f"frequencies as llama3 does, with {LLAMA3_ROPE}"
        )
    return {"rotary_base": base, "rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def _latent_rope(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Of multi-latent attention, whose own embedding scales as yarn does (Megatron's MLATransformerConfig)."""
    if kind == "default":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}  # which scales the scores of attention too
    missing = [name for name in ("factor", "original_max_position_embeddings") if not rope.get(name)]
    if kind != "yarn" or missing:
        raise ValueError(
            f"the model's rope_type={kind!r} lacks {', '.join(missing) or 'a counterpart here'}: multi-latent attention "
            "has default or yarn rotary positions in Megatron-core; take another model"
        )
    scaled = {ours: rope[name] for name, ours in YARN_ROPE.items() if rope.get(name) is not None}
    return {"rope_type": "yarn", **scaled}


def latent_attention(hf_config: Any, provider: Any) -> dict[str, Any]:
    """What Bridge (seen in 0.3.1) does not take over of DeepSeek's architecture.

    A null is left out, so queries would get a down-projection that the model has not; that scores are sigmoids where a bias
    moves the choice of experts is not in a config.json of transformers 5.
    """
    if not provider.multi_latent_attention:
        return {}
    sigmoids = {"moe_router_score_function": "sigmoid"} if provider.moe_router_enable_expert_bias else {}
    return {"q_lora_rank": getattr(hf_config, "q_lora_rank", None), **sigmoids}


def without_side_losses(provider: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that leave the policy gradient the only one: no load-balancing loss, no moving router bias, no extra heads.

    Under `calculate_per_token_loss` the balancing loss weighs all tokens, the prompts' and the padding's too, and is then
    divided by the response tokens. Those that `asked` names, the user's, stay as the model and the user have them.
    """
    settings: dict[str, Any] = {}
    if provider.mtp_num_layers:
        settings["mtp_num_layers"] = None
    if provider.num_moe_experts:
        if not asked.keys() & {"moe_router_load_balancing_type", "moe_aux_loss_coeff"}:
            settings |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
        if provider.moe_router_enable_expert_bias:
            settings["moe_router_bias_update_rate"] = 0.0
    changed = {k: v for k, v in settings.items() if k not in asked and getattr(provider, k) != v}
    if changed and (not dist.is_initialized() or dist.get_rank() == 0):
        log.warning(
            "for the policy gradient alone: %s (model.megatron sets them otherwise)",
            ", ".join(f"{name}={value} in place of {getattr(provider, name)}" for name, value in changed.items()),
        )
    return settings


def transformer_engine(provider: Any) -> dict[str, Any]:
    """Fused kernels, as far as the model allows them; some of Bridge's model families leave them off."""
    activation = provider.activation_func in (F.silu, F.gelu) and provider.gated_linear_unit
    plain_rope = provider.position_embedding_type == "rope" and not provider.multi_latent_attention
    return {
        # Unfused, packed rotary positions wait for the device twice in every layer, forward and backward.
        "apply_rope_fusion": plain_rope,
        "bias_activation_fusion": activation,
        "bias_dropout_fusion": True,
        "persist_layer_norm": True,
        "gradient_accumulation_fusion": importlib.util.find_spec(WGRAD_KERNEL) is not None,
    }


def plain_torch() -> dict[str, Any]:
    """Layers and kernels of a host without Transformer Engine."""
    from nemo_dapo.megatron.attention import local_block_spec

    fusions = ("gradient_accumulation_fusion", "bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion")
    return {
        "transformer_layer_spec": local_block_spec,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # The interleaved schedule lets go of what it is still sending, and gloo reads it from where it lay.
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        # Grouped products and the permutation of tokens to experts exist in Transformer Engine alone.
        **dict.fromkeys(("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"), False),
        "moe_shared_expert_overlap": False,  # with the exchange of tokens, in a CUDA stream of its own
        **dict.fromkeys(fusions, False),
    }


def eight_bits(fp8: Fp8) -> dict[str, Any]:
    """Products of the layers in FP8 (TransformerConfig); head, embedding, router and attention's scores stay as they are.

    A block's scale is that of its numbers. Under Megatron's default recipe it is of earlier steps': two passes of the same
    tokens would differ, and the ratio compares two.
    """
    return {} if fp8 is Fp8.none else {"fp8": "e4m3", "fp8_recipe": fp8.value, "fp8_param": False}


def tokens_multiple(fp8: Fp8, *, context_chunks: int, ranks_of_tokens: int, on_gpu: bool) -> int:
    """What the length of a pack is a multiple of: `context_chunks`, and of blocks for each of `ranks_of_tokens`.

    These are the context-parallel ranks times those of sequence parallelism, which share the pack evenly. Under FP8 each
    has whole blocks: its part is scaled before it is gathered.
    """
    multiple = math.lcm(context_chunks, ranks_of_tokens * (1 if fp8 is Fp8.none else FP8_BLOCK))
    return math.lcm(multiple, TOKENS_ALIKE) if on_gpu else multiple


def recomputation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Keep each layer's input alone for the backward pass, 2 H bytes a token and layer instead of some 55 H.

    Nothing where the user says how (`recompute_granularity: null` keeps everything).
    """
    return {} if any(name.startswith("recompute_") for name in asked) else FULL_RECOMPUTATION


def check_known(option: str, settings: Mapping[str, Any], config: Any) -> None:
    """Raises ValueError for a setting that is no field of the dataclass `config`, with its neighbours in spelling."""
    known = {field.name for field in dataclasses.fields(config)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"{option}.{name} is not an option of this Megatron; near: {near}")
