"""The trainer's side of a weight update: completeness, files, and the calls a server gets."""

from __future__ import annotations

import asyncio
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout import weight_sync
from nemo_dapo.rollout.weight_sync import WeightStore, push_weights

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
EXPECTED = ExpectedWeights({"a": (2, 3), "b": (4,)})


@pytest.fixture
def store():
    opened = WeightStore(EXPECTED, 4)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([("a", WEIGHTS["a"])], "1 missing: b"),
        ([*WEIGHTS.items(), ("c", torch.ones(1))], "1 unexpected: c"),
        ([("a", torch.ones(3, 2)), ("b", WEIGHTS["b"])], r"1 of the wrong shape: a \(3, 2\) instead of \(2, 3\)"),
        ([*WEIGHTS.items(), ("a", WEIGHTS["a"])], "a was exported twice"),
        ([("c", torch.ones(1))], "2 missing: a, b; 1 unexpected: c"),
    ],
)
def test_every_parameter_must_be_sent_exactly_once_or_nothing_is_kept(store, stream, message):
    with pytest.raises(ValueError, match=message):
        store.write(stream, 1)
    assert list(store.folder.glob("*.safetensors")) == []


def test_the_files_hold_the_weights_bit_for_bit_and_only_the_newest(store):
    store.write([("a", torch.zeros(2, 3)), ("b", WEIGHTS["b"])], 1)
    files = store.write(WEIGHTS.items(), 2)
    assert sorted(files) == sorted(store.folder.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_files_go_when_the_export_fails_and_when_the_store_closes(store):
    def failing():
        yield "a", WEIGHTS["a"]
        raise RuntimeError("export")

    with pytest.raises(RuntimeError, match="export"):
        store.write(failing(), 1)
    assert list(store.folder.glob("*.safetensors")) == []
    store.write(WEIGHTS.items(), 2)
    store.close()
    assert not store.folder.exists()


def test_a_folder_that_somebody_cleaned_is_made_again_or_named_with_the_remedy(store, caplog):
    remedy = r"exclude .*/nemo_dapo_weights_\* from what cleans that folder"
    files = store.write(WEIGHTS.items(), 1)
    shutil.rmtree(store.folder)
    with pytest.raises(RuntimeError, match=f"version_1_00000.safetensors was removed: {remedy}"):
        store.require(files)
    assert all(file.exists() for file in store.write(WEIGHTS.items(), 2))
    assert "is made again" in caplog.text

    def cleaned():
        yield "a", WEIGHTS["a"]
        shutil.rmtree(store.folder)
        yield "b", WEIGHTS["b"]

    with pytest.raises(RuntimeError, match=f"was removed while it was written to: {remedy}"):
        store.write(cleaned(), 3)


def test_the_folder_is_private_and_in_shared_memory(store):
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    if weight_sync.SHARED_MEMORY.is_dir():
        assert store.folder.parent == weight_sync.SHARED_MEMORY


def test_a_full_or_absent_shared_memory_falls_back_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", tmp_path)
    assert weight_sync.roomy_folder(1) == tmp_path
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert weight_sync.roomy_folder(11) != tmp_path
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", tmp_path / "absent")
    assert weight_sync.roomy_folder(1) != tmp_path
    assert "0.00 GB free" in caplog.text
    assert "does not exist" in caplog.text


def server_with(routes: dict[str, httpx.Response], calls: list[str]) -> httpx.AsyncClient:
    """A server that answers 200 but for `routes`, and records the calls."""

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        default = httpx.Response(200, json={"weight_version": "4"})
        said = routes.get(request.url.path, default)
        return httpx.Response(said.status_code, stream=httpx.ByteStream(said.content))  # unread, as from a socket

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")


def push(client: httpx.AsyncClient, files: list[Path], version: int, deadline: float) -> None:
    asyncio.run(push_weights(client, files, version, deadline))


def test_an_update_pauses_first_reads_the_version_back_and_resumes_last():
    calls: list[str] = []
    push(server_with({}, calls), [Path("x")], 4, time.monotonic() + 10)
    assert calls[:3] == ["/pause", "/start_weight_update", "/update_weights"]
    assert calls.index("/finish_weight_update") < calls.index("/reset_prefix_cache") < calls.index("/weight_info")
    assert calls[-1] == "/resume"


def test_a_server_with_another_version_after_the_update_is_an_error():
    with pytest.raises(RuntimeError, match=r"has weights .*4.* after the update, not 5"):
        push(server_with({}, []), [Path("x")], 5, time.monotonic() + 10)


def test_a_server_that_refuses_the_weights_is_an_error_and_is_not_resumed():
    calls: list[str] = []
    client = server_with({"/update_weights": httpx.Response(500, text="size mismatch")}, calls)
    with pytest.raises(RuntimeError, match=r"/update_weights of http://server.* failed: HTTP 500 size mismatch"):
        push(client, [Path("x")], 4, time.monotonic() + 10)
    assert "/resume" not in calls


def test_a_server_too_old_for_sessions_and_versions_is_updated_without_them():
    absent = httpx.Response(404)
    old = dict.fromkeys(("/start_weight_update", "/finish_weight_update", "/update_weight_version"), absent)
    calls: list[str] = []
    push(server_with(old, calls), [Path("x")], 5, time.monotonic() + 10)
    assert "/update_weights" in calls
    assert calls[-1] == "/resume"


def test_an_update_past_its_deadline_stops():
    with pytest.raises(TimeoutError, match=r"no time left for /pause .*rollout.sync_timeout"):
        push(server_with({}, []), [Path("x")], 4, time.monotonic() - 1)


@pytest.mark.slow
def test_the_trainers_side_imports_without_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import nemo_dapo.rollout.engine\n"
        "assert not [name for name in sys.modules if name.startswith('vllm.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


OWNER = """
import sys, time
from pathlib import Path
from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout import weight_sync
weight_sync.SHARED_MEMORY = Path(sys.argv[1])
store = weight_sync.WeightStore(ExpectedWeights({"w": (2,)}), 4)
print(store.folder, flush=True)
time.sleep(987)
"""


def test_what_a_run_that_was_killed_left_in_memory_is_removed_by_the_next_and_a_living_run_s_is_not(
    tmp_path, monkeypatch
):
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        left, used = (Path(owner.stdout.readline().strip()) for owner in owners)  # type: ignore[union-attr]
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait()
        monkeypatch.setattr(weight_sync, "SHARED_MEMORY", tmp_path)
        store = WeightStore(EXPECTED, 4)
        assert not left.exists()
        assert used.exists()
        store.close()
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
