"""The run's folder is the only one that all of its hosts must share, and whether they do is found out before it matters."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch.distributed as dist

from nemo_dapo.collectives import gather_json
from nemo_dapo.coordination import found_alike

SECONDS = 10.0  # for a network file system to show what another host has just written
LOOK_SECONDS = 0.2


def require_shared(folder: Path, hosts: list[str], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError, on every rank, that names the hosts which have another `folder` than rank 0. Collective.

    `hosts` holds each rank's host.
    """
    name = f".seen_by_all_{secrets.token_hex(8)}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    mark = folder / gather_json(name, group)[0]  # also: rank 0 has written it
    sights = gather_json(_sees(mark), group)
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
    if blind := sorted({host for host, sees in zip(hosts, sights, strict=True) if not sees}):
        raise found_alike(
            ValueError(
                f"output_dir={folder} is another folder on {', '.join(blind)} than on {hosts[0]}, where rank 0 runs: name "
                "one on a file system that all hosts of the run see"
            )
        )


def _sees(mark: Path) -> bool:
    deadline = time.monotonic() + SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True
