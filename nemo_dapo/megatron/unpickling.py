"""Checkpoints without unpickling: what another wrote must not choose what this process calls.

`torch.distributed.checkpoint` keeps its table of contents, `.metadata`, as a pickle, and reads objects in shards by
`torch.load(weights_only=False)` (seen in torch 2.13: FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes). A
pickle names functions and has them called.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta

# What a table of contents is made of: records of torch, and names of data types. None of them does anything when called.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"}
    | {str(kind).removeprefix("torch.") for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
    "collections": {"OrderedDict"},
}


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of ALLOWED and no other name. Raises UnpicklingError for one."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which no checkpoint of this program does: whoever wrote it wants that called"
        )


def read_metadata(file: BinaryIO) -> Metadata:
    """The table of contents in `file`. Raises UnpicklingError, and calls nothing, for one that holds anything else."""
    metadata = MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__} instead of torch's Metadata")
    return metadata


@contextmanager
def nothing_is_unpickled() -> Iterator[None]:
    """Within, checkpoints are read by `read_metadata`, and every `torch.load` takes tensors and plain values only."""
    kept_read, kept_load = FileSystemReader.read_metadata, torch.load

    def read(reader: Any) -> Metadata:
        with (reader.path / ".metadata").open("rb") as file:
            metadata = read_metadata(file)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = reader.load_id
        return metadata

    def load(*args: Any, **options: Any) -> Any:
        try:
            return kept_load(*args, **(options | {"weights_only": True}))
        except pickle.UnpicklingError as error:  # a page of advice, with the name in it
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it names {named[1]}" if named else "it holds something else"
            raise pickle.UnpicklingError(f"{what} where only tensors and plain values belong") from None

    FileSystemReader.read_metadata, torch.load = read, load  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystemReader.read_metadata, torch.load = kept_read, kept_load  # type: ignore[method-assign]
