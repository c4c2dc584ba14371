"""Process groups: torchrun's environment -> torch.distributed -> Megatron's tensor, pipeline and data parallelism."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.config import ParallelConfig


def initialize(config: ParallelConfig, seed: int) -> None:
    """Join the job: default process group (NCCL on CUDA, gloo elsewhere) and Megatron's groups; once a process.

    Without torchrun's variables the job is this one process. Raises ValueError when the world does not divide.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        from nemo_dapo.megatron import cpu

        cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    timeout = datetime.timedelta(minutes=config.timeout_minutes)
    if not dist.is_initialized():
        _default_to_one_process()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    _check_world(config, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(config),
        distributed_timeout_minutes=max(1, int(config.timeout_minutes)),
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def virtual_stages(config: ParallelConfig) -> int | None:
    """Megatron's virtual_pipeline_model_parallel_size, which is None where stages are whole."""
    size = config.virtual_pipeline_model_parallel_size
    return size if size > 1 else None


def expert_tensor_size(config: ParallelConfig) -> int:
    """Ranks that share each expert, by their number or by the rule for null."""
    if config.expert_tensor_parallel_size is not None:
        return config.expert_tensor_parallel_size
    return 1 if config.expert_model_parallel_size > 1 else config.tensor_model_parallel_size


def shut_down() -> None:
    """Leave the job and forget Megatron's groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def control_group(minutes: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for small host messages; waits at most `minutes` for the slowest rank."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=minutes), group_desc="control")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def all_reduce(
    host: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
) -> Tensor:
    """A host tensor over the ranks of `group`, or all, by `op`, through the device that the default group speaks to."""
    moved = host.to(device()) if torch.cuda.is_available() else host
    dist.all_reduce(moved, op, group=group)
    return moved.cpu()


def full_float32() -> None:
    """Switch products with TF32's 10 bits of mantissa off, also where a library or another program switched them on."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _default_to_one_process() -> None:
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _check_world(config: ParallelConfig, world_size: int) -> None:
    tp, pp, cp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size, config.context_parallel_size
    if world_size % (replica := tp * pp * cp):
        raise ValueError(
            f"{world_size} ranks cannot hold tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} x "
            f"context_parallel_size={cp} = {replica}; start a multiple of {replica} ranks (torchrun --nproc-per-node), or "
            "lower parallel.*"
        )
