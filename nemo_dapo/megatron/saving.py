"""Writing a policy's checkpoint by Megatron's dist_checkpointing, in three acts: take, write, finish.

Taking is collective and says what each rank writes; what is taken *apart* is a copy on the host, so that the policy may
train on at once. Writing is each rank's own work and talks to nobody: it may run in a thread. Finishing is collective.
Without processes of its own: a job that is killed leaves nobody behind who still writes.
"""

from __future__ import annotations

import inspect
import os
import queue
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nemo_dapo.megatron.checkpoint import BY_RANK, LAYOUT, PORTABLE, cause, layout, replicas, sharded_state
from nemo_dapo.megatron.parallel import device

WRITTEN_BY_RANK_ZERO = (".metadata", "common.pt", "metadata.json")


class Taken:
    """What this rank is to write of one checkpoint. Implements `nemo_dapo.interfaces.TakenPolicy`.

    Every method raises RuntimeError that names the cause, such as a full disk and how much is needed.
    """

    def __init__(self, path: Path, request: Any, needed: int, *, apart: bool) -> None:
        """`request` is Megatron's; `needed` are the bytes of the whole checkpoint."""
        self.path, self.request, self.needed = path, request, needed
        self.arguments = list(request.async_fn_args)  # rank, buckets, queue; nothing where there is nothing to write
        if self.request.preload_fn is not None:
            self.arguments[1] = _on_the_host(self.arguments[1], request.preload_fn, apart=apart)

    def write(self) -> list[Path]:
        """This rank's files, to the disk; on any thread."""
        with named_cause(self.path, self.needed):
            if self.request.async_fn is not None:
                self.request.async_fn(*self.arguments)
            self.arguments.clear()  # copies go as soon as they are written
            return sorted(self.path.glob(f"__{dist.get_rank()}_*.distcp"))

    def finish(self) -> list[Path]:
        """Once every rank has written: the index, which rank 0 alone writes. Collective. Returns the files of this rank."""
        with named_cause(self.path, self.needed), errors_of_rank_zero_kept():
            for finalize in self.request.finalize_fns:
                finalize()
        if dist.get_rank():
            return []
        return [file for name in WRITTEN_BY_RANK_ZERO if (file := self.path / name).exists()]

    def complete(self) -> list[Path]:
        """Write and finish, one after the other. Collective."""
        files = self.write()
        dist.barrier()
        return files + self.finish()


def take(path: Path, model: list[Any], optimizer: Any, scheduler: Any, *, portable: bool, apart: bool) -> Taken:
    """What is to be written to the existing, empty directory `path`; collective.

    Raises RuntimeError that names the cause, such as a full disk and how much is needed.
    """
    form: dict[str, Any] = PORTABLE if portable else BY_RANK
    with named_cause(path, 0):
        state = sharded_state(model, optimizer, scheduler, form, is_loading=False)
        _zero_padding(state["optimizer"])
        for part in (state["optimizer"], *state["optimizer"].values()):
            # Data-parallel ranks that hold no state say so by None, of which Megatron warns at every save.
            if isinstance(part, dict) and part.get("param_state", part) is None:
                del part["param_state"]
        needed = _bytes_of_all_ranks(state)
    with named_cause(path, needed), errors_of_rank_zero_kept():
        write_in_this_process()
        request = dist_checkpointing.save(
            state,
            str(path),
            FullyParallelSaveStrategyWrapper(serialization.get_default_save_sharded_strategy(), replicas()),
            async_sharded_save=True,
            content_metadata=form | {LAYOUT: layout()},
            **_megatron_s_own_writer(),
        )
        del state  # what was gathered for a portable one, the request alone holds now
        return Taken(path, request, needed, apart=apart)


def _megatron_s_own_writer() -> dict[str, str]:
    """megatron-core from 0.17 asks for nvidia-resiliency-ext otherwise, whose writer is a process."""
    asks = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if asks else {}


def _on_the_host(buckets: list[Any], preload: Callable[[], list[Any]], *, apart: bool) -> list[Any]:
    """The buckets with every tensor on the host; `apart`, none of them shares memory with what it was made from."""
    if apart:
        _require_room(sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors))
        for _, _, (_, tensors) in buckets:
            for i, (item, tensor) in enumerate(tensors):
                if tensor.is_cpu:  # in place: what Megatron gathered or copied goes before the next copy is made
                    tensors[i] = (item, tensor.clone())
    taken = preload()
    for _, _, (_, tensors) in buckets:
        tensors.clear()  # the request would hold them to the end
    return taken


def _require_room(size: int) -> None:
    """Raises RuntimeError where the ranks of this host cannot all hold `size` bytes more."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available
    if ranks * size > free:
        raise RuntimeError(
            f"a copy of this rank's share takes {size / 1e9:.3g} GB, that of {ranks} ranks of this host more than the "
            f"{free / 1e9:.3g} GB of host memory that are free: set checkpoint.asynchronous=false"
        )


# ---------------------------------------------------------------- Megatron's writer


def write_in_this_process() -> None:
    """Let Megatron's writer write in threads, and hand over what it wrote by a plain queue.

    By default (seen in megatron-core 0.16.1) it forks writers, beside threads of ours that may hold any lock, and waits for
    ever where one is killed; and the queue is that of a server process (multiprocessing.Manager in filesystem_async.py),
    which imports the training script once more, for seconds, and outlives a rank that is killed by SIGKILL.
    """
    filesystem_async._results_queue = queue.Queue()
    for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread"):  # until 0.16, and from 0.17 on
        if hasattr(filesystem_async.FileSystemWriterAsync, name):
            setattr(filesystem_async.FileSystemWriterAsync, name, staticmethod(_write_buckets))


def _write_buckets(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Each bucket, one file, in a thread; `results` gets what FileSystemWriterAsync.finish asks for. Raises what fails."""
    with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint-file") as threads:
        files = threads.map(lambda i: _write_bucket(transforms, i, buckets[i]), range(len(buckets)))
        results.put(dict(enumerate(files)))


def _write_bucket(transforms: list[Any], index: int, bucket: Any) -> Any:
    # Unwrapped, it leaves the collection of garbage on, which would be off in all of this process.
    write: Any = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
    done: queue.Queue[Any] = queue.Queue()
    at_work: queue.Queue[int] = queue.Queue()
    at_work.put(index)
    write(transforms, index, bucket, done, at_work, True)
    _, outcome = done.get_nowait()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


@contextmanager
def errors_of_rank_zero_kept() -> Iterator[None]:
    """Raise what rank 0 alone fails to write only when every rank has come through Megatron's part.

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


# ---------------------------------------------------------------- what is written, and what keeps it from being


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


@contextmanager
def named_cause(path: Path, needed: int) -> Iterator[None]:
    """Whatever fails inside is a RuntimeError that names the cause; `needed` bytes were to be written to `path`."""
    try:
        yield
    except (CheckpointException, Exception) as error:
        disk = _cannot_write(path, needed)
        raise RuntimeError(f"{disk} ({cause(error)})" if disk else cause(error)) from error


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
