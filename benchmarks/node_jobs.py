"""Jobs under a Slurm of hosts that are made on this machine: what nodes.py and node_faults.py share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.cluster import Cluster, Job, why_not  # noqa: E402
from tests.cluster.small_run import environment  # noqa: E402

MAX_CHANCE_TOKENS = 2
PACKAGES = ("slurm-wlm", "munge", "iproute2")


@dataclass(frozen=True)
class Layout:
    """`training` hosts with `ranks` ranks each, then `serving` hosts; 0 of these: servers share the trainers' hosts."""

    training: int
    ranks: int = 1
    serving: int = 0

    def __str__(self) -> str:
        return f"{'dedicated' if self.serving else 'colocated'}:{self.hosts}"

    @property
    def hosts(self) -> int:
        return self.training + self.serving


DEDICATED = Layout(training=1, serving=2)


def install() -> None:
    """Debian's Slurm, where this is root's to do; SystemExit with the reason where there can be no cluster."""
    missing = why_not()
    if "apt-get" in missing and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"== installing {' '.join(PACKAGES)} (apt-get)", flush=True)
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "check": True}
        subprocess.run(["apt-get", "update"], **quiet)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], env=environment, **quiet)
        missing = why_not()
    if missing:
        raise SystemExit(f"no cluster can be made here: {missing}")


def submit(cluster: Cluster, layout: Layout, folder: Path, *arguments: str) -> Job:
    """The job of a layout, by the job file that a user would take."""
    env = environment(folder, folder / "run") | {
        "NODES_FOLDER": str(folder),
        "SCRIPT": "benchmarks/watched_job.py",
        "RANKS_PER_NODE": str(layout.ranks),
        "SERVING": str(layout.serving),
    }
    file = "examples/slurm/dedicated.sbatch" if layout.serving else "examples/slurm/colocated.sbatch"
    return cluster.sbatch(f"--nodes={layout.hosts}", f"--output={folder / 'console'}", file, *arguments, env=env)


def submit_serving(cluster: Cluster, folder: Path) -> Job:
    """A serving node more for the run in that folder."""
    env = environment(folder, folder / "run") | {"NODES_FOLDER": str(folder)}
    return cluster.sbatch(f"--output={folder / 'console_of_serving'}", "examples/slurm/serve.sbatch", env=env)


def counted(rollouts: Path, steps: int, a_step: int) -> tuple[int, int]:
    """Samples missing from, and samples twice among, what the steps were trained on.

    Random tokens coincide by chance only in the shortest answers, about once in two hundred steps: these are left out.
    """
    columns = ["uid", "group", "token_ids"]
    rows = [
        row for path in sorted(rollouts.glob("*.parquet")) for row in pq.read_table(path, columns=columns).to_pylist()
    ]
    seen = Counter((row["uid"], row["group"], tuple(row["token_ids"])) for row in rows)
    twice = sum(times - 1 for (_, _, token_ids), times in seen.items() if len(token_ids) > MAX_CHANCE_TOKENS)
    return steps * a_step - len(rows), twice
