"""Sharded checkpoints of a policy by Megatron's dist_checkpointing, in one of two forms: what they hold, and reading them.

Weights are laid out by parameter in both: any layout of ranks can load them. Optimizer states are, too, in a *portable*
one; else each rank writes and reads its own share as it lies, without gathering and without host memory for more than that,
and tensor and pipeline parallel sizes are part of the form. `saving` writes them. `conversion` writes weights alone.

What Transformer Engine's layers keep beside their parameters is neither saved nor read: a pickle, of scales that only a
recipe with a memory has, and there from the first save of a run on GPUs, so that no other host could read one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from nemo_dapo.megatron.unpickling import nothing_is_unpickled

KEPT_BY_STEP = ("params", "step")  # of a param group: all else are options
LONGEST_CAUSE = 300  # characters: Megatron lists every parameter where one is missing
EXTRA = re.compile(r"\._extra_state\d*$")  # numbered ones are of grouped experts
REMEDY = "restore it from a copy, or start anew with checkpoint.resume=never"

# The gathering of a portable one goes over gloo to one data-parallel rank's host memory: saving takes no GPU memory.
PORTABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
BY_RANK = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
WEIGHTS_ALONE = "nemo_dapo_weights_alone"  # in the checkpoint's metadata where it has no optimizer's states
LAYOUT = "nemo_dapo_layout"  # in the checkpoint's metadata: what the saving run was started with


def keep_bucket_padding(model: list[Any]) -> None:
    """Make Megatron count the padding of gradient buckets as theirs; call once after the model is wrapped.

    The layout by parameter drops the padding at each bucket's end but looks parameters up at offsets that include it
    (seen in megatron-core 0.16.1): every parameter after a padded bucket is saved from the wrong place, with no more than
    a warning ("can lead to data corruption"). With nothing left to drop, both agree.
    """
    for chunk in model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def sharded_state(
    model: list[Any], optimizer: Any, scheduler: Any, form: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    metadata = dict(form)  # Megatron adds the process groups of the layout to it
    for i, chunk in enumerate(model):
        name = "model" if len(model) == 1 else f"model{i}"
        state[name] = sharded_weights(unwrap_model(chunk), metadata)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        state["scheduler"] = scheduler.state_dict()
    return state


def sharded_weights(model: Any, form: dict[str, Any]) -> dict[str, Any]:
    """Where each parameter of the unwrapped `model` lies in a checkpoint, by its name here."""
    parts = model.sharded_state_dict(prefix="", metadata=form)
    return {name: part for name, part in parts.items() if not EXTRA.search(name)}


def load(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Read from `path` into the model, the optimizer and the schedule, whose options stay as they are; collective.

    Without an optimizer the weights alone. One that holds no more leaves the optimizer at its beginning, with these.

    Raises RuntimeError that names the checkpoint and the cause.
    """
    try:
        with nothing_is_unpickled():
            form = dict(dist_checkpointing.load_content_metadata(str(path)) or PORTABLE)
            states = None if form.get(WEIGHTS_ALONE) else optimizer
            if states is not None:
                _check_layout(form)
            template = sharded_state(model, states, scheduler, form, is_loading=True)
            reading = serialization.get_default_load_sharded_strategy(str(path))
            # Gathered states are wanted whole by every rank: to pass them on takes half as much memory again.
            if states is None or not _is_portable(form):
                reading = FullyParallelLoadStrategyWrapper(reading, replicas())
            state = dist_checkpointing.load(template, str(path), reading)
        for i, chunk in enumerate(model):
            weights = state["model" if len(model) == 1 else f"model{i}"]
            _load_weights(unwrap_model(chunk), weights)
        if states is not None:
            _load_optimizer(state, optimizer, scheduler)
        elif optimizer is not None:
            optimizer.reload_model_params()
    except (CheckpointException, Exception) as error:
        raise RuntimeError(f"cannot read the checkpoint {path}: {cause(error)}; {REMEDY}") from error


def _load_weights(model: Any, weights: dict[str, Any]) -> None:
    """Raises RuntimeError unless `weights` are those of the model, of which extra states are nobody's."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if wrong := [name for name in (*missing, *unexpected) if not EXTRA.search(name)]:
        raise RuntimeError(f"{len(wrong)} parameters are missing or unknown there: {', '.join(wrong[:4])}")


def replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights, and share the writing and reading of them."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def layout() -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _is_portable(form: dict[str, Any]) -> bool:
    return bool(form["distrib_optim_sharding_type"] == PORTABLE["distrib_optim_sharding_type"])


def _check_layout(form: dict[str, Any]) -> None:
    """Raises ValueError where the optimizer's states lie in the shares of another layout."""
    saved = form.get(LAYOUT, layout())
    if not _is_portable(form) and saved != layout():
        sizes = ", ".join(f"parallel.{name}={size}" for name, size in saved.items())
        raise ValueError(
            f"its optimizer states are those of {sizes}; go on under these, and have the next ones portable by "
            "checkpoint.portable=always"
        )


def _load_optimizer(state: dict[str, Any], optimizer: Any, scheduler: Any) -> None:
    options = [{k: v for k, v in group.items() if k not in KEPT_BY_STEP} for group in optimizer.param_groups]
    # float32 parameters are leaves that require gradients: Megatron copies into them in place.
    with torch.no_grad():
        optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    scheduler.num_steps = int(state["scheduler"]["num_steps"])
    scheduler.step(increment=0)


def cause(error: BaseException) -> str:
    """One line; of torch's CheckpointException, which is no Exception and holds each rank's own error, the first one."""
    if isinstance(error, CheckpointException):
        if not error.failures:  # told to one rank alone
            return "another rank failed"
        rank, (own, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {cause(own)}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + ' …'}"
