"""A colocated step's way through the stages: what another process finds free, what comes back, and what it costs."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.line import GIB, Line, seconds
from benchmarks.gpu.models import HALF_BILLION, LOSS, SMALLEST, a_policy, make_batch, write_model
from benchmarks.gpu.watcher import Watcher
from nemo_dapo.config import Precision
from nemo_dapo.telemetry.metrics import values
from nemo_dapo.types import Stage, TrainBatch

SIZES = {"cpu": SMALLEST, "cuda": HALF_BILLION}
LONGEST = {"cpu": 48, "cuda": 2048}
REPEATS = {"cpu": 1, "cuda": 3}
# CUDA's context with its kernels, cuBLAS's and NCCL's buffers: they stay as long as the process does.
CONTEXT_GIB = 2.5


def measure(device: str) -> Iterator[Line]:
    batch = make_batch(16, LONGEST[device], SIZES[device]["vocab"])
    with tempfile.TemporaryDirectory() as folder, Watcher(device) as watcher:
        path = write_model(Path(folder), **SIZES[device])
        at_first = watcher.free()
        with a_policy(path, Precision.bf16, 8 * LONGEST[device]) as policy:
            norms = [one_step(policy, batch) for _ in range(2)]
            plain = seconds(lambda: one_step(policy, batch), device, repeats=REPEATS[device])
            yield Line("step without offload", plain, "s")
            yield Line("held by the trainer, seen from outside", (at_first - watcher.free()) / GIB, "GiB")
            del policy
        give_back(device)
        with a_policy(path, Precision.bf16, 8 * LONGEST[device], offload=True) as policy:
            yield from away_and_back(policy, batch, norms, lambda: at_first - watcher.free(), device)


def away_and_back(
    policy: Any, batch: TrainBatch, norms: Sequence[float], held: Callable[[], int], device: str
) -> Iterator[Line]:
    """`norms` are the gradients' of the first two steps without offload, `held` is bytes that another process misses."""
    first = one_step(policy, batch)
    before = {name: tensor.cpu().clone() for name, tensor in states(policy).items()}
    to_the_servers(policy)
    most = CONTEXT_GIB if device == "cuda" else None
    yield Line("held in stage generate, seen from outside", held() / GIB, "GiB", most=most)
    to_the_trainer(policy)
    same = [torch.equal(tensor.cpu(), before[name]) for name, tensor in states(policy).items()]
    yield Line("parameters and states", sum(tensor.nbytes for tensor in before.values()) / GIB, "GiB")
    yield Line("share of them that came back bit for bit", sum(same) / len(same), "", least=1.0)
    second = one_step(policy, batch)
    gap = max(abs(mine / theirs - 1) for mine, theirs in zip((first, second), norms, strict=True))
    yield Line("gap of gradient norms before and after to those without offload", gap, "", most=1e-3)

    def round_trip() -> None:
        to_the_servers(policy)
        to_the_trainer(policy)

    def whole_step() -> None:
        round_trip()
        one_step(policy, batch)

    yield Line("away and back", seconds(round_trip, device, repeats=REPEATS[device]), "s")
    yield Line("step with offload", seconds(whole_step, device, repeats=REPEATS[device]), "s")


def one_step(policy: Any, batch: TrainBatch) -> float:
    """Old log-probabilities and one update; the gradient's norm."""
    return values(policy.update(batch, LOSS, policy.logprobs(batch)))["grad_norm"]


def to_the_servers(policy: Any) -> None:
    policy.enter(Stage.sync)
    policy.enter(Stage.generate)


def to_the_trainer(policy: Any) -> None:
    policy.enter(Stage.score)
    policy.enter(Stage.train)


def give_back(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def states(policy: Any) -> dict[str, Tensor]:
    """Parameters, master weights and moments, as the update reads them."""
    named = {name: parameter.data for chunk in policy.model for name, parameter in chunk.named_parameters()}
    optimizer = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])[0].optimizer
    for i, (master, state) in enumerate(optimizer.state.items()):
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
        named |= {f"{i} master": master.data} | {f"{i} {key}": value for key, value in tensors.items()}
    return named
