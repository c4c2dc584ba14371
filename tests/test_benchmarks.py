"""The benchmarks that need neither GPU nor vLLM still run, at a small size; what they measure is no matter of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "--groups 4 --group 4 --tokens 3000 --in-flight 16 --replicas 3 --servers 2 --ranks 2 --frames-per-second 0"


def test_the_controller_s_cost_is_measured_from_socket_to_microbatches() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "controller.py"), *SMALL.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tokens"] == 4 * 4 * 3000
    assert (
        8 < said["bytes_per_token"] < 9
    )  # ids and log-probabilities are 8; frames of 1,024 tokens add a few bytes each
    assert min(said["cpu_seconds"], said["peak_gib"], said["longest_block_ms"]) > 0
