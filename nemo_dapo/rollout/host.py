"""What a serving node knows of itself: its name, its GPUs, what its servers' environment and the model's folder hold."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_dapo
from nemo_dapo.config import RolloutConfig
from nemo_dapo.hf_folder import fingerprint
from nemo_dapo.rollout.environment import for_interpreter
from nemo_dapo.rollout.messages import Plan, Report

PROBE_SECONDS = 120.0  # a first Python start on a cold network file system


def node_name() -> str:
    """Slurm's name of this host, else its own: two processes are on one host when these are equal."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gpu_uuids(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as `nvidia-smi` names them; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    if done.returncode:
        return []
    return visible(done.stdout.split(), environment.get("CUDA_VISIBLE_DEVICES"))


def visible(uuids: Sequence[str], setting: str | None) -> list[str]:
    """Those of `uuids` that CUDA_VISIBLE_DEVICES=`setting` leaves: numbers, UUIDs or the beginnings of UUIDs.

    As CUDA reads it: the first entry that names no device ends the list.
    """
    if setting is None:
        return list(uuids)
    found: list[str] = []
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        if entry.isdigit():
            named = list(uuids[int(entry) : int(entry) + 1])
        else:
            named = [uuid for uuid in uuids if uuid.startswith(entry)]
        if len(named) != 1:
            break
        found += named
    return found


def gpus_each(vllm: Mapping[str, Any]) -> int:
    """GPUs that one server with these options takes, by vLLM's names of them."""
    sizes = (vllm.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline", "data"))
    tensor, pipeline, data = map(int, sizes)
    return tensor * pipeline * data


def share_gpus(uuids: Sequence[str], servers: int, each: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of `servers`: `each` GPUs, no GPU twice. Raises ValueError where they do not suffice."""
    if len(uuids) < servers * each:
        raise ValueError(
            f"rollout.num_servers={servers} with {each} GPU(s) each need {servers * each} GPUs, it has {len(uuids)}: lower "
            "num_servers or rollout.vllm.tensor_parallel_size, start the agent with more GPUs, or say by "
            "rollout.visible_devices which ones servers share"
        )
    return [",".join(uuids[each * i : each * (i + 1)]) for i in range(servers)]


def look(plan: Plan, config: RolloutConfig, address: str) -> tuple[Report, bool]:
    """What this node has of what `plan` needs, and whether its servers run on a CPU. Reads pieces of all weight files."""
    problems: list[str] = []
    try:
        has = probed(config.python or sys.executable)
    except ValueError as problem:
        problems.append(str(problem))
        has = {"package": nemo_dapo.__version__, "vllm": "", "torch": "", "nccl": ""}
    if has["package"] != nemo_dapo.__version__:
        problems.append(
            f"the environment of rollout.python has nemo_dapo {has['package']} there, the agent {nemo_dapo.__version__}: "
            "`pip install --no-deps` this version into it"
        )
    model: dict[str, Any] = {}
    try:
        model = fingerprint(Path(plan.model_path))
    except (OSError, ValueError) as problem:
        problems.append(
            f"model.path={plan.model_path} cannot be read there ({problem}): copy the model to every node under this path, "
            "or name a folder that all of them see"
        )
    report = Report(address=address, vllm=has["vllm"], nccl=has["nccl"], model=model, problems=problems)
    return report, has["torch"].endswith("+cpu")


def probed(python: str) -> dict[str, str]:
    """Versions in the environment of the interpreter `python`; raises ValueError where it cannot be run."""
    try:
        done = subprocess.run(
            [python, "-m", "nemo_dapo.rollout.probe"],
            env=for_interpreter(python, os.environ),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        said = str(getattr(problem, "stderr", None) or problem).strip().splitlines()[-1]
        raise ValueError(
            f"rollout.python={python} cannot say what it has ({said}): name an interpreter that every serving node has "
            "under this path, in whose environment vLLM and this package (`pip install --no-deps`) are installed"
        ) from problem
