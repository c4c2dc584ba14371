"""What stands in a run's checkpoint, for tests that compare two of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors(run_dir: Path, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint whose name starts so: weights, fp32 copies, Adam's moments."""
    reader = dcp.FileSystemReader(run_dir / "checkpoints" / f"step_{step:06d}" / "policy")
    loaded = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(kind, TensorStorageMetadata)
    }
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    return loaded


def differing(first: Path, second: Path) -> list[str]:
    """Names of the files that two policies on disk do not both hold, byte for byte; but the index, in which a random name
    and its place stand, by what it says of tensors, and the pickled options, in which equal strings of a resumed run are
    several objects, by their values."""
    names = {file.name for folder in (first, second) for file in folder.iterdir()}
    return sorted(name for name in names if not _is_alike(first / name, second / name))


def _is_alike(first: Path, second: Path) -> bool:
    if not (first.exists() and second.exists()):
        return False
    if first.name == ".metadata":
        one, other = (dcp.FileSystemReader(file.parent).read_metadata() for file in (first, second))
        return (one.state_dict_metadata, one.storage_data) == (other.state_dict_metadata, other.storage_data)
    if first.name == "common.pt":
        one, other = (torch.load(file, weights_only=False) for file in (first, second))
        return bool(one == other)
    return first.read_bytes() == second.read_bytes()
