"""Starts the jobs of `policy_scenarios`, once a session, and hands their results to tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.policy_scenarios import MODELS, ROPE_THETA, SCENARIOS, UNEVEN, VOCAB
from tests.tiny import save_tiny_model

DEADLINE = 420.0  # seconds for all jobs; several times what two cores need


class PolicyRuns:
    """Results by world size, rank and scenario; the jobs start when the first test asks for one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[int, list[dict[str, Any]]] = {}
        for i, (name, options) in enumerate((MODELS | UNEVEN).items()):
            save_tiny_model(folder / "models" / name, rope_theta=ROPE_THETA, vocab=VOCAB, seed=i, **options)

    def get(self, world_size: int, scenario: str, rank: int = 0) -> Any:
        """What `scenario` returned on `rank`; fails the test, with the child's words, when it did not get that far."""
        if not self.results:
            self.run()
        results = self.results[world_size]
        if scenario not in results[rank]:
            said = [r["failed"] for r in results if "failed" in r] or [(self.folder / "log").read_text()[-5000:]]
            pytest.fail(f"scenario {scenario!r} did not finish on rank {rank} of {world_size}\n" + "\n".join(said))
        return results[rank][scenario]

    def run(self) -> None:
        """Run all jobs to their end or DEADLINE; nothing of them is left running."""
        # Not `-m`: saving a checkpoint spawns helpers, which import the main module (and torch with it) when it is a file.
        command = (
            f"from pathlib import Path; from tests import policy_scenarios as s; s.main(Path({str(self.folder)!r}))"
        )
        root = Path(__file__).parents[1]
        search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": search}
        with open(self.folder / "log", "wb") as log:
            parent = subprocess.Popen(
                [sys.executable, "-c", command],
                cwd=root,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            parent.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            log_end = f"\nended after {DEADLINE:.0f} s\n"
            (self.folder / "log").write_text((self.folder / "log").read_text() + log_end)
        finally:
            _end_group(parent)
        for world_size in SCENARIOS:
            files = [self.folder / f"world{world_size}-rank{rank}.pt" for rank in range(world_size)]
            # weights_only=False: our own children wrote them, paths and all.
            self.results[world_size] = [torch.load(f, weights_only=False) if f.exists() else {} for f in files]


def _end_group(parent: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended, and all that it started
        os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
