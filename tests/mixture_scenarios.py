"""Mixtures of other families than Qwen's: what the policy makes of a batch under several layouts, for a test to compare.

`main(FOLDER)` runs in a process of its own and writes `world1.pt` and `world2.pt` as `moe_scenarios` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_dapo.config import Precision
from nemo_dapo.telemetry.metrics import values
from nemo_dapo.types import TrainBatch
from tests.moe_scenarios import run_jobs
from tests.policy_scenarios import (
    LOSS,
    ROPE_THETA,
    VOCAB,
    Job,
    Layout,
    gradient_with,
    logprobs_of_all,
    make_train_batch,
    weights_of,
)
from tests.tiny import save_tiny_model

YARN = {  # wavelengths from 16 positions on are stretched: enough to show within 40 positions
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7},
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral"},
    "deepseek_v3": {"family": "deepseek_v3", "kv_heads": 4},
    "moonlight": {"family": "moonlight", "kv_heads": 4, "rope_scaling": YARN},
}
LAYERS = 4  # of which two stages have two parts each
ONE = Layout()
LAYOUTS = {  # on two ranks; scenarios of one layout stand side by side and share its process groups
    "experts": (Layout(ep=2), ["mixtral", "moonlight"]),
    "tensor": (Layout(tp=2, sp=True), ["moonlight"]),
    "tensor and experts": (Layout(tp=2, sp=True, ep=2), ["mixtral", "deepseek_v3"]),
    "context": (Layout(cp=2), ["deepseek_v3"]),
    "pipeline": (Layout(pp=2, vpp=2), ["deepseek_v3"]),
}


def train_batch() -> TrainBatch:
    return make_train_batch(num_sequences=8)


def full_batch() -> TrainBatch:
    """Four sequences of 32 tokens are a pack of 128, which no layout fills up."""
    lengths = torch.full((8,), 32)
    tokens = torch.randint(2, VOCAB, (int(lengths.sum()),), generator=torch.Generator().manual_seed(3))
    return TrainBatch(tokens, lengths, lengths // 8, torch.zeros(tokens.numel()), torch.zeros(len(lengths)))


def scenario(model: str, layout: Layout) -> Callable[[Job], dict[str, Any]]:
    """Routes are recorded by the first pass and followed by every later one."""

    def run(job: Job) -> dict[str, Any]:
        policy, batch = job.policy(layout, model, replay_routes=True), train_batch()
        out: dict[str, Any] = {"imported": weights_of(policy), "logprobs": logprobs_of_all(policy, batch)}
        out |= {"routes": batch.routes, "replayed": logprobs_of_all(policy, batch)}
        full = full_batch()
        out |= {f"full, {name}": logprobs_of_all(policy, full) for name in ("recorded", "replayed")}
        old = out["logprobs"] + 0.2 * torch.randn(batch.tokens.numel(), generator=torch.Generator().manual_seed(9))
        out["gradient"] = gradient_with(policy, batch, LOSS, old, 128)["gradient"]
        out["metrics"] = values(policy.update(batch, LOSS, old))
        return out | {"updated": weights_of(policy)}

    return run


def weights_in_bf16(job: Job) -> dict[str, Any]:
    return weights_of(job.policy(ONE, "deepseek_v3", precision=Precision.bf16))


SCENARIOS: dict[int, dict[str, Callable[[Job], Any]]] = {
    1: {f"{model}, one rank": scenario(model, ONE) for model in MODELS} | {"bf16": weights_in_bf16},
    2: {f"{model}, {name}": scenario(model, layout) for name, (layout, models) in LAYOUTS.items() for model in models},
}


def add_frequencies(path: Path) -> None:
    """As folders of Moonlight have them; they are no parameters."""
    tensors = load_file(path / "model.safetensors")
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def main(folder: Path) -> None:
    for seed, (model, options) in enumerate(MODELS.items()):
        path = folder / "models" / model
        save_tiny_model(path, tied=False, rope_theta=ROPE_THETA, vocab=VOCAB, layers=LAYERS, seed=seed, **options)
    add_frequencies(folder / "models" / "moonlight")
    run_jobs(folder, SCENARIOS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
