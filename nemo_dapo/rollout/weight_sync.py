"""Trainer's side of a weight update: write the exported weights to host memory once, then tell every server to load them.

    write (servers go on generating) -> check names and shapes -> pause -> load -> set version -> resume -> read back

Nothing reaches a server before the whole export is known to be complete. The files of the newest version stay until the
next one is written: a server that died is restarted with them while the trainer's ranks are busy elsewhere, which costs
one copy of the model in host memory. vLLM is not imported here; the server's side is `vllm_plugin.py`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import httpx
from safetensors.torch import save_file
from torch import Tensor

from nemo_dapo.hf_folder import ExpectedWeights, buckets, check_weights

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 1 << 30  # of one file: bounds the copy that is made while writing
SPACE_MARGIN = 1.05


class WeightStore:
    """The newest weights as safetensors files in a private folder (0700) in host memory, or on disk where that is full."""

    def __init__(self, expected: ExpectedWeights, bytes_per_element: int) -> None:
        needed = int(expected.num_elements * bytes_per_element * SPACE_MARGIN)
        self.expected = expected
        self.folder = Path(tempfile.mkdtemp(prefix="nemo_dapo_weights_", dir=roomy_folder(needed)))

    def write(self, weights: Iterable[tuple[str, Tensor]], version: int) -> list[Path]:
        """Replace the stored weights by `weights`; returns the files in the order of the stream.

        Raises ValueError unless every expected parameter comes exactly once in its shape; then nothing is kept.
        """
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
        except BaseException:
            self._clear()
            raise
        return files

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clear(self) -> None:
        for file in self.folder.glob("*.safetensors"):
            file.unlink()


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


def push_weights(client: httpx.Client, files: Iterable[Path], version: int, deadline: float) -> None:
    """Make one server load `files` as weight version `version` and check that it says so.

    Requests in flight are frozen, not aborted: their key-value cache is dropped and recomputed with the new weights, and
    the spans of their samples name both versions. `deadline` is of time.monotonic(). Raises RuntimeError when the server
    refuses a call or ends up with another version, httpx.TransportError when it is gone or late.
    """
    call(client, "POST", "/pause", deadline, params={"mode": "keep"})
    call(client, "POST", "/start_weight_update", deadline, may_be_absent=True)
    update = {"update_info": {"paths": [str(file) for file in files]}}
    call(client, "POST", "/update_weights", deadline, json=update)
    call(client, "POST", "/finish_weight_update", deadline, json={}, may_be_absent=True)
    call(client, "POST", "/reset_prefix_cache", deadline, params={"reset_running_requests": "true"})
    # The version last: tokens carry it only once the weights and the cache are the new ones.
    set_version(client, version, deadline)
    call(client, "POST", "/resume", deadline)


def set_version(client: httpx.Client, version: int, deadline: float) -> None:
    """Set the weight version of a server and read it back; nothing on a server too old to have one."""
    body = {"new_version": str(version)}
    if call(client, "POST", "/update_weight_version", deadline, json=body, may_be_absent=True) is None:
        return
    answer = call(client, "GET", "/weight_info", deadline)
    if answer is None or answer.json()["weight_version"] != str(version):
        raise RuntimeError(f"{client.base_url} has weights {answer and answer.text} after the update, not {version}")


def reports_versions(client: httpx.Client, deadline: float) -> bool:
    """Whether the server knows weight versions at all; vLLM 0.20 does not."""
    return call(client, "GET", "/weight_info", deadline, may_be_absent=True) is not None


def call(
    client: httpx.Client,
    method: str,
    route: str,
    deadline: float,
    *,
    params: Mapping[str, str] | None = None,
    json: Mapping[str, object] | None = None,
    may_be_absent: bool = False,
) -> httpx.Response | None:
    """One call of the server's control routes; None when it has no such route and `may_be_absent`."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError(f"no time left for {route} of {client.base_url}; raise rollout.sync_timeout")
    response = client.request(method, route, params=params, json=json, timeout=remaining)
    if response.status_code == 404 and may_be_absent:
        return None
    if response.status_code != 200:
        raise RuntimeError(f"{route} of {client.base_url} failed: HTTP {response.status_code} {response.text[:500]}")
    return response
