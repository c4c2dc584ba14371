"""The policy's whole gradient, from Megatron's buffers, against Hugging Face's autograd, and in several micro-batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.gpu.line import Line
from benchmarks.gpu.models import LOSS, SMALLEST, a_policy, make_batch, write_model
from nemo_dapo.config import Precision
from nemo_dapo.types import TrainBatch

SIZES = {
    "cpu": SMALLEST,
    "cuda": {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 2, "ffn": 1408, "vocab": 32000},
}
LONGEST = {"cpu": 48, "cuda": 256}
# Sums in another order; and in bf16 roundings of 2^-9 at other places, in activations and their gradients alike.
BOUNDS = {Precision.fp32: (1e-3, 1e-4), Precision.bf16: (5e-2, 2e-2)}


def measure(device: str) -> Iterator[Line]:
    batch = make_batch(8, LONGEST[device], SIZES[device]["vocab"])
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), **SIZES[device])
        expected = hugging_face_gradient(path, batch, device)
        for precision in Precision:
            of_autograd, of_whole = BOUNDS[precision]
            with a_policy(path, precision, LONGEST[device]) as policy:
                several = gradient(policy, batch)
                policy.max_tokens = batch.tokens.numel()
                whole = gradient(policy, batch)
            name = precision.value
            yield Line(
                f"{name}: gap to Hugging Face's gradient", gap(several, expected), "of its norm", most=of_autograd
            )
            head = "model.embed_tokens.weight"
            yield Line(f"{name}: of the tied head alone", gap(several, expected, head), "of its norm", most=of_autograd)
            yield Line(f"{name}: micro-batches to one", gap(several, whole), "of its norm", most=of_whole)


def gradient(policy: Any, batch: TrainBatch) -> dict[str, Tensor]:
    """By Hugging Face names, of the sum in `main_grad`, which is exported as if it were the weights."""
    policy._zero_gradients()
    policy.accumulate_gradients(batch, LOSS, None)
    parameters = [p for chunk in policy.model for p in chunk.parameters()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.copy_(p.main_grad)
        exported = {name: weight.float().clone() for name, weight in policy.export_weights()}
        for p, weight in zip(parameters, kept, strict=True):
            p.copy_(weight)
    return exported


def hugging_face_gradient(path: Path, batch: TrainBatch, device: str) -> dict[str, Tensor]:
    """Of the same objective in float32: with equal old and new log-probabilities each token's is its advantage's share."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(device)
    spans = zip(
        batch.tokens.split(batch.lengths.tolist()), batch.prompt_lengths.tolist(), batch.advantages, strict=True
    )
    for ids, prompt, advantage in spans:
        logits = model(ids[None].to(device)).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[1:, None].to(device))[prompt - 1 :, 0]
        (-advantage * logprobs.sum() / batch.num_response_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gap(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *names: str) -> float:
    """Norm of the difference over the norm, of all parameters or of those named."""
    chosen = names or expected
    apart = sum(float((found[name].to(expected[name]) - expected[name]).square().sum()) for name in chosen)
    return (apart / sum(float(expected[name].square().sum()) for name in chosen)) ** 0.5
