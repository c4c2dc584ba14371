"""Megatron's optimizer and gradient buffers from our options: AdamW sharded over data-parallel ranks, its schedule, DDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_dapo.config import DecayStyle, OptimizerConfig, reserved
from nemo_dapo.megatron.adam import step_kept_in_the_group
from nemo_dapo.megatron.provider import check_known

# Megatron-LM's words for the data types of states, on its command line and here in `optimizer.megatron`.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}


def ddp_config(passed: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """Of the gradient buffers; `passed` is `parallel.ddp`. Raises ValueError as `make_optimizer` does."""
    ours = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": torch.cuda.is_available(),
        "use_distributed_optimizer": True,
        "average_in_collective": False,
    }
    return _config(DistributedDataParallelConfig, ours, "parallel.ddp", passed)


def make_optimizer(model: list[Any], provider: Any, options: OptimizerConfig) -> tuple[Any, OptimizerParamScheduler]:
    """The optimizer over the DDP-wrapped `model` and its learning-rate schedule.

    Raises ValueError for an option in `options.megatron` that Megatron does not know or that the trainer keeps.
    """
    ours = {
        "optimizer": "adam",
        "lr": options.lr,
        "min_lr": options.min_lr,
        "weight_decay": options.weight_decay,
        "clip_grad": options.clip_grad,
        "adam_beta1": options.adam_beta1,
        "adam_beta2": options.adam_beta2,
        "adam_eps": options.adam_eps,
        "bf16": provider.bf16,
        "params_dtype": provider.params_dtype,
        "use_distributed_optimizer": True,
    }
    passed = {name: _dtype(name, value) for name, value in options.megatron.items()}
    config = _config(MegatronOptimizerConfig, ours, "optimizer.megatron", passed)
    with step_kept_in_the_group():
        optimizer = get_megatron_optimizer(config, model)
    return optimizer, _schedule(optimizer, options)


def _schedule(optimizer: Any, options: OptimizerConfig) -> OptimizerParamScheduler:
    constant = options.decay_style is DecayStyle.constant
    return OptimizerParamScheduler(
        optimizer,
        # Update n of a warm-up over W has (n + 1) / (W + 1) of the rate: from 0 on, the first one would change nothing.
        init_lr=options.lr / (options.warmup_steps + 1),
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=options.warmup_steps + 1 if constant else options.decay_steps,
        lr_decay_style=options.decay_style.value,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _config(kind: type, ours: Mapping[str, Any], option: str, passed: Mapping[str, Any]) -> Any:
    problems = [*reserved.problems(option, passed)]
    if problems:
        raise ValueError("; ".join(problems))
    check_known(option, passed, kind)
    return kind(**{**ours, **passed})


def _dtype(name: str, value: Any) -> Any:
    if not name.endswith("_dtype"):
        return value
    if value not in DTYPES:
        raise ValueError(f"optimizer.megatron.{name}={value!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[value]
