"""What the tests of adapters run in child processes: one job of one rank, whose checkpoints one of two ranks goes on from.

`main(FOLDER)` forks the ranks; rank 0 of each job writes `world<W>.pt`, a dictionary {scenario: result}.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_dapo.config.schema import LoraConfig, OptimizerConfig
from nemo_dapo.telemetry.metrics import values
from tests.moe_scenarios import RECOMPUTED, run_jobs
from tests.policy_scenarios import (
    LOSS,
    ROPE_THETA,
    VOCAB,
    Job,
    Layout,
    _folder,
    logprobs_of_all,
    make_train_batch,
    weights_of,
)
from tests.tiny import save_tiny_model

RANK, ALPHA = 4, 12.0
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"family": "qwen2", "tied": True},
    "untied": {"family": "qwen3", "tied": False},
    "experts": {"family": "qwen3_moe", "tied": False},
}
ATTENTION = ["linear_qkv", "linear_proj"]
LAYOUTS = {
    "data": Layout(),
    "tensor": Layout(tp=2),
    "tensor, sequence": Layout(tp=2, sp=True),
    "pipeline": Layout(pp=2),
    "context": Layout(cp=2),
}
# With so large an epsilon Adam's step is as long as the gradient, so that an error of the gradient is seen as it is.
STEP_AS_GRADIENT = OptimizerConfig(lr=1.0, adam_eps=1.0, weight_decay=0.0, warmup_steps=0)


def lora_of(model: str) -> LoraConfig:
    everywhere = LoraConfig().target_modules
    return LoraConfig(rank=RANK, alpha=ALPHA, target_modules=ATTENTION if model == "experts" else everywhere)


def adapted(job: Job, model: str, layout: Layout | None = None, **options: Any) -> Any:
    return job.policy(layout or Layout(), model, lora=lora_of(model), **options)


def base_of(policy: Any) -> dict[str, Tensor]:
    """Every parameter that is no adapter's."""
    named = ((name, p) for chunk in policy.model for name, p in chunk.named_parameters())
    return {name: p.detach().clone() for name, p in named if ".adapter." not in name}


def adapters_of(policy: Any) -> dict[str, Tensor]:
    named = ((name, p) for chunk in policy.model for name, p in chunk.named_parameters())
    return {name.removeprefix("module."): p.detach().clone() for name, p in named if ".adapter." in name}


def training(model: str) -> Callable[[Job], dict[str, Any]]:
    """Two updates of adapters: what they were, what they became, what of it is trained, exported and saved."""

    def scenario(job: Job) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        batch, plain = make_train_batch(), job.policy(Layout(), model)
        out: dict[str, Any] = {"plain": weights_of(plain), "plain scores": plain.logprobs(batch)}
        policy = adapted(job, model, with_reference=True, offload=True)
        before = base_of(policy)
        out |= {"at start": weights_of(policy), "scores at start": policy.logprobs(batch)}
        out |= {"models of the reference": policy.reference}
        for _ in range(2):
            out["metrics"] = values(policy.update(batch, LOSS, None))
        out["optimized"] = sum(p.numel() for group in policy.optimizer.param_groups for p in group["params"])
        out["trained"] = [name for name, p in policy.model[0].named_parameters() if p.requires_grad]
        after = base_of(policy)
        out["base is frozen"] = all(torch.equal(after[name], before[name]) for name in before)
        out |= {"adapters": adapters_of(policy), "merged": weights_of(policy), "scores": policy.logprobs(batch)}
        out["reference scores"] = policy.reference_logprobs(batch)
        out["scores after the reference"] = policy.logprobs(batch)
        path = _folder(job, f"checkpoint-{model}")
        taken = policy.take(path, apart=True)
        policy.save_hf(job.folder / "models" / f"merged {model}")
        out["exported scores"] = job.policy(Layout(), f"merged {model}").logprobs(batch)
        policy.update(batch, LOSS, None)
        taken.complete()
        saved = dist_checkpointing.load_tensors_metadata(str(path))
        out["saved weights"] = sum(math.prod(t.global_shape) for n, t in saved.items() if not n.startswith("optimizer"))
        out["saved numbers"] = sum(math.prod(tensor.global_shape) for tensor in saved.values())
        resumed = adapted(job, model)
        resumed.load(path)
        out["resumed"] = weights_of(resumed)
        resumed.update(batch, LOSS, None)
        return out | {"next": adapters_of(policy), "next after resuming": adapters_of(resumed)}

    return scenario


def gone_on(model: str, layout: Layout, **options: Any) -> Callable[[Job], dict[str, Any]]:
    """One rank's checkpoint under `layout`: the merged weights of it and their change by one more update."""

    def scenario(job: Job) -> dict[str, Any]:
        batch, policy = make_train_batch(), adapted(job, model, layout, optimizer=STEP_AS_GRADIENT, **options)
        policy.load(job.folder / f"checkpoint-{model}")
        before = weights_of(policy)
        out = {"before": before, "scores": logprobs_of_all(policy, batch)}
        out["grad_norm"] = values(policy.update(batch, LOSS, None))["grad_norm"]
        after = weights_of(policy)
        return out | {"change": {name: after[name] - before[name] for name in before}}

    return scenario


SCENARIOS: dict[int, dict[str, Callable[[Job], Any]]] = {
    1: {f"training, {model}": training(model) for model in MODELS}
    | {f"one rank, {model}": gone_on(model, Layout()) for model in MODELS}
    | {"one rank, recomputed, tied": gone_on("tied", Layout(), megatron=RECOMPUTED)},
    2: {f"{name}, tied": gone_on("tied", layout) for name, layout in LAYOUTS.items()}
    | {"pipeline, untied": gone_on("untied", Layout(pp=2)), "dealt experts, experts": gone_on("experts", Layout(ep=2))},
}


def main(folder: Path) -> None:
    for name, options in MODELS.items():
        save_tiny_model(folder / "models" / name, rope_theta=ROPE_THETA, vocab=VOCAB, **options)
    run_jobs(folder, SCENARIOS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
