"""A checkpoint is one directory: the policy's shards and `state.json` with everything else a run needs to go on.

It is written beside its place and renamed into it: a directory called `step_*` is complete, whenever the job was killed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_dapo.interfaces import Policy

FORMAT = 1


def latest(directory: Path) -> int | None:
    """Rollout step of the newest complete checkpoint under `directory`; None when there is none."""
    steps = _steps(directory)
    return steps[-1] if steps else None


def save(directory: Path, step: int, policy: Policy, state: Mapping[str, Any] | None, *, keep: int, group: Any) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`. Collective; `state` (JSON) is rank 0's."""
    place, beside = directory / _name(step), directory / f".{_name(step)}.writing"
    if dist.get_rank() == 0:
        _clean(directory)
        (beside / "policy").mkdir(parents=True)
    dist.barrier(group=group)
    policy.save(beside / "policy")
    dist.barrier(group=group)
    if dist.get_rank() == 0:
        _write_durably(beside / "state.json", json.dumps({"format": FORMAT, "step": step} | dict(state or {})))
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
        _sync_directory(directory)
        for old in _steps(directory)[:-keep]:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
            os.replace(directory / _name(old), directory / f".{_name(old)}.removing")
        _clean(directory)
    dist.barrier(group=group)
    return place


def load(directory: Path, step: int, policy: Policy) -> dict[str, Any]:
    """Restore the policy from the checkpoint of `step` and return its state. Collective.

    Raises ValueError for a format that this version does not read.
    """
    place = directory / _name(step)
    state: dict[str, Any] = json.loads((place / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{place} has checkpoint format {state.get('format')}, expected {FORMAT}; resume with the version that wrote "
            "it, or start anew with checkpoint.resume=never"
        )
    policy.load(place / "policy")
    return state


def set_aside(directory: Path) -> Path | None:
    """Move the checkpoints of an earlier run away, and say where to: `keep` would count them among the newest ones."""
    if latest(directory) is None:
        return None
    numbers = itertools.count(1)
    place = next(p for n in numbers if not (p := directory.with_name(f"{directory.name}.previous{n}")).exists())
    return directory.rename(place)


def _clean(directory: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for left in directory.glob(".step_*"):
        shutil.rmtree(left)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _steps(directory: Path) -> list[int]:
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in directory.glob("step_*")]
    return sorted(int(match.group(1)) for match in found if match)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
