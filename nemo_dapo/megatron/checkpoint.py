"""Sharded checkpoints of a policy by Megatron's dist_checkpointing: any layout can load what another one saved."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model

# The optimizer's state is laid out by parameter, not by rank: tensor, pipeline and data parallel sizes may change.
# Its gathering goes over gloo to one data-parallel rank's host memory: saving takes no GPU memory.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


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


def _sharded_state(model: list[Any], optimizer: Any, scheduler: Any, *, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for i, chunk in enumerate(model):
        name = "model" if len(model) == 1 else f"model{i}"
        state[name] = unwrap_model(chunk).sharded_state_dict(prefix="", metadata=METADATA)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=METADATA)
    state["scheduler"] = scheduler.state_dict()
    return state


def collect_in_this_process() -> None:
    """Let Megatron's writer hand over what it wrote by a plain queue.

    By default that goes through a server process (multiprocessing.Manager in filesystem_async.py, seen in megatron-core
    0.16.1), which asynchronous saving needs and ours does not: it imports the training script once more, for seconds, and
    outlives a rank that is killed by SIGKILL.
    """
    filesystem_async._results_queue = queue.Queue()


def save(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Write to the existing, empty directory `path`; collective."""
    state = _sharded_state(model, optimizer, scheduler, is_loading=False)
    for part in (state["optimizer"], *state["optimizer"].values()):
        # Data-parallel ranks that hold no state say so by None, of which Megatron warns at every save.
        if isinstance(part, dict) and part.get("param_state", part) is None:
            del part["param_state"]
    collect_in_this_process()
    dist_checkpointing.save(state, str(path), content_metadata=METADATA)


def load(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Read from `path` into the model, the optimizer and the schedule; collective."""
    template = _sharded_state(model, optimizer, scheduler, is_loading=True)
    state = dist_checkpointing.load(template, str(path))
    for i, chunk in enumerate(model):
        name = "model" if len(model) == 1 else f"model{i}"
        unwrap_model(chunk).load_state_dict(state[name], strict=True)
    # float32 parameters are leaves that require gradients: Megatron copies into them in place.
    with torch.no_grad():
        optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
