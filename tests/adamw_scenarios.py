"""Ten updates of the policy, and the same ten by Hugging Face's model and PyTorch's AdamW in a plain loop.

`main(FOLDER)` forks the ranks; rank 0 of each job writes `world<W>.pt`, a dictionary {scenario: weights and norms}. On two
ranks the optimizer's states, or with them a mixture's experts, are dealt out.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_dapo.config import AlgorithmConfig, DecayStyle, OptimizerConfig
from nemo_dapo.losses.dapo import make_loss_fn
from nemo_dapo.types import TrainBatch
from tests.moe_scenarios import run_jobs
from tests.policy_scenarios import ROPE_THETA, VOCAB, Job, Layout, make_train_batch, weights_of
from tests.tiny import save_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"family": "qwen2", "tied": True},
    "experts": {"family": "qwen3_moe", "tied": False},
    "mixtral": {"family": "mixtral", "tied": False},
    "deepseek": {"family": "deepseek_v3", "tied": False, "kv_heads": 4},
}
STEPS, WARMUP, DECAY = 10, 3, 9
LR, MIN_LR, WEIGHT_DECAY, CLIP, BETAS, EPS = 1e-3, 1e-4, 0.1, 0.05, (0.9, 0.98), 1e-8
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def batch_of(step: int) -> TrainBatch:
    return make_train_batch(num_sequences=6, seed=step)


def old_logprobs(batch: TrainBatch, step: int) -> Tensor:
    """[T] around those of a random model, so that ratios lie on both sides of the clip range."""
    return -math.log(VOCAB) + 0.3 * torch.randn(batch.tokens.numel(), generator=torch.Generator().manual_seed(step))


def rate(step: int) -> float:
    """Linear up to `LR` over the warm-up, which counts from 1, then linear down to `MIN_LR` at `DECAY`, then there."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    return LR + (MIN_LR - LR) * min((step - WARMUP) / (DECAY - WARMUP), 1.0)


def by_the_policy(layout: Layout, model: str, job: Job) -> dict[str, Any]:
    options = OptimizerConfig(
        lr=LR,
        min_lr=MIN_LR,
        weight_decay=WEIGHT_DECAY,
        clip_grad=CLIP,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        warmup_steps=WARMUP,
        decay_steps=DECAY,
        decay_style=DecayStyle.linear,
    )
    policy, norms = job.policy(layout, model, optimizer=options), []
    loss_fn = make_loss_fn(AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH))
    for step in range(STEPS):
        batch = batch_of(step)
        norms.append(policy.update(batch, loss_fn, old_logprobs(batch, step))["grad_norm"].value)
    return {"weights": weights_of(policy), "norms": norms}


def loss_of(model: Any, batch: TrainBatch, old: Tensor) -> Tensor:
    """Eq. 8 of the DAPO paper, a sequence at a time."""
    total, tokens, start = torch.zeros(()), 0, 0
    for length, prompt, advantage in zip(batch.lengths, batch.prompt_lengths, batch.advantages, strict=True):
        here = slice(start, start + int(length))
        ids, response = batch.tokens[here].long(), slice(int(prompt), int(length))
        logits = model(ids[None]).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ratio = (logprobs[int(prompt) - 1 :] - old[here][response]).exp()
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        total = total - torch.minimum(ratio * advantage, clipped * advantage).sum()
        tokens, start = tokens + ratio.numel(), start + int(length)
    return total / tokens


def by_a_plain_loop(name: str, job: Job) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(job.folder / "models" / name, dtype=torch.float32)
    decayed = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer, norms = torch.optim.AdamW(groups, betas=BETAS, eps=EPS), []
    for step in range(STEPS):
        batch = batch_of(step)
        optimizer.zero_grad()
        loss_of(model, batch, old_logprobs(batch, step)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    model.save_pretrained(job.folder / "after" / name)  # experts under the names of the folder's format, one by one
    return {"weights": load_file(job.folder / "after" / name / "model.safetensors"), "norms": norms}


LAYOUTS = {1: dict.fromkeys(MODELS, Layout()), 2: {"dense": Layout(), "experts": Layout(ep=2)}}
SCENARIOS: dict[int, dict[str, Callable[[Job], Any]]] = {
    ranks: {name: functools.partial(by_the_policy, layout, name) for name, layout in layouts.items()}
    for ranks, layouts in LAYOUTS.items()
}
SCENARIOS[1] |= {f"{name}, plain": functools.partial(by_a_plain_loop, name) for name in MODELS}


def main(folder: Path) -> None:
    for seed, (name, options) in enumerate(MODELS.items()):
        save_tiny_model(folder / "models" / name, rope_theta=ROPE_THETA, vocab=VOCAB, seed=seed, **options)
    run_jobs(folder, SCENARIOS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
