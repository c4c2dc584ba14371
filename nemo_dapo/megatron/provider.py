"""What the model is built with: Megatron-Bridge's provider of a Hugging Face directory, and our settings on it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from typing import Any

import torch

from nemo_dapo.config import ModelConfig, ParallelConfig, Precision
from nemo_dapo.config.model_family import LLAMA3_ROPE


def make_provider(bridge: Any, model: ModelConfig, parallel: ParallelConfig) -> Any:
    """The finished model configuration (a Megatron TransformerConfig that can build its GPTModel)."""
    provider = bridge.to_megatron_provider(load_weights=True)
    dtype = torch.bfloat16 if model.precision is Precision.bf16 else torch.float32
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "bf16": dtype is torch.bfloat16,
        "fp16": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        # Micro-batches differ in length, and their loss is divided once, by the tokens of the whole mini-batch.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # the default one refuses variable lengths, for dense models too
        "calculate_per_token_loss": True,
        # The policy ratio compares two forward passes: they must not differ by a random mask.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Bridge switches initialisation off when it loads weights, and with it the marks that tell Megatron which
        # parameters are split over tensor-parallel ranks: without them the gradient norm leaves shards out.
        "perform_initialization": True,
        # Bridge 0.3 under transformers 5 reads rope_theta where it no longer is and falls back to 10,000 in silence.
        "rotary_base": rope_theta(bridge.hf_pretrained.config, default=provider.rotary_base),
        **rope_scaling(bridge.hf_pretrained.config, provider),
    }
    if not has_transformer_engine():
        settings |= _settings_without_transformer_engine()
    settings |= model.megatron
    _assign(provider, settings)
    if provider.hidden_dropout or provider.attention_dropout:
        raise ValueError(
            "model.megatron sets a dropout; the policy ratio needs two equal forward passes: leave it at 0"
        )
    provider.finalize()
    return provider


def has_transformer_engine() -> bool:
    """Whether the policy runs on Transformer Engine's layers: it is installed and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def rope_theta(hf_config: Any, default: float) -> float:
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(hf_config, "rope_theta", None) or default)


def rope_scaling(hf_config: Any, provider: Any) -> dict[str, Any]:
    """Megatron's settings for a model with scaled rotary frequencies.

    Raises ValueError for a scaling that would be left out in silence.
    """
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" or kind == provider.position_embedding_type:
        return {}
    differing = {name: rope.get(name) for name, value in LLAMA3_ROPE.items() if rope.get(name) != value}
    if kind != "llama3" or differing:
        raise ValueError(
            f"the model's rope_type={kind!r} {differing or ''} has no counterpart here; Megatron-core scales rotary "
            f"frequencies as llama3 does, with {LLAMA3_ROPE}"
        )
    return {"rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def _settings_without_transformer_engine() -> dict[str, Any]:
    from nemo_dapo.megatron.attention import local_block_spec

    fusions = ("gradient_accumulation_fusion", "bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion")
    return {
        "transformer_layer_spec": local_block_spec,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        **dict.fromkeys(fusions, False),
    }


def _assign(provider: Any, settings: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(provider)}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"model.megatron.{name} is not a field of Megatron's TransformerConfig; near: {near}")
        setattr(provider, name, value)
