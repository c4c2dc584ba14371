"""A run's checkpoint <-> a Hugging Face folder, without a GPU and without ever holding the model.

The model is built on torch's meta device, with shapes and no memory. Megatron-Bridge's tasks, which the policy exports and
imports by, then run one after another, each on a parameter that is there for its turn: read from the checkpoint and handed
on under its Hugging Face name, or made of the folder's tensors and written. So memory holds one parameter, and on either
side of it what is on its way into the file at hand.

One process does it; `parallel.initialize` must have been called. A checkpoint of any layout is read. One that is written
has weights alone: a run that begins with it has the optimizer, the schedule and the data from their beginning.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from nemo_dapo.config import ModelConfig, ParallelConfig
from nemo_dapo.hf_folder import FolderTensors
from nemo_dapo.megatron import adapters, checkpoint, weights
from nemo_dapo.megatron.provider import make_provider
from nemo_dapo.megatron.single_tensors import StreamedSave, TensorReader, pieces
from nemo_dapo.megatron.unpickling import nothing_is_unpickled


class Converter:
    """Streams weights of the model that `options` describe, whose folder says names and shapes."""

    def __init__(self, options: ModelConfig) -> None:
        self.folder = Path(options.path)
        self.bridge = weights.load_bridge(options.path)
        self.model = [_without_memory(self.bridge, options)]
        self.layers = {id(layer.to_wrap): layer for layer in adapters.adapted_layers(self.model)}
        self.exporter = weights.Exporter(self.bridge, self.model)

    def weights_of(self, policy: Path) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its Hugging Face name, of `policy`, the folder of that name in a checkpoint.

        A tensor's memory is taken back when the next is asked for. Adapters are merged into their base, which is that of
        the model's folder. Raises ValueError for the checkpoint of another model, or of other adapters.
        """
        reader = TensorReader(policy)
        if reader.holds(adapters.ADAPTER) != bool(self.layers):
            raise ValueError(
                f"{policy} holds {'no ' if self.layers else ''}adapters, against model.lora of the run's config.yaml; put "
                "the checkpoint back into its run's folder"
            )
        with nothing_is_unpickled():
            form = dist_checkpointing.load_content_metadata(str(policy)) or checkpoint.PORTABLE
        return self.exporter.export(self._filled(reader, self._parts(form)))

    def _filled(self, reader: TensorReader, parts: Mapping[str, Any]) -> Iterator[Any]:
        """The tasks, each while its parameter is there."""
        base = FolderTensors(self.folder) if self.layers else {}
        for task in self.exporter.tasks:
            module, name = task.megatron_module, task.param_name
            # Not a view, which would keep what it is a view of.
            weight = (reader.read(parts[name]) if name in parts else self._made(task, base)).data
            with contextlib.ExitStack() as here:
                here.enter_context(_put(module, _last(name), weight))
                if layer := self.layers.get(id(module)):
                    of = name.partition(adapters.BASE)[0] + adapters.ADAPTER
                    for side in ("linear_in", "linear_out"):
                        matrix = reader.read(parts[f"{of}{side}.weight"])
                        here.enter_context(_put(getattr(layer.adapter, side), "weight", matrix))
                yield dataclasses.replace(task, param_weight=weight)
            weight.data = weight.new_empty(0)  # the bridge still holds it while it asks for the next

    def save(self, source: Path, policy: Path, file_bytes: int) -> list[Path]:
        """Write the weights of the Hugging Face folder `source` to the empty folder `policy`; returns its files."""
        form = checkpoint.PORTABLE | {checkpoint.WEIGHTS_ALONE: True}
        tasks, tensors = {task.param_name: task for task in self.exporter.tasks}, FolderTensors(source)
        state, parts = self._parts(form), self._parts(form)

        def make(name: str) -> list[Tensor]:
            return [piece.data for piece in pieces(parts[name], self._made(tasks[name], tensors))]

        writing = StreamedSave(make, file_bytes)
        dist_checkpointing.save({"model": state}, str(policy), writing, content_metadata=form)
        return sorted(policy.iterdir())

    def _parts(self, form: Mapping[str, Any]) -> dict[str, Any]:
        return checkpoint.sharded_weights(self.model[0], dict(form))

    def _made(self, task: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """The task's whole parameter, of `tensors` by their Hugging Face names."""
        found = self.bridge._model_bridge.maybe_modify_loaded_hf_weight(task.mapping.hf_param, tensors)
        module, absent = task.megatron_module, task.param_weight
        with contextlib.ExitStack() as here:
            # The bridge moves what it makes to where that is, or the module's weight beside it.
            for name in {_last(task.param_name), "weight"}:
                if (tensor := getattr(module, name, None)) is not None:
                    here.enter_context(_put(module, name, torch.empty_like(tensor, device="cpu")))
            made: Tensor = task.mapping.hf_to_megatron(found, module)
        return made.to(absent.dtype).view(absent.shape)


def _without_memory(bridge: Any, options: ModelConfig) -> Any:
    provider = make_provider(bridge, options, ParallelConfig())
    provider.init_model_with_meta_device = True
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(pre_process=True, post_process=True)
    if options.lora.rank:
        with torch.device("meta"):
            (model,) = adapters.add([model], options.lora)
    return model


@contextlib.contextmanager
def _put(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Inside, `tensor` is the parameter or buffer `name` of `module`."""
    absent = getattr(module, name)
    if isinstance(absent, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, name, tensor)
    try:
        yield
    finally:
        setattr(module, name, absent)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
