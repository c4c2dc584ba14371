"""The policy's log-probabilities against Hugging Face's in float32, for both precisions of the policy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.line import Line
from benchmarks.gpu.models import SMALLEST, a_policy, hugging_face_logprobs, make_batch, response_positions, write_model
from nemo_dapo.config import Precision

SIZES = {
    "cpu": SMALLEST,
    "cuda": {"layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocab": 32000},
}
LONGEST = {"cpu": 48, "cuda": 1024}


def measure(device: str) -> Iterator[Line]:
    size, longest = SIZES[device], LONGEST[device]
    batch = make_batch(8, longest, size["vocab"])
    here = response_positions(batch)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), **size, spread=2.0)
        expected = hugging_face_logprobs(path, torch.float32, batch, device)[here]
        theirs = (hugging_face_logprobs(path, torch.bfloat16, batch, device)[here] - expected).abs()
        gaps = {}
        for precision in Precision:
            with a_policy(path, precision, 4 * longest) as policy:
                gaps[precision] = (policy.logprobs(batch)[here] - expected).abs()
    # float32 sums of a thousand terms in another order: 1e-6 of logits of a few units, through all layers.
    yield Line("fp32: mean gap to Hugging Face fp32", float(gaps[Precision.fp32].mean()), "nats", most=1e-5)
    yield Line("fp32: largest gap", float(gaps[Precision.fp32].max()), "nats", most=1e-3)
    yield Line("Hugging Face bf16: mean gap to its own fp32", float(theirs.mean()), "nats")
    # The same roundings at other places; a wrong rotary base or mask gives tens of times as much.
    yield Line(
        "bf16: mean gap to Hugging Face fp32", float(gaps[Precision.bf16].mean()), "nats", most=2 * float(theirs.mean())
    )
    yield Line("bf16: largest gap", float(gaps[Precision.bf16].max()), "nats")
