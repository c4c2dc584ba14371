"""What stands in a run's checkpoint, for tests that compare two of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp


def tensors(run_dir: Path, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint whose name starts so: weights, fp32 copies, Adam's moments."""
    reader = dcp.FileSystemReader(run_dir / "checkpoints" / f"step_{step:06d}" / "policy")
    found = reader.read_metadata().state_dict_metadata
    names = [name for name, kind in found.items() if name.startswith(prefix) and hasattr(kind, "size")]
    loaded = {name: torch.empty(found[name].size, dtype=found[name].properties.dtype) for name in names}
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    return loaded
