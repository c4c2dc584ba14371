"""Trainer's side of a weight update: write the exported weights to host memory once, then tell every server to load them.

    write (servers go on generating) -> check names and shapes -> pause -> load -> set version -> resume -> read back

Nothing reaches a server before the whole export is known to be complete. The files of the newest version stay until the
next one is written: a server that died is restarted with them while the trainer's ranks are busy elsewhere, which costs
one copy of the model in host memory. vLLM is not imported here; the server's side is `vllm_plugin.py`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import httpx
from safetensors.torch import save_file
from torch import Tensor

from nemo_dapo.hf_folder import ExpectedWeights, buckets, check_weights
from nemo_dapo.rollout.control import Reply, call
from nemo_dapo.telemetry.escape import printable

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 1 << 30  # of one file: bounds the copy that is made while writing
SPACE_MARGIN = 1.05
PREFIX, LOCK = "nemo_dapo_weights_", ".lock"


class WeightStore:
    """The newest weights as safetensors files in a private folder (0700) in host memory, or on disk where that is full.

    The folder is locked for as long as this process lives: one that can be locked was left by a run that is dead, all of
    whose processes were killed at once, and is removed when the next store is made on the same host.
    """

    def __init__(self, expected: ExpectedWeights, bytes_per_element: int) -> None:
        needed = int(expected.num_elements * bytes_per_element * SPACE_MARGIN)
        self.expected = expected
        for place in (SHARED_MEMORY, Path(tempfile.gettempdir())):
            remove_left_folders(place)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=roomy_folder(needed)))
        self._lock = lock(self.folder)

    def write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> list[Path]:
        """Replace the stored weights by `weights`; returns the files in the order of the stream.

        Raises ValueError unless every expected parameter comes exactly once in its shape; then nothing is kept.
        """
        if not self.folder.is_dir():
            log.warning("%s was removed and is made again: %s", self.folder, self._remedy())
            self._lock.close()
            self.folder.mkdir(0o700)
            self._lock = lock(self.folder)
        self._clear()  # first: two versions at once would take twice the memory
        files: list[Path] = []
        sent: dict[str, tuple[int, ...]] = {}
        try:
            for number, bucket in enumerate(buckets(weights, BUCKET_BYTES)):
                file = self.folder / f"version_{version}_{number:05d}.safetensors"
                files.append(file)
                save_file(bucket, file)
                sent |= {name: tuple(tensor.shape) for name, tensor in bucket.items()}
            check_weights(sent, self.expected)
        except BaseException as error:
            self._clear()
            if isinstance(error, Exception) and not self.folder.is_dir():
                raise RuntimeError(f"{self.folder} was removed while it was written to: {self._remedy()}") from error
            raise
        return files

    def require(self, files: Iterable[Path]) -> None:
        """Raises RuntimeError, which says what to do, where somebody removed one of `files`."""
        if gone := [file for file in files if not file.exists()]:
            raise RuntimeError(f"{gone[0]} was removed: {self._remedy()}")

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _clear(self) -> None:
        for file in self.folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)

    def _remedy(self) -> str:
        return (
            f"exclude {self.folder.parent}/{PREFIX}* from what cleans that folder (a cron job, systemd-tmpfiles, or "
            "RemoveIPC=yes in logind.conf, which empties /dev/shm when its user logs out)"
        )


def lock(folder: Path) -> TextIO:
    """The open file that holds the lock of `folder`."""
    held = (folder / LOCK).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    return held


def remove_left_folders(place: Path) -> None:
    """Remove what dead runs of this user left under `place`: a folder whose lock is free has no owner any more."""
    for folder in place.glob(f"{PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                log.warning("removed %s, which a run that was killed had left in memory", folder)
        except OSError:  # locked by a run that lives, just being made, or just gone
            continue


def roomy_folder(needed: int) -> Path:
    """/dev/shm where it has `needed` bytes free, else, with a warning, the folder for temporary files."""
    fallback = Path(tempfile.gettempdir())
    if not SHARED_MEMORY.is_dir():
        log.warning("%s does not exist: weights go through %s, which is slower", SHARED_MEMORY, fallback)
        return fallback
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= needed:
        return SHARED_MEMORY
    log.warning(
        "%s has %.2f GB free and the weights need %.2f GB: they go through %s, which is slower (in Docker: --shm-size)",
        SHARED_MEMORY,
        free / 1e9,
        needed / 1e9,
        fallback,
    )
    return fallback


async def push_weights(
    http: httpx.AsyncClient, files: Iterable[Path], version: int, deadline: float, *, resume: bool = True
) -> None:
    """Make one server load `files` as weight version `version` and check that it says so.

    Requests in flight are frozen, not aborted: their key-value cache is dropped and recomputed with the new weights, and
    the spans of their samples name both versions. Without `resume` the server stays paused. `deadline` is of
    time.monotonic(). Raises RuntimeError when the server refuses a call or ends up with another version, ServerDiedError or
    httpx.TransportError when it is gone, TimeoutError when it is late.
    """
    await pause(http, deadline)
    await call(http, "POST", "/start_weight_update", deadline, may_be_absent=True)
    update = {"update_info": {"paths": [str(file) for file in files]}}
    await call(http, "POST", "/update_weights", deadline, json=update)
    await call(http, "POST", "/finish_weight_update", deadline, json={}, may_be_absent=True)
    await call(http, "POST", "/reset_prefix_cache", deadline, params={"reset_running_requests": "true"})
    # The version last: tokens carry it only once the weights and the cache are the new ones.
    await set_version(http, version, deadline)
    if resume:
        await call(http, "POST", "/resume", deadline)


async def pause(http: httpx.AsyncClient, deadline: float) -> None:
    """Freeze the requests of a server, those to come too; it may be paused already."""
    await call(http, "POST", "/pause", deadline, params={"mode": "keep"})


async def set_version(http: httpx.AsyncClient, version: int, deadline: float) -> None:
    """Set the weight version of a server and read it back; nothing on a server too old to have one."""
    body = {"new_version": str(version)}
    if await call(http, "POST", "/update_weight_version", deadline, json=body, may_be_absent=True) is None:
        return
    reply = await call(http, "GET", "/weight_info", deadline)
    if reply is None or said_version(reply) != str(version):
        said = reply and printable(reply.text, 200)
        raise RuntimeError(f"{http.base_url} has weights {said} after the update, not {version}")


def said_version(reply: Reply) -> str | None:
    try:
        return str(json.loads(reply.body)["weight_version"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


async def reports_versions(http: httpx.AsyncClient, deadline: float) -> bool:
    """Whether the server knows weight versions at all; vLLM 0.20 does not."""
    return await call(http, "GET", "/weight_info", deadline, may_be_absent=True) is not None
