"""Options of Megatron-core that a run does not pass through: what sets each of them, or why it stays as it is.

An upstream option that the trainer decides would undo what its process groups, checkpoints or sums rely on, mostly without
an error. All others go through by their upstream names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LAYOUTS = "nothing: the trainer has no process groups for it"
FP8 = "nothing: weights and their exchange stay in bfloat16 (model.fp8 is for products)"
FP4 = "nothing: micro-batches are not filled up to FP4's block sizes"
WIRED = "nothing: the policy sets it for its schedule"
CONFIG_JSON = "nothing: config.json in model.path has it"
LENGTHS = "nothing: micro-batches differ in length"
HEAD = "nothing: the policy computes the output layer and its gradient itself"
SHARDED = "nothing: saving, loading and moving the optimizer rely on its being sharded over data-parallel ranks"
GATHERED = "nothing: weights are exported, saved and moved between two steps, when its gather would still be under way"
NO_FSDP = "nothing: weights are read from Megatron's own gradient and parameter buffers"
ADAM = "nothing: the update is AdamW's"

# Of TransformerConfig and of Megatron-Bridge's providers, by `model.megatron`.
MODEL = {
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    **{
        name: f"parallel.{name}"
        for name in (
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        )
    },
    "moe_enable_routing_replay": "model.replay_routes",
    **dict.fromkeys(("overlap_p2p_comm", "batch_p2p_comm"), "parallel.virtual_pipeline_model_parallel_size"),
    **dict.fromkeys(("hierarchical_context_parallel_sizes", "hybrid_context_parallel"), LAYOUTS),
    **dict.fromkeys(("bf16", "fp16", "params_dtype", "pipeline_dtype"), "model.precision"),
    **dict.fromkeys(("autocast_dtype", "enable_autocast"), "model.precision"),
    **dict.fromkeys(("fp8", "fp8_recipe", "fp8_param"), "model.fp8"),
    **dict.fromkeys(("fp4", "fp4_recipe", "fp4_param"), FP4),
    "variable_seq_lengths": LENGTHS,
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"), LENGTHS),
    "calculate_per_token_loss": "nothing: the loss is divided once, by the tokens of the whole mini-batch",
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps"),
        "nothing: the policy ratio compares two forward passes, which must not differ by a random number",
    ),
    "perform_initialization": "nothing: with it Megatron marks which parameters are split over ranks",
    **dict.fromkeys(("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func"), WIRED),
    **dict.fromkeys(("param_sync_func", "timers"), WIRED),
    **dict.fromkeys(("defer_embedding_wgrad_compute", "wgrad_deferral_limit", "delay_wgrad_compute"), HEAD),
    **dict.fromkeys(("use_mup", "parallel_output", "fp16_lm_cross_entropy"), HEAD),
    **dict.fromkeys(
        ("mtp_num_layers", "mtp_loss_scaling_factor", "mtp_enabled"),
        "nothing: its loss would be on tokens of the prompt too, and on scores where it expects logits",
    ),
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"), CONFIG_JSON),
    **dict.fromkeys(("num_query_groups", "kv_channels", "vocab_size", "should_pad_vocab"), CONFIG_JSON),
    **dict.fromkeys(("normalization", "layernorm_epsilon", "gated_linear_unit", "add_bias_linear"), CONFIG_JSON),
    **dict.fromkeys(("add_qkv_bias", "qk_layernorm", "share_embeddings_and_output_weights"), CONFIG_JSON),
    **dict.fromkeys(("position_embedding_type", "rotary_base", "rotary_percent", "rope_type"), CONFIG_JSON),
    **dict.fromkeys(("rope_scaling", "rope_scaling_factor", "rotary_scaling_factor"), CONFIG_JSON),
    **dict.fromkeys(("num_moe_experts", "moe_router_topk", "moe_router_score_function"), CONFIG_JSON),
    **dict.fromkeys(("moe_router_enable_expert_bias", "moe_router_topk_scaling_factor"), CONFIG_JSON),
}

# Of Megatron-core's OptimizerConfig, by `optimizer.megatron`.
OPTIMIZER = {
    **{name: f"optimizer.{name}" for name in ("lr", "min_lr", "weight_decay", "clip_grad")},
    **{name: f"optimizer.{name}" for name in ("adam_beta1", "adam_beta2", "adam_eps")},
    **dict.fromkeys(("decoupled_lr", "decoupled_min_lr"), "optimizer.lr, one for all parameters"),
    **dict.fromkeys(("bf16", "fp16", "params_dtype"), "model.precision"),
    **dict.fromkeys(("optimizer", "decoupled_weight_decay"), ADAM),
    "use_distributed_optimizer": SHARDED,
    **dict.fromkeys(("overlap_param_gather", "overlap_param_gather_with_optimizer_step"), GATHERED),
    **dict.fromkeys(("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"), FP8),
    "timers": WIRED,
}

# Of Megatron-core's DistributedDataParallelConfig, by `parallel.ddp`.
DDP = {
    "use_distributed_optimizer": SHARDED,
    "num_distributed_optimizer_instances": LAYOUTS,
    "average_in_collective": "nothing: gradients are summed, and divided once by the tokens of the whole mini-batch",
    "check_for_nan_in_grad": "nothing: an update with a non-finite gradient is refused, and its cause named",
    "delay_wgrad_compute": HEAD,
    **dict.fromkeys(("overlap_param_gather", "align_param_gather"), GATHERED),
    **dict.fromkeys(("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"), FP8),
    **dict.fromkeys(("use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy"), NO_FSDP),
    **dict.fromkeys(("outer_dp_sharding_strategy", "fsdp_double_buffer", "fsdp_manual_registration"), NO_FSDP),
}

TABLES = {"model.megatron": MODEL, "optimizer.megatron": OPTIMIZER, "parallel.ddp": DDP}


def problems(option: str, passed: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key of `passed`, the dict of the option named `option`, that is not the user's to set there."""
    for name, value in passed.items():
        if name in TABLES[option]:
            yield f"{option}.{name}={value!r} is set by the trainer; change {TABLES[option][name]}"
