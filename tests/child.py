"""Modules of this folder that run in a process of their own: Megatron and vLLM stay out of the pytest process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300


def run_module(name: str, folder: Path) -> str:
    """Run `tests.<name>` on `folder`, on the CPU with one thread; returns what it printed. Fails with the end of that."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{name}", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
