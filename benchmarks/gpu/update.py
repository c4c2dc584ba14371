"""One update of a policy of Qwen2.5-0.5B's shape: tokens a second, and how much of the GPU's arithmetic that is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.line import Line, seconds
from benchmarks.gpu.models import HALF_BILLION, LOSS, SMALLEST, a_policy, make_batch, write_model
from nemo_dapo.config import Precision
from nemo_dapo.types import TrainBatch

SIZES = {"cpu": SMALLEST, "cuda": HALF_BILLION}
SEQUENCES, LONGEST, TOKENS = {"cpu": 8, "cuda": 48}, {"cpu": 48, "cuda": 2048}, {"cpu": 128, "cuda": 16384}
REPEATS = {"cpu": 1, "cuda": 3}
SQUARE = {"cpu": 256, "cuda": 8192}
H100_BF16 = 989.4e12  # dense, of NVIDIA's data sheet for the SXM version; the H200's is the same
SAME_PEAK = ("H100", "H200")


def measure(device: str) -> Iterator[Line]:
    size = SIZES[device]
    batch = make_batch(SEQUENCES[device], LONGEST[device], size["vocab"])
    rate = product_rate(SQUARE[device], device)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), **size)
        with a_policy(path, Precision.bf16, TOKENS[device]) as policy:
            took = seconds(lambda: policy.update(batch, LOSS, None), device, repeats=REPEATS[device], warm_up=1)
            scored = seconds(lambda: policy.logprobs(batch), device, repeats=REPEATS[device], warm_up=1)
    tokens = batch.tokens.numel()
    done = training_flops(batch, **size) / took
    yield Line("update", tokens / took, "tokens/s", least=1)
    yield Line("log-probabilities", tokens / scored, "tokens/s", least=1)
    yield Line("arithmetic of the update", done / 1e12, "TFLOP/s")
    yield Line("a bf16 matrix product on this device", rate / 1e12, "TFLOP/s")
    yield Line("share of that", 100 * done / rate, "%")
    if device == "cuda" and any(name in torch.cuda.get_device_name() for name in SAME_PEAK):
        yield Line("MFU, of 989 TFLOP/s", 100 * done / H100_BF16, "%")


def training_flops(
    batch: TrainBatch, *, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int
) -> float:
    """Of forward and backward: 6 a weight and token, the head's too, and causal attention; nothing that is done twice."""
    of_layer = hidden * hidden * (2 + 2 * kv_heads / heads) + 3 * hidden * ffn
    weights = layers * of_layer + vocab * hidden
    pairs = float((batch.lengths.double() ** 2).sum()) / 2
    return 6.0 * weights * batch.tokens.numel() + 12.0 * layers * hidden * pairs


def product_rate(size: int, device: str) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / seconds(lambda: left @ right, device, repeats=10, warm_up=3)
