"""Checks of the parallel layout against the ranks, the model and the loss, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_dapo.config import model_family
from nemo_dapo.config.schema import ParallelConfig, RunConfig, SequenceRatio


def check_layout(config: RunConfig, model: dict[str, Any] | None, world_size: int) -> Iterator[str]:
    """What of `parallel` does not fit `world_size` ranks, or the model's config.json where there is one."""
    p = config.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    vpp = p.virtual_pipeline_model_parallel_size
    if world_size % (tp * pp * cp):
        yield (
            f"parallel: {world_size} ranks are no multiple of tensor_model_parallel_size * pipeline_model_parallel_size * "
            f"context_parallel_size = {tp} * {pp} * {cp}; start torchrun with --nproc-per-node (and --nnodes) to match, or "
            "change parallel="
        )
    if vpp > 1 and pp == 1:
        yield f"parallel.virtual_pipeline_model_parallel_size={vpp} cuts pipeline stages, but there is 1; set it to 1"
    if cp > 1 and config.algorithm.loss == "gspo":
        yield (
            f"algorithm.loss=gspo needs a response's tokens on one rank, parallel.context_parallel_size={cp} deals "
            "them out; set it to 1, or use tensor or pipeline parallelism"
        )
    if cp > 1 and config.algorithm.importance_sequence is not SequenceRatio.none:
        yield (
            f"algorithm.importance_sequence={config.algorithm.importance_sequence.value} needs a response's tokens on one "
            f"rank, parallel.context_parallel_size={cp} deals them out; set it to none, or that to 1"
        )
    if p.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true splits tokens over tensor-parallel ranks, but there is 1; set it to false"
    yield from _check_experts(p, model or {}, world_size)
    yield from _check_divisions(config, model or {})


def _check_divisions(config: RunConfig, model: dict[str, Any]) -> Iterator[str]:
    p = config.parallel
    tp, pp, vpp = (
        p.tensor_model_parallel_size,
        p.pipeline_model_parallel_size,
        p.virtual_pipeline_model_parallel_size,
    )
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        if (model.get(name) or 0) % tp:
            yield f"parallel.tensor_model_parallel_size={tp} does not divide the model's {name}={model[name]}"
    yield from model_family.check_stages(model, pp, config.model.megatron)
    layers = model.get("num_hidden_layers") or 0
    if vpp > 1 and layers % (pp * vpp):
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={vpp} cuts {pp} stages into {pp * vpp} equal parts, which "
            f"does not divide the model's num_hidden_layers={layers}; set it to 1"
        )


def _check_experts(p: ParallelConfig, model: dict[str, Any], world_size: int) -> Iterator[str]:
    experts, tp, ep, etp = (
        model_family.num_experts(model),
        p.tensor_model_parallel_size,
        p.expert_model_parallel_size,
        p.expert_tensor_parallel_size,
    )
    if ep > 1 and model and not experts:
        yield f"parallel.expert_model_parallel_size={ep} deals experts to ranks, but the model has none; set it to 1"
    if experts and experts % ep:
        yield f"parallel.expert_model_parallel_size={ep} does not divide the model's num_experts={experts}"
    parts = (etp or 1) * ep * p.pipeline_model_parallel_size
    if world_size % parts:
        yield (
            f"parallel: {world_size} ranks are no multiple of expert_model_parallel_size * expert_tensor_parallel_size * "
            f"pipeline_model_parallel_size = {parts}; lower one of them"
        )
    if experts and tp > 1 and not p.sequence_parallel:
        yield (
            "parallel.sequence_parallel=false, but a mixture of experts under tensor parallelism needs its tokens split: "
            "set it to true"
        )
    if experts and ep == 1 and etp not in (None, tp):
        yield (
            f"parallel.expert_tensor_parallel_size={etp} beside tensor_model_parallel_size={tp} and no expert parallelism "
            "leaves the gradients of experts unsummed in Megatron-core (seen in 0.16.1): set it to null"
        )
