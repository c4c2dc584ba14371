"""Ranks of a job as forks of one process, which has imported Megatron for all of them."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from nemo_dapo import garbage

Jobs = list[tuple[Any, tuple[Any, ...]]]  # a function and its arguments for each rank


def import_megatron() -> None:
    """Once (8 s of one core): forks share it. No collection in them visits its million objects, half a second each."""
    from nemo_dapo.megatron import cpu

    cpu.install()
    from nemo_dapo.megatron import policy, weights

    assert policy is not None
    weights._import_bridge()
    garbage.spare_what_is_here()


def run_to_their_end(jobs: Jobs) -> bool:
    """Whether all did what they were to do. Once one fails the others, which may wait for it, are killed."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=target, args=arguments) for target, arguments in jobs]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
        time.sleep(0.02)
    failed = any(process.exitcode for process in ranks)
    for process in ranks:
        process.kill()  # a no-op on those that have ended
        process.join()
    return not failed


def fork_ranks(jobs: Jobs, folder: Path) -> None:
    """Raises RuntimeError, with what they left in `folder`/failed-*, when one fails."""
    if not run_to_their_end(jobs):
        raise RuntimeError("\n".join(file.read_text() for file in sorted(folder.glob("failed-*"))) or "a rank failed")
