"""`rollout.json` in the run's folder: where the hub is reached, what it is shown, and what a serving node must provide."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

TOKEN_VARIABLE = "NEMO_DAPO_ROLLOUT_TOKEN"
RUN_FILE = "rollout.json"


@dataclass(frozen=True)
class Door:
    """How an agent finds the hub and is recognised, and what it will have to hold."""

    addresses: list[str]  # HOST:PORT each, the likeliest first
    token: str
    lease: float  # seconds
    weight_bytes: int  # of one version


def choose_token() -> str:
    """As the environment gives it, else a random one."""
    return os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)


def write_run_file(run_dir: Path, door: Door) -> Path:
    """For the user's eyes alone. Written anew at each start."""
    path = run_dir / RUN_FILE
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(door), file)
    os.replace(beside, path)
    return path


def read_run_file(path: Path) -> Door:
    """Raises OSError or ValueError where the file is not there, not whole, or not this one."""
    said = json.loads(path.read_text())
    try:
        addresses = [str(address) for address in said["addresses"]]
        return Door(addresses, str(said["token"]), float(said["lease"]), int(said["weight_bytes"]))
    except (KeyError, TypeError) as problem:
        raise ValueError(f"{path} is no {RUN_FILE} of a run") from problem
