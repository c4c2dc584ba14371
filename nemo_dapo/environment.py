"""The variables that a rank of the trainer starts with, before torch is imported: those of its container, mended.

`rollout/environment.py` says what a server gets.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_dapo.config import Precision

# NVIDIA's containers ship TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: products of fp32 matrices with 10 bits of mantissa. The other
# two say the same to cuBLAS itself and to Triton's kernels, whose own default is TF32 (triton.knobs).
FULL_FP32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}


def rank_variables(inherited: Mapping[str, str], precision: Precision) -> dict[str, str]:
    """What a rank adds to, or changes of, the environment it was started with."""
    # One hardware queue: Megatron's overlap of tensor-parallel communication needs kernels to start in program order.
    ours = {"CUDA_DEVICE_MAX_CONNECTIONS": inherited.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")}
    if "RANK" in inherited and "LOCAL_RANK" not in inherited and "SLURM_LOCALID" in inherited:  # srun without torchrun
        ours["LOCAL_RANK"] = inherited["SLURM_LOCALID"]
    return ours | (FULL_FP32 if precision is Precision.fp32 else {})
