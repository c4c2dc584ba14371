"""Hugging Face directory <-> Megatron model, by Megatron-Bridge."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_dapo.hf_folder import write_model
from nemo_dapo.megatron import adapters, repairs

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
        bridge = importlib.import_module("megatron.bridge")
    else:
        for name in LOOK_FOR_TRANSFORMER_ENGINE:
            importlib.import_module(name)
        with cpu.transformer_engine_stand_in():
            bridge = importlib.import_module("megatron.bridge")
    repairs.complete()
    return bridge


class Exporter:
    """Exports a Megatron model by the bridge's conversion tasks, which are built once.

    The tasks remember what they asked other pipeline stages about each parameter: after the first export nothing but
    tensors is exchanged. The bridge would look for LoRA adapters by an object collective each time; ours are merged before.
    """

    def __init__(self, bridge: Any, model: list[Any]) -> None:
        self.bridge, self.model = bridge, model

    @functools.cached_property
    def tasks(self) -> list[Any]:
        """Collective. A parameter that the bridge has no mapping for has no task; whoever counts the weights names it."""
        return [task for task in self.bridge.get_conversion_tasks(self.model) if task is not None]

    def export(self, tasks: Iterable[Any] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, by its Hugging Face name, full, on every rank; collective over TP and PP.

        `tasks` are those of the model with their parameters filled in one after another; by default they are there.
        """
        weights = self.bridge.export_hf_weights(
            self.model,
            cpu=False,
            show_progress=False,
            conversion_tasks=adapters.merged_tasks(self.tasks if tasks is None else tasks, self.model),
            merge_adapter_weights=False,
        )
        for name, weight in weights:
            yield name, weight.detach()


def save_hf_model(weights: Iterator[tuple[str, Tensor]], source: Path, path: Path) -> None:
    """Write the weights with the configuration and tokenizer of `source` as a Hugging Face directory; collective.

    Rank 0 writes; see hf_folder.write_model. Not Bridge's own save_hf_pretrained (seen in 0.3.1): of every source file with
    one tensor that is not exported, such as a buffer, it leaves out all weights, with no more than a print.
    """
    try:
        if dist.get_rank() == 0:
            write_model(path, weights, source)
    finally:
        for _ in weights:  # the other ranks' exports end with rank 0's, also where it fails to write
            pass
