"""Every rank's shard of every preset, built by Megatron-core without memory and without the other ranks.

torch's fake process group stands in for the ranks of a cluster: shapes are right, nothing is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_dapo import config as schema
from nemo_dapo.config import ParallelConfig, RunConfig, model_family
from nemo_dapo.config.compose import compose_file, typed
from tests.provider_scenarios import without_memory
from tests.published_models import LLAMA33_70B, QWEN3_30B_A3B, QWEN25_32B

CONF = Path(__file__).parents[1] / "conf"
QWEN3: dict[str, Any] = {  # dense ones differ in sizes alone
    **{name: value for name, value in QWEN3_30B_A3B.items() if "moe" not in name and "expert" not in name},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "hidden_size": 5120,
}
for _option in (
    "decoder_sparse_step",
    "mlp_only_layers",
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
):
    QWEN3.pop(_option)
MODELS: dict[str, dict[str, Any]] = {  # each preset's config.json, as published
    "llama-3.3-70b": LLAMA33_70B,
    "qwen2.5-7b": QWEN25_32B
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "max_window_layers": 28},
    "qwen2.5-32b": QWEN25_32B,
    "qwen3-14b": QWEN3 | {"intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "qwen3-32b": QWEN3 | {"intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-235b-a22b": QWEN3_30B_A3B
    | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536}
    | {"num_hidden_layers": 94, "num_attention_heads": 64, "max_window_layers": 94},
}
PRESETS = sorted(str(file.relative_to(CONF / "preset").with_suffix("")) for file in CONF.glob("preset/*/*.yaml"))
GIB = 2**30


LAYOUT = {  # as a table names the kinds of parallelism
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
}


def world_size(preset: str) -> int:
    return int(preset.rpartition("gpus")[2])


def compose_preset(preset: str, folder: Path) -> RunConfig:
    """The configuration that the preset makes, of a model folder with nothing but its config.json."""
    name = preset.partition("/")[0]
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(MODELS[name]))
    schema.register()
    return typed(compose_file(CONF / "config.yaml", [f"preset={preset}", f"model.path={path}", "data=gsm8k"]))


@dataclass(frozen=True)
class Shard:
    """Parameters of one rank: of experts, of matrices that are split beside them, and of what every rank has whole."""

    experts: int
    split: int
    whole: int

    @property
    def total(self) -> int:
        return self.experts + self.split + self.whole


def shards(run: RunConfig, ranks: int) -> Iterator[tuple[tuple[int, int, int], Shard]]:
    """((tensor, pipeline, expert) position, shard), one of the ranks at each: the others have the same."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_dapo.megatron.parallel import expert_tensor_size
    from nemo_dapo.megatron.weights import load_bridge

    bridge, p = load_bridge(run.model.path), run.parallel
    seen = set()
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor_model_parallel_size,
            pipeline_model_parallel_size=p.pipeline_model_parallel_size,
            context_parallel_size=p.context_parallel_size,
            expert_model_parallel_size=p.expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_size(p),
            create_gloo_process_groups=False,
        )
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
        )
        if place not in seen:
            seen.add(place)
            model = without_memory(bridge, run.model, p).provide(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
            yield place, count(model)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def count(model: Any) -> Shard:
    sizes = {"experts": 0, "split": 0, "whole": 0}
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        kind = (
            "experts"
            if ".experts." in name
            else "split"
            if getattr(parameter, "tensor_model_parallel", False)
            else "whole"
        )
        sizes[kind] += parameter.numel()
    return Shard(**sizes)


def whole_model(found: dict[tuple[int, int, int], Shard]) -> int:
    """Parameters of the model that the shards are of: each part once."""
    total = 0
    for stage in {pipeline for _, pipeline, _ in found}:
        of_stage = {place: shard for place, shard in found.items() if place[1] == stage}
        total += next(iter(of_stage.values())).whole
        total += sum({place[0]: shard.split for place, shard in of_stage.items()}.values())
        total += sum({place[2]: shard.experts for place, shard in of_stage.items()}.values())
    return total


def memory(shard: Shard, p: ParallelConfig, ranks: int) -> dict[str, float]:
    """GiB of one rank while it trains, by kind: bf16 weights, float32 gradients, and what AdamW keeps of its share."""
    dense_share = ranks // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
    expert_share = ranks // (p.pipeline_model_parallel_size * p.expert_model_parallel_size)
    optimizer = 12 * ((shard.split + shard.whole) / dense_share + shard.experts / expert_share)
    return {"weights": 2 * shard.total / GIB, "gradients": 4 * shard.total / GIB, "optimizer": optimizer / GIB}


def layer_inputs(run: RunConfig) -> float:
    """GiB that the first stage keeps for the backward pass where each layer is computed again, as on a GPU it is: bf16
    inputs of its layers for as many micro-batches as there are stages."""
    model, p = model_family.read(run.model.path), run.parallel
    tokens = run.trainer.tokens_per_microbatch / p.context_parallel_size
    if p.sequence_parallel:
        tokens /= p.tensor_model_parallel_size
    stages = p.pipeline_model_parallel_size
    return 2 * tokens * model["hidden_size"] * -(-model["num_hidden_layers"] // stages) * stages / GIB


def layout_of(p: ParallelConfig) -> str:
    return " × ".join(f"{kind}{getattr(p, name)}" for kind, name in LAYOUT.items() if getattr(p, name) > 1)


def of_all_ranks(preset: str, folder: Path) -> dict[str, Any]:
    """What a preset comes to: the model's parameters by its shards, and the fullest rank's memory by kind."""
    run, ranks = compose_preset(preset, folder), world_size(preset)
    found = dict(shards(run, ranks))
    fullest = max((memory(shard, run.parallel, ranks) for shard in found.values()), key=lambda m: sum(m.values()))
    return {
        "preset": preset,
        "layout": layout_of(run.parallel),
        "server": run.rollout.vllm["tensor_parallel_size"],
        "shards": len(found),
        "parameters": whole_model(found),
        "published": parameters_of_transformers(run.model.path),
        "memory": fullest | {"layer inputs": layer_inputs(run)},
    }


def parameters_of_transformers(path: str) -> int:
    """Of the model as transformers builds it, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
