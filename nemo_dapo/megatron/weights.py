"""Hugging Face directory <-> Megatron model, by Megatron-Bridge."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_dapo.hf_folder import write_model

# Modules of Megatron-core that look for Transformer Engine when they are imported (see cpu.transformer_engine_stand_in).
LOOK_FOR_TRANSFORMER_ENGINE = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.mamba.mamba_layer_specs",
    "megatron.core.models.T5.t5_spec",
    "megatron.core.optimizer",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.multi_latent_attention",
)


def load_bridge(path: str) -> Any:
    """Megatron-Bridge's AutoBridge of the Hugging Face directory `path`.

    Raises ValueError when the directory holds no model, or one of a family that Megatron-Bridge does not know.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"model.path={path!r} has no config.json; expected a Hugging Face model directory")
    library = _import_bridge()
    try:
        return library.AutoBridge.from_hf_pretrained(path)
    except ValueError as error:
        raise ValueError(f"model.path={path!r} is not a model that Megatron-Bridge can convert: {error}") from error


def _import_bridge() -> Any:
    from nemo_dapo.megatron import cpu

    if importlib.util.find_spec("transformer_engine") is not None:
        return importlib.import_module("megatron.bridge")
    for name in LOOK_FOR_TRANSFORMER_ENGINE:
        importlib.import_module(name)
    with cpu.transformer_engine_stand_in():
        return importlib.import_module("megatron.bridge")


def export_weights(bridge: Any, model: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by its Hugging Face name, full, on every rank; collective over TP and PP."""
    for name, weight in bridge.export_hf_weights(model, cpu=False, show_progress=False):
        yield name, weight.detach()


def save_hf_model(bridge: Any, model: list[Any], source: Path, path: Path) -> None:
    """Write the weights with the configuration and tokenizer of `source` as a Hugging Face directory; collective.

    Rank 0 writes; see hf_folder.write_model. Not Bridge's own save_hf_pretrained (seen in 0.3.1): of every source file with
    one tensor that is not exported, such as a buffer, it leaves out all weights, with no more than a print.
    """
    weights = export_weights(bridge, model)
    try:
        if dist.get_rank() == 0:
            write_model(path, weights, source)
    finally:
        for _ in weights:  # the other ranks' exports end with rank 0's, also where it fails to write
            pass
