"""Checkpoints of several layouts, with the folder that the policy itself exports, and what conversion makes of them.

`main(FOLDER)` forks the ranks. Each run lies in `<name>/`: `config.yaml`, `checkpoints/step_000001`, the policy's own
export `trained/`, and of the conversion `converted/`, back again `begun/checkpoints/step_000000`, once more `again/`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint_memory import MIB, peak_of
from examples import convert_checkpoint
from nemo_dapo import checkpoint, hf_folder
from nemo_dapo.config import Precision, RunConfig
from nemo_dapo.config.schema import LoraConfig
from nemo_dapo.telemetry.manifest import write_config
from tests.moe_scenarios import run_jobs
from tests.policy_scenarios import LOSS, VOCAB, Job, Layout, make_train_batch, weights_of
from tests.tiny import save_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"family": "qwen2", "tied": True, "layers": 3},  # of which two stages have 2 and 1
    "mixture": {"family": "deepseek_v3", "tied": False, "kv_heads": 4},  # whose routers' biases stay in float32
}
# Two matrices of 67 MB, in float32.
WIDE: dict[str, Any] = {"family": "qwen2", "tied": False, "hidden": 256, "vocab": 1 << 16}
SHARD_BYTES, SHARD_OF_WIDE = 150_000, 70_000_000
LORA = LoraConfig(rank=4, alpha=8.0)
RUNS: dict[str, tuple[int, str, Layout, bool, dict[str, Any]]] = {
    "tensor and pipeline": (4, "dense", Layout(tp=2, pp=2, sp=True), True, {"precision": Precision.bf16}),
    "experts": (2, "mixture", Layout(ep=2), False, {"precision": Precision.bf16}),
    "adapters": (2, "dense", Layout(tp=2), False, {"lora": LORA}),
}


def run(name: str) -> Callable[[Job], None]:
    """Trains a step, saves, exports."""

    def scenario(job: Job) -> None:
        _, model, layout, portable, options = RUNS[name]
        policy, place = job.policy(layout, model, **options), job.folder / name
        policy.update(make_train_batch(), LOSS, None)
        if job.rank == 0:
            place.mkdir()
            config = RunConfig()
            config.model.path = str(job.folder / "models" / model)
            config.model.precision = options.get("precision", Precision.fp32)
            config.model.lora = options.get("lora", config.model.lora)
            write_config(place / "config.yaml", config)
        state = {
            "model": hf_folder.fingerprint(job.folder / "models" / model),
            "precision": options.get("precision", Precision.fp32).value,
            "progress": {"rollout_steps": 1},
        }
        checkpoint.save(place / "checkpoints", 1, policy, state, keep=0, group=None, portable=portable)
        policy.save_hf(place / "trained")
        dist.barrier()

    return scenario


def convert(to: str, source: Path, target: Path, *options: str) -> None:
    convert_checkpoint.convert(convert_checkpoint.arguments(["--to", to, str(source), str(target), *options]))


def there_and_back(name: str) -> Callable[[Job], None]:
    def scenario(job: Job) -> None:
        place, (_, model, _, _, options) = job.folder / name, RUNS[name]
        precision, size = options.get("precision", Precision.fp32).value, ("--max-shard-bytes", str(SHARD_BYTES))
        start, base = place / "begun" / "checkpoints" / "step_000000", ("--model", str(job.folder / "models" / model))
        convert("hf", place / "checkpoints" / "step_000001", place / "converted", *size)
        convert("megatron", place / "converted", start, "--precision", precision, *base, *size)
        convert("hf", start, place / "again", *base, *size)

    return scenario


def peaks(job: Job) -> dict[str, float]:
    """Bytes that either way took beyond what was held before, at most, of a model with two large matrices."""
    save_tiny_model(job.folder / "models" / "wide", **WIDE)
    size, start = ("--max-shard-bytes", str(SHARD_OF_WIDE)), job.folder / "wide" / "step_000000"
    ways: dict[str, tuple[Any, ...]] = {
        "megatron": (job.folder / "models" / "wide", start, "--precision", "fp32"),
        "hf": (start, job.folder / "wide" / "folder", "--model", str(job.folder / "models" / "wide")),
    }
    return {to: peak_of(lambda to=to: convert(to, *ways[to], *size))[0] * MIB for to in ways}  # type: ignore[misc]


def beside_objects(job: Job) -> dict[str, Any]:
    """What is read of a streamed tensor and of an object beside it, as core 0.19 has one there."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from nemo_dapo.megatron.single_tensors import StreamedSave

    def state(content: Any) -> dict[str, Any]:
        tensor = ShardedTensor.from_rank_offsets("weight", torch.empty(4, device="cpu" if content is None else "meta"))
        return {"model": {"weight": tensor}, "common_state": ShardedObject("common_state", content, (1,), (0,))}

    (job.folder / "objects.saved").mkdir()
    dist.init_process_group("gloo", init_method=f"file://{job.folder}/objects", rank=0, world_size=1)
    StreamedSave(lambda name: [torch.arange(4.0)], 100).save(state({"form": 1}), job.folder / "objects.saved")
    read: dict[str, Any] = TorchDistLoadShardedStrategy().load(state(None), job.folder / "objects.saved")
    dist.destroy_process_group()
    return read


def refused(job: Job) -> dict[str, str]:
    """What is said of sources that cannot be converted."""
    place, models = job.folder / "refused", job.folder / "models"
    shutil.copytree(job.folder / "adapters" / "checkpoints" / "step_000001", place / "checkpoints" / "step_000001")
    shutil.copytree(place / "checkpoints", place / "elsewhere" / "checkpoints")
    shard = max((place / "checkpoints" / "step_000001" / "policy").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    whole, mixture = job.folder / "adapters" / "checkpoints" / "step_000001", str(models / "mixture")
    ways: dict[str, tuple[str, Path, str]] = {
        "damaged": ("hf", place / "checkpoints" / "step_000001", str(models / "dense")),
        "of no run": ("hf", place / "elsewhere" / "checkpoints" / "step_000001", str(models / "dense")),
        "another model": ("hf", whole, mixture),
        "other weights": ("megatron", models / "dense", mixture),
    }
    said = {}
    for name, (to, source, model) in ways.items():
        try:
            convert(to, source, place / f"target {name}" / "step_000000", "--model", model)
        except ValueError as error:
            said[name] = str(error)
    return said


def beginning(layout: Layout) -> Callable[[Job], dict[str, Any]]:
    """A step of a policy that loads converted weights, beside one whose model folder has them."""

    def scenario(job: Job) -> dict[str, Any]:
        batch, out = make_train_batch(), {}
        for name, model in (("folder", "trained"), ("checkpoint", "dense")):
            policy = job.policy(layout, model, precision=Precision.bf16)
            if name == "checkpoint":
                policy.load(job.folder / "tensor and pipeline" / "begun" / "checkpoints" / "step_000000" / "policy")
            out[f"{name}, before"] = weights_of(policy)
            policy.update(batch, LOSS, None)
            out[f"{name}, after"] = weights_of(policy)
        return out

    return scenario


def main(folder: Path) -> None:
    for name, options in MODELS.items():
        save_tiny_model(folder / "models" / name, vocab=VOCAB, **options)
    run_jobs(folder, {ranks: {name: run(name) for name in RUNS if RUNS[name][0] == ranks} for ranks in (2, 4)})
    (folder / "models" / "trained").symlink_to(folder / "tensor and pipeline" / "trained")
    scenarios: dict[str, Callable[[Job], Any]] = {name: there_and_back(name) for name in RUNS}
    scenarios |= {"peaks": peaks, "refused": refused, "beside objects": beside_objects}
    (folder / "meet2").unlink()
    run_jobs(folder, {1: scenarios, 2: {"beginning": beginning(Layout(tp=2))}})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
