"""Single tensors of a checkpoint in torch's distributed format, read and written one after another.

Megatron-core's own reader and writer take the whole state at once. Here memory holds one parameter at a time, and what is
on its way into the file at hand. Files are those that Megatron-core reads and writes, by torch's storage classes.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from nemo_dapo.megatron.unpickling import read_metadata


def pieces(part: Any, weight: Tensor) -> list[ShardedTensor]:
    """Where `weight`, the whole of a parameter, lies in a checkpoint; `part` is its entry in a sharded state.

    One piece, or two of a gated layer, whose halves lie apart; their `data` are views of `weight`.
    """
    placed = dataclasses.replace(part, data=weight)
    if isinstance(placed, ShardedTensorFactory):
        built: list[ShardedTensor] = placed.build()
        return built
    return [placed]


def _region(piece: ShardedTensor) -> ChunkStorageMetadata:
    sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(sizes))


def _slices(starts: Iterable[int], lengths: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))


class TensorReader:
    """Reads parameters of the checkpoint in `folder`, whichever layout of ranks wrote it; no pickle in it is executed."""

    def __init__(self, folder: Path) -> None:
        """Raises UnpicklingError for a table of contents that is none."""
        self.folder = folder
        with (folder / ".metadata").open("rb") as file:
            self.metadata = read_metadata(file)

    def holds(self, part: str) -> bool:
        """Whether some name in it has `part`."""
        return any(part in name for name in self.metadata.state_dict_metadata)

    def read(self, part: Any) -> Tensor:
        """The whole parameter that `part` is the entry of in a sharded state, by whose data it has its shape and dtype.

        Raises ValueError where the checkpoint has no such parameter, or not all of it.
        """
        weight = torch.empty_like(part.data, device="cpu")  # takes no memory until it is filled
        parts = pieces(part, weight)
        for piece in parts:
            items = self._items(piece)
            if len(parts) == len(items) == 1 and math.prod(items[0].lengths) == weight.numel():
                return self._load(items[0]).to(weight.dtype).view(weight.shape)
            target = piece.data.view(_region(piece).sizes)
            for item in items:
                target[_slices(item.dest_offsets, item.lengths)] = self._load(item)
        return weight

    def _load(self, item: ReadItem) -> Tensor:
        place = self.metadata.storage_data[item.storage_index]
        with (self.folder / place.relative_path).open("rb") as file:
            window = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            saved: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        return saved[_slices(item.storage_offsets, item.lengths)]

    def _items(self, piece: ShardedTensor) -> list[ReadItem]:
        saved = self.metadata.state_dict_metadata.get(piece.key)
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"the checkpoint has no {piece.key}, which the model is made of; name the model it is of")
        region = _region(piece)
        if tuple(saved.size) != tuple(piece.global_shape):
            raise ValueError(
                f"the checkpoint's {piece.key} is {tuple(saved.size)}, the model's {tuple(piece.global_shape)}; name the "
                "model it is of"
            )
        items = create_read_items_for_chunk_list(piece.key, saved, [region])
        missing = math.prod(region.sizes) - sum(math.prod(item.lengths) for item in items)
        if missing:
            raise ValueError(
                f"{missing} numbers of {piece.key} are in no file of the checkpoint; restore it from a copy"
            )
        return items


class _OneByOne(DefaultSavePlanner):
    """Asks for each parameter when it is its turn, once, although it may lie in two pieces."""

    def __init__(self, make: Callable[[str], list[Tensor]], objects: Mapping[str, Any]) -> None:
        super().__init__()
        self.make, self.objects = make, objects
        self.places: dict[MetadataIndex, tuple[str, int, torch.Size]] = {}
        self.now: tuple[str, list[Tensor]] = ("", [])

    def items(self, name: str, parts: Sequence[ShardedTensor]) -> list[WriteItem]:
        """What is to be written of the parameter `name`."""
        items = []
        for number, piece in enumerate(parts):
            index = MetadataIndex(piece.key, torch.Size(piece.global_offset))
            region, properties = _region(piece), TensorProperties(dtype=piece.dtype)
            self.places[index] = (name, number, region.sizes)
            content = TensorWriteData(region, properties, torch.Size(piece.global_shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=content))
        return items

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], content)
            return content
        name, number, sizes = self.places[write_item.index]
        if self.now[0] != name:
            self.now = ("", [])  # before the next one is made
            self.now = (name, self.make(name))
        return self.now[1][number].view(sizes)


class _Writer(FileSystemWriter):
    """Does not say where it wrote to: a path in the table of contents is one more class for whoever reads it to trust."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class StreamedSave(TorchDistSaveShardedStrategy):
    """Writes parameters that are made when it is their turn, in files of at most `file_bytes` or one parameter.

    For `dist_checkpointing.save` of a state without memory (the meta device), whose tensors `make(name)` gives: the pieces
    of the parameter `name`, in their order. Beside them it writes Megatron's own objects: from core 0.19 on, what stands in
    common.pt before.
    """

    def __init__(self, make: Callable[[str], list[Tensor]], file_bytes: int) -> None:
        self.backend, self.version = "torch_dist", 1  # all of Megatron's that is left: its options differ by release
        self.make, self.file_bytes = make, file_bytes

    def save(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | Path) -> None:
        parts = nested_values(sharded_state_dict)
        objects = {part.unique_key: part.data for part in parts if isinstance(part, ShardedObject)}
        planner = _OneByOne(self.make, objects)
        plans = [SavePlan(items) for items in self._files(planner, sharded_state_dict["model"])]
        plans[0].items.extend(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects)
        plans, metadata = create_default_global_save_plan(plans)
        writer = _Writer(checkpoint_dir)
        writer.set_up_storage_writer(is_coordinator=True)
        results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
        writer.finish(metadata, results)

    def _files(self, planner: _OneByOne, state: Mapping[str, Any]) -> Iterator[list[WriteItem]]:
        items: list[WriteItem] = []
        size = 0
        for name, part in state.items():
            parts = list(nested_values({name: part}))
            nbytes = sum(piece.data.nbytes for piece in parts)
            if items and size + nbytes > self.file_bytes:
                yield items
                items, size = [], 0
            items += planner.items(name, parts)
            size += nbytes
        yield items
