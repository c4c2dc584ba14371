"""What Megatron-Bridge and Megatron-core make of published models and our settings; part of policy_scenarios."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_dapo.config import Fp8, ModelConfig, ParallelConfig
from tests.published_models import PUBLISHED, QWEN25_32B

DENSE = QWEN25_32B | {"num_hidden_layers": 2}
PLAIN_TYPES = (bool, int, float, str, type(None))
ASKED: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "moe_aux_loss_coeff": 0.02,
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
        "bias_dropout_fusion": False,
        "num_layers_in_first_pipeline_stage": 9,
    },
    "DeepSeek-V3": {"moe_router_bias_update_rate": 0.005, "recompute_granularity": None},
}


@contextlib.contextmanager
def transformer_engine_said_to_be_there() -> Iterator[None]:
    """Stands in for a GPU with Transformer Engine, as far as a configuration without a model asks for them."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils

    from nemo_dapo.megatron import provider

    fused = ("fused_permute", "fused_permute_with_probs", "fused_unpermute")
    sorted_ = ("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs")
    with contextlib.ExitStack() as stack:
        for name in (*fused, *sorted_):
            stack.enter_context(mock.patch.object(moe_utils, name, object(), create=True))
        stack.enter_context(mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", object()))
        stack.enter_context(mock.patch.object(transformer_config, "is_te_min_version", return_value=True))
        stack.enter_context(mock.patch.object(provider, "has_transformer_engine", return_value=True))
        stack.enter_context(mock.patch("torch.cuda.is_available", return_value=True))
        yield


def folder_of(where: Path, name: str, config: dict[str, Any]) -> str:
    folder = where / "published" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def settings_of(provider: Any) -> dict[str, Any]:
    """Those that a process without Megatron can read."""
    settings = {name: value for name, value in vars(provider).items() if type(value) in (*PLAIN_TYPES, list)}
    return {k: v for k, v in settings.items() if type(v) is not list or all(type(each) in PLAIN_TYPES for each in v)}


def without_memory(bridge: Any, options: ModelConfig, layout: ParallelConfig) -> Any:
    """What Megatron-core makes this rank's models by. Nothing is drawn: on the meta device that is most of the time."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from nemo_dapo.megatron.provider import make_provider

    provider = make_provider(bridge, options, layout)
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.init_model_with_meta_device = True
    provider.init_method = provider.output_layer_init_method = provider.embedding_init_method = lambda weight: weight
    return provider


def whole(bridge: Any, options: ModelConfig) -> Any:
    return without_memory(bridge, options, ParallelConfig()).provide(pre_process=True, post_process=True)


def parameters(model: Any) -> int:
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


def provider_settings(job: Any) -> dict[str, Any]:
    """Settings of each published model on plain torch and with Transformer Engine, and with what a user asks for."""
    from nemo_dapo.megatron.provider import make_provider
    from nemo_dapo.megatron.weights import load_bridge

    out: dict[str, Any] = {}
    for name, config in PUBLISHED.items():
        path = folder_of(job.folder, name, config)
        bridge, layout = load_bridge(path), ParallelConfig(8, 4, sequence_parallel=True)
        out[name] = {"plain": settings_of(make_provider(bridge, ModelConfig(path), layout))}
        with transformer_engine_said_to_be_there():
            out[name]["fused"] = settings_of(make_provider(bridge, ModelConfig(path), layout))
            out[name]["fp8"] = settings_of(make_provider(bridge, ModelConfig(path, fp8=Fp8.blockwise), layout))
            if name in ASKED:
                out[name]["asked"] = settings_of(make_provider(bridge, ModelConfig(path, megatron=ASKED[name]), layout))
        if name != "DeepSeek-V3":  # whose 15,000 experts take a minute to build
            out[name]["parameters"] = parameters(whole(bridge, ModelConfig(path)))
    path = folder_of(job.folder, "fp8", DENSE)
    eight = whole(load_bridge(path), ModelConfig(path, fp8=Fp8.blockwise))
    configs = [module.config for module in eight.modules() if hasattr(module, "config")]
    out["fp8 of modules"] = [(config.fp8, config.fp8_recipe, config.fp8_param) for config in configs]
    return out | {"refused": refusals(job.folder), "packs in blocks": packs(job)}


def packs(job: Any) -> dict[str, list[int]]:
    """Lengths of a batch's packs, without products in FP8 and with them."""
    from tests.policy_scenarios import Layout, make_train_batch

    policy, lengths = job.policy(Layout()), {}
    for policy.fp8 in Fp8:
        lengths[policy.fp8.value] = [micro.tokens.numel() for micro in policy._microbatches(make_train_batch())]
    return lengths


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "reserved": ("Qwen2.5-32B", {}, {"expert_model_parallel_size": 8}),
    "unknown": ("Qwen2.5-32B", {}, {"recompute_granularty": "full"}),
    "two bases": (
        "Qwen2.5-32B",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        {},
    ),
    "stretched": ("Qwen2.5-32B", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}),
    "latent and linear": ("DeepSeek-V3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}),
}


def refusals(where: Path) -> dict[str, str]:
    """What is said of each of REFUSED."""
    from nemo_dapo.megatron.provider import make_provider
    from nemo_dapo.megatron.weights import load_bridge

    said = {}
    for case, (name, changed, passed) in REFUSED.items():
        path = folder_of(where, case, PUBLISHED[name] | changed)
        try:
            make_provider(load_bridge(path), ModelConfig(path, megatron=passed), ParallelConfig())
        except ValueError as error:
            said[case] = str(error)
    return said
