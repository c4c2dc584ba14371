"""Servers on the trainer's own GPUs: whether they are there, and what they are started with then."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nemo_dapo.config import Offload, Placement, Precision, RolloutConfig, RunConfig, Transport
from nemo_dapo.hf_folder import expected_weights

# A sleeping server gives back nearly all of its share, and the trainer's parameters lie beside it when it wakes.
DEFAULTS = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.6}
BYTES_PER_ELEMENT = {Precision.bf16: 2, Precision.fp32: 4}


def trainer_devices(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of this host's ranks, as CUDA_VISIBLE_DEVICES names them; none on a CPU host."""
    if not torch.cuda.is_available():
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return visible.split(",")[: int(environment.get("LOCAL_WORLD_SIZE", "1"))]


def shares_gpus(config: RolloutConfig, trainer: Sequence[str]) -> bool:
    """Whether a server of `config` runs on one of `trainer`'s GPUs. Servers without devices of their own inherit all."""
    if config.replay or not trainer or config.placement in (Placement.dedicated, Placement.attach):
        return False
    servers = {device.strip() for one in config.visible_devices for device in one.split(",")}
    return not servers or not servers.isdisjoint(trainer)


def needs_nccl(config: RolloutConfig) -> bool:
    """Whether weights are broadcast to servers on other GPUs than the trainer's; what shares them takes CUDA IPC."""
    return config.transport is Transport.device and not shares_gpus(config, trainer_devices(os.environ))


def require_devices(config: RolloutConfig, environment: Mapping[str, str]) -> None:
    """Raises ValueError where this rank cannot send weights as `rollout.transport` says."""
    if config.transport is Transport.host:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"rollout.transport=device sends weights from GPU to GPU, and torch {torch.__version__} finds none on this "
            "host; set rollout.transport=host"
        )
    settings = {name: environment.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")}
    for name, value in settings.items():
        if "expandable_segments:true" in value.lower() and shares_gpus(config, trainer_devices(environment)):
            raise ValueError(
                f"{name}={value} puts tensors into memory that CUDA IPC cannot share, and with rollout.transport=device "
                "servers on the trainer's GPUs read from it; unset it, or set rollout.transport=host"
            )


def offloads(config: RunConfig) -> bool:
    """Whether the policy's memory leaves the device while the servers generate."""
    if config.trainer.offload is Offload.auto:
        return shares_gpus(config.rollout, trainer_devices(os.environ))
    return config.trainer.offload is Offload.always


def with_sleep(config: RunConfig) -> RolloutConfig:
    """The options of servers that sleep while the trainer works, where they share its GPUs; else as they are.

    Raises ValueError where the user asks for the opposite.
    """
    if not offloads(config) or not shares_gpus(config.rollout, trainer_devices(os.environ)):
        return config.rollout
    if config.rollout.max_staleness:
        raise ValueError(
            f"rollout.max_staleness={config.rollout.max_staleness} generates while the trainer updates, but the servers "
            "are on its GPUs and sleep then; give them others by rollout.visible_devices, or set it to 0"
        )
    options = {**DEFAULTS, **config.rollout.vllm}
    if not options["enable_sleep_mode"]:
        raise ValueError(
            "rollout.vllm.enable_sleep_mode=false keeps the servers' memory on GPUs that the trainer needs; leave it out, "
            "give the servers GPUs of their own by rollout.visible_devices, or set trainer.offload=never where both fit"
        )
    return replace(config.rollout, vllm=options)


def weight_bytes(config: RolloutConfig, model: Path, precision: Precision) -> int:
    """Bytes of the model's weights on each GPU of a server."""
    elements = expected_weights(model).num_elements
    gpus = int(config.vllm.get("tensor_parallel_size") or 1) * int(config.vllm.get("pipeline_parallel_size") or 1)
    return elements * BYTES_PER_ELEMENT[precision] // gpus
