"""Low-rank adapters (LoRA, arXiv 2106.09685), by Megatron-Bridge: of W + (alpha / rank) B A, W is frozen, B and A train.

vLLM gets the sum under W's own name, so that it knows of no adapter. With the adapters off the model is the one that the
run began with: the reference model costs no memory. A checkpoint holds the adapters alone; `model.path` has the rest.

Shapes: o outputs and i inputs of a layer, each tensor-parallel rank having a part of the one or the other; r the rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from nemo_dapo.config.schema import LoraConfig

BASE = ".to_wrap"  # of the frozen layer, in the names of Bridge's wrapper
ADAPTER = ".adapter."


def add(model: list[Any], options: LoraConfig) -> list[Any]:
    """Freeze `model`, not yet wrapped for data parallelism, and give its layers adapters; they change nothing: B is 0."""
    from megatron.bridge.peft.lora import LoRA  # here, not above: weights._import_bridge must have come before

    lora = LoRA(target_modules=list(options.target_modules), dim=options.rank, alpha=options.alpha, dropout=0.0)
    adapted: list[Any] = lora(model, training=True)
    for chunk in adapted:
        _keep_adapters_alone(chunk)
    return adapted


def adapted_layers(model: list[Any]) -> list[Any]:
    """Bridge's wrappers: `to_wrap` is the frozen layer, `adapter` has A as `linear_in` and B as `linear_out`."""
    from megatron.bridge.peft.adapter_wrapper import AdapterWrapper

    return [module for chunk in model for module in chunk.modules() if isinstance(module, AdapterWrapper)]


@contextlib.contextmanager
def switched_off(model: list[Any]) -> Iterator[None]:
    """Inside, `model` is its base."""
    layers = adapted_layers(model)
    for layer in layers:
        layer.disable_adapter_layers()
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapter_layers()


def merged_tasks(tasks: Iterable[Any], model: list[Any]) -> Iterator[Any]:
    """Bridge's conversion tasks with each adapted weight merged and named as in the base, one after another.

    Merging is collective over tensor-parallel ranks, and takes the memory of one weight.
    """
    layers = {id(layer.to_wrap): layer for layer in adapted_layers(model)}
    for task in tasks:
        changes: dict[str, Any] = {"global_param_name": task.global_param_name.replace(BASE, "")}
        layer = layers.get(id(task.megatron_module))  # none on the ranks of other pipeline stages
        if layer is not None and task.global_param_name.endswith(f"{BASE}.weight"):
            changes["param_weight"] = merged(layer)
        yield dataclasses.replace(task, **changes)


@torch.no_grad()
def merged(layer: Any) -> Tensor:
    """This rank's part of W + (alpha / rank) B A, summed up in float32 and rounded once; collective over its ranks.

    Of a layer whose outputs are split, B [o / tp, r] lies as W does and A's rows, [r / tp, i], are gathered; of one whose
    inputs are, A [r, i / tp] does and B's rows, [o / tp, r], are.
    """
    adapter, weight = layer.adapter, layer.to_wrap.weight
    a, b = adapter.linear_in.weight, adapter.linear_out.weight
    a, b = (a, _gather_rows(b)) if adapter.input_is_parallel else (_gather_rows(a), b)
    change = (b.float() @ a.float()) * (adapter.alpha / adapter.dim)
    total: Tensor = (weight.float() + change).to(weight.dtype)
    return total


def _gather_rows(part: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts)


def _keep_adapters_alone(chunk: nn.Module) -> None:
    """Make the adapters all of the state that a checkpoint saves and loads.

    Bridge names the weights of a wrapped layer one way when it saves and another when it loads; the base's never change.
    """
    model: Any = unwrap_model(chunk)
    everything = model.sharded_state_dict

    def of_adapters(*args: Any, **options: Any) -> dict[str, Any]:
        return {name: part for name, part in everything(*args, **options).items() if ADAPTER in name}

    def base_is_there(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if ADAPTER in name]

    model.sharded_state_dict = of_adapters
    model.register_load_state_dict_post_hook(base_is_there)
