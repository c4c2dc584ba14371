"""Sharded checkpoints of a policy by Megatron's dist_checkpointing, in one of two forms.

Weights are laid out by parameter in both: any layout of ranks can load them. Optimizer states are, too, in a *portable*
one; else each rank writes and reads its own share as it lies, without gathering and without host memory for more than that,
and tensor and pipeline parallel sizes are part of the form.
"""

from __future__ import annotations

import os
import queue
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nemo_dapo.megatron.parallel import device
from nemo_dapo.megatron.unpickling import nothing_is_unpickled, refuse_pickled_modules

WRITTEN_BY_RANK_ZERO = (".metadata", "common.pt", "metadata.json")
KEPT_BY_STEP = ("params", "step")  # of a param group: all else are options
LONGEST_CAUSE = 300  # characters: Megatron lists every parameter where one is missing
REMEDY = "restore it from a copy, or start anew with checkpoint.resume=never"

# The gathering of a portable one goes over gloo to one data-parallel rank's host memory: saving takes no GPU memory.
PORTABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
BY_RANK = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
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


def _sharded_state(
    model: list[Any], optimizer: Any, scheduler: Any, form: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    metadata = dict(form)  # Megatron adds the process groups of the layout to it
    for i, chunk in enumerate(model):
        name = "model" if len(model) == 1 else f"model{i}"
        state[name] = unwrap_model(chunk).sharded_state_dict(prefix="", metadata=metadata)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        state["scheduler"] = scheduler.state_dict()
    return state


def collect_in_this_process() -> None:
    """Let Megatron's writer hand over what it wrote by a plain queue.

    By default that goes through a server process (multiprocessing.Manager in filesystem_async.py, seen in megatron-core
    0.16.1), which asynchronous saving needs and ours does not: it imports the training script once more, for seconds, and
    outlives a rank that is killed by SIGKILL.
    """
    filesystem_async._results_queue = queue.Queue()


@contextmanager
def errors_of_rank_zero_kept() -> Iterator[None]:
    """Raise what rank 0 alone fails to write only when every rank has come through Megatron's save.

    Rank 0 alone writes common.pt, .metadata and metadata.json, and raises where it stands (seen in megatron-core 0.16.1:
    TorchCommonSaveStrategy, save_state_dict_async_finalize, metadata_finalize_fn): the others would wait in a collective.
    """
    errors: list[Exception] = []

    def keeping(write: Callable[..., None]) -> Callable[..., None]:
        def kept(*args: Any, **options: Any) -> None:
            try:
                write(*args, **options)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return kept

    # common.pt is written by a method in megatron-core 0.16, by a function in 0.17 and 0.18, and no file of its own later.
    writes_common = (getattr(common, "TorchCommonSaveStrategy", None), serialization)
    writers: list[tuple[Any, str]] = [
        *((owner, "save_common") for owner in writes_common if hasattr(owner, "save_common")),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ]
    originals = [getattr(owner, name) for owner, name in writers]
    for (owner, name), original in zip(writers, originals, strict=True):
        setattr(owner, name, keeping(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(writers, originals, strict=True):
            setattr(owner, name, original)
    if errors:
        raise errors[0]


def save(path: Path, model: list[Any], optimizer: Any, scheduler: Any, *, portable: bool) -> list[Path]:
    """Write to the existing, empty directory `path`; collective. Returns the files that this rank wrote.

    Raises RuntimeError that names the cause, such as a full disk and how much is needed.
    """
    needed = 0
    try:
        form: dict[str, Any] = PORTABLE if portable else BY_RANK
        state = _sharded_state(model, optimizer, scheduler, form, is_loading=False)
        _zero_padding(state["optimizer"])
        for part in (state["optimizer"], *state["optimizer"].values()):
            # Data-parallel ranks that hold no state say so by None, of which Megatron warns at every save.
            if isinstance(part, dict) and part.get("param_state", part) is None:
                del part["param_state"]
        needed = _bytes_of_all_ranks(state)
        collect_in_this_process()
        with errors_of_rank_zero_kept():
            dist_checkpointing.save(
                state,
                str(path),
                FullyParallelSaveStrategyWrapper(serialization.get_default_save_sharded_strategy(), _replicas()),
                content_metadata=form | {LAYOUT: _layout()},
            )
    except (CheckpointException, Exception) as error:
        disk = _cannot_write(path, needed)
        raise RuntimeError(f"{disk} ({_cause(error)})" if disk else _cause(error)) from error
    rank = dist.get_rank()
    mine = sorted(path.glob(f"__{rank}_*.distcp"))
    return mine if rank else mine + [file for name in WRITTEN_BY_RANK_ZERO if (file := path / name).exists()]


def load(path: Path, model: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Read from `path` into the model, the optimizer and the schedule, whose options stay as they are; collective.

    Without an optimizer the weights alone.

    Raises RuntimeError that names the checkpoint and the cause.
    """
    try:
        with nothing_is_unpickled():
            form = dict(dist_checkpointing.load_content_metadata(str(path)) or PORTABLE)
            if optimizer is not None:
                _check_layout(form)
            template = _sharded_state(model, optimizer, scheduler, form, is_loading=True)
            reading = serialization.get_default_load_sharded_strategy(str(path))
            # Gathered states are wanted whole by every rank: to pass them on takes half as much memory again.
            if optimizer is None or not _is_portable(form):
                reading = FullyParallelLoadStrategyWrapper(reading, _replicas())
            state = dist_checkpointing.load(template, str(path), reading)
        for i, chunk in enumerate(model):
            weights = state["model" if len(model) == 1 else f"model{i}"]
            refuse_pickled_modules(weights)
            unwrap_model(chunk).load_state_dict(weights, strict=True)
        if optimizer is not None:
            _load_optimizer(state, optimizer, scheduler)
    except (CheckpointException, Exception) as error:
        raise RuntimeError(f"cannot read the checkpoint {path}: {_cause(error)}; {REMEDY}") from error


def _replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights, and share the writing and reading of them."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _layout() -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _is_portable(form: dict[str, Any]) -> bool:
    return bool(form["distrib_optim_sharding_type"] == PORTABLE["distrib_optim_sharding_type"])


def _check_layout(form: dict[str, Any]) -> None:
    """Raises ValueError where the optimizer's states lie in the shares of another layout."""
    saved = form.get(LAYOUT, _layout())
    if not _is_portable(form) and saved != _layout():
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


def _zero_padding(part: Any) -> None:
    """Megatron writes the gaps between parameters as whatever lay in memory: the same state, other bytes."""
    if isinstance(part, list):
        for one in part:
            _zero_padding(one)
    elif isinstance(part, dict):
        mark = part.get("padding")
        is_padding = isinstance(mark, LocalNonpersistentObject) and mark.unwrap()
        for one in part.values():
            if is_padding and isinstance(one, ShardedTensor):
                one.data.zero_()
            else:
                _zero_padding(one)


def _bytes_of_all_ranks(state: dict[str, Any]) -> int:
    parts = (part for part in nested_values(state) if isinstance(part, ShardedBase))
    tensors = (part.data for part in parts if is_main_replica(part.replica_id))
    size = sum(data.nbytes for data in tensors if isinstance(data, Tensor))
    total = torch.tensor(size, device=device())
    dist.all_reduce(total)
    return int(total)


def _cannot_write(path: Path, needed: int) -> str:
    """What about the disk keeps `needed` bytes from being written to `path`; empty where nothing seems to.

    torch's writer hides the cause of a short write ("unexpected pos 704 vs 598").
    """
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    written = sum(file.stat().st_size for file in path.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    sizes = f"it takes about {needed / 1e9:.3g} GB"
    if disk.f_flag & os.ST_RDONLY:
        return f"{path.parent} lies on a read-only file system; mount it writable or set another output_dir"
    if limit not in (resource.RLIM_INFINITY, -1) and limit < needed:
        return f"files may have at most {limit} bytes here (ulimit -f) and {sizes}; raise the limit"
    if free + written < needed:
        return (
            f"No space left on device: {sizes}, {(free + written) / 1e9:.3g} GB are free at {path.parent}; make room, "
            "lower checkpoint.keep or set another output_dir"
        )
    return ""


def _cause(error: BaseException) -> str:
    """One line; of torch's CheckpointException, which is no Exception and holds each rank's own error, the first one."""
    if isinstance(error, CheckpointException):
        if not error.failures:  # told to one rank alone
            return "another rank failed"
        rank, (own, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {_cause(own)}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + ' …'}"
