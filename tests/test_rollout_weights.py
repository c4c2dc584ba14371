"""The way of the weights: what is exported must be the served model, arrive bit by bit, and be loaded as one version."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout.weights import store as store_module
from nemo_dapo.rollout.weights.checksum import PAGE, WORD, checksum
from nemo_dapo.rollout.weights.ledger import Ledger, NoWeightsError
from nemo_dapo.rollout.weights.pack import as_bytes, tensor_checksum
from nemo_dapo.rollout.weights.plan import Delivery, Outcome, Place, Sent, UpdatePlan, assign
from nemo_dapo.rollout.weights.push import Held, push_weights
from nemo_dapo.rollout.weights.read import read_weights, require_unchanged
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.rollout.weights.store import DATA, TABLE, WeightStore, read_table
from nemo_dapo.rollout.weights.table import Entry, Table, check_places, parse
from nemo_dapo.rollout.weights.verify import require_whole

NAMES = ["embed", "scale", "odd", "empty", "wide"]
EXPECTED = ExpectedWeights({"embed": (7, 33), "scale": (), "odd": (3, 5), "empty": (0, 4), "wide": (700, 3)})


def weights(version: int = 1) -> dict[str, torch.Tensor]:
    """Of every awkward kind: a scalar, an odd size, none at all, one larger than a piece, one that is not contiguous."""
    generator = torch.Generator().manual_seed(version)
    random = {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.shapes.items()}
    random["wide"] = random["wide"].T.contiguous().T
    return {name: tensor.to(torch.bfloat16) for name, tensor in random.items()}


@pytest.fixture
def store():
    opened = WeightStore(1, "here")
    yield opened
    opened.close()


@pytest.fixture
def sender():
    one = Sender(lambda: EXPECTED, piece_bytes=1024)
    yield one
    one.close()


def plan_for(*places: Place, version: int = 1, seconds: float = 30.0) -> UpdatePlan:
    return UpdatePlan(version, "bfloat16", seconds, "token", tuple(Delivery(0, place) for place in places))


def sent_to(store: WeightStore, sender: Sender, version: int = 1) -> str:
    """The digest of a version that was sent into `store`."""
    (outcome,) = sender.send(weights(version).items(), plan_for(store.place(), version=version), 0).outcomes
    assert not outcome.fault
    return outcome.digest


# -------------------------------------------------------------------- what is sent


def faulty_streams() -> dict[str, tuple[list[tuple[str, torch.Tensor]], str]]:
    good = weights()
    without = [(name, one) for name, one in good.items() if name != "odd"]
    turned, other = good["embed"].T, torch.ones(1, dtype=torch.bfloat16)
    return {
        "missing": (without, "1 missing: odd"),
        "unexpected": ([*good.items(), ("new", other)], "1 unexpected: new"),
        "misnamed": ([*without, ("odds", good["odd"])], "1 missing: odd; 1 unexpected: odds"),
        "doubled": ([*good.items(), ("odd", good["odd"])], "odd was exported twice"),
        "of another shape": (list((good | {"embed": turned}).items()), r"embed \(33, 7\) instead of \(7, 33\)"),
        "of another dtype": (list((good | {"odd": good["odd"].half()}).items()), "odd float16 instead of bfloat16"),
        "nothing": ([], "5 missing: embed, empty, odd, scale, wide"),
    }


@pytest.mark.parametrize("kind", faulty_streams())
def test_an_export_that_is_not_the_served_model_is_refused_by_name_and_nothing_can_be_loaded(kind, store, sender):
    stream, message = faulty_streams()[kind]
    sent_to(store, sender, version=1)
    exported = iter(stream)
    ledger = Ledger(lambda: [store.place()], "bfloat16")
    sent = sender.send(exported, ledger.begin(2, ["here"], 30.0), 0)
    assert next(exported, None) is None  # the export is collective: whoever refuses still takes part to the end
    with pytest.raises(ValueError, match=message), ledger.finish([sent]):
        raise AssertionError
    with pytest.raises(NoWeightsError), ledger.loading("here"):
        raise AssertionError
    assert not (store.folder / TABLE).exists()


def test_a_parameter_may_come_in_the_dtype_that_the_folder_has_it_in(store):
    expected = ExpectedWeights({"bias": (4,)}, dtypes={"bias": "float32"})
    for dtype, refused in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        sent = Sender(lambda: expected).send([("bias", torch.ones(4, dtype=dtype))], plan_for(store.place()), 0)
        assert bool(sent.refusal) == refused


@pytest.mark.parametrize("piece_bytes", [64, 192, 1024, 1 << 20])
def test_what_is_loaded_is_what_was_exported_bit_by_bit_and_only_the_newest(piece_bytes, store):
    sender = Sender(lambda: EXPECTED, piece_bytes)
    for version in (1, 2):
        digest = sent_to(store, sender, version)
        loaded = dict(read_weights(store.folder, version, digest))
        assert list(loaded) == list(weights())
        for name, tensor in weights(version).items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    with pytest.raises(ValueError, match="holds weights of version 2, announced was 1"):
        list(read_weights(store.folder, 1, digest))


def test_a_rank_without_a_destination_takes_part_and_sends_nothing(sender):
    exported = iter(weights().items())
    assert sender.send(exported, plan_for(), 0) == Sent()
    assert next(exported, None) is None


def test_an_exporter_may_use_its_memory_again(store, sender):
    reused = torch.empty(700 * 3, dtype=torch.bfloat16)

    def exported():
        for name, tensor in weights().items():
            view = reused[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    (outcome,) = sender.send(exported(), plan_for(store.place()), 0).outcomes
    loaded = dict(read_weights(store.folder, 1, outcome.digest))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


def test_an_error_of_the_export_itself_is_no_refusal(store, sender):
    def failing():
        yield "embed", weights()["embed"]
        raise ArithmeticError("export")

    with pytest.raises(ArithmeticError, match="export"):
        sender.send(failing(), plan_for(store.place()), 0)
    assert not (store.folder / TABLE).exists()


# -------------------------------------------------------------------- what is loaded


READERS = [lambda *what: list(read_weights(*what)), require_whole]  # that loads, and that looks before
by_both = pytest.mark.parametrize("read", READERS, ids=["load", "look"])


@by_both
@pytest.mark.parametrize("name", ["embed", "scale", "odd", "wide"])
def test_a_flipped_bit_is_refused_with_the_name_of_its_tensor(name, read, store, sender):
    digest = sent_to(store, sender)
    entry = next(one for one in read_table(store.folder).entries if one.name == name)
    data = bytearray((store.folder / DATA).read_bytes())
    data[entry.offset + entry.nbytes // 2] ^= 16
    (store.folder / DATA).write_bytes(data)
    with pytest.raises(ValueError, match=f"parameter {name} has other bytes than were sent"):
        read(store.folder, 1, digest)


@by_both
def test_a_truncated_file_is_refused_with_the_name_of_the_tensor_that_is_cut(read, store, sender):
    digest = sent_to(store, sender)
    entry = read_table(store.folder).entries[2]
    with (store.folder / DATA).open("r+b") as file:
        file.truncate(entry.offset + entry.nbytes - 1)
    with pytest.raises(ValueError, match=f"parameter {entry.name} is cut off"):
        read(store.folder, 1, digest)


@by_both
def test_a_table_other_than_the_announced_one_is_refused(read, store, sender):
    digest = sent_to(store, sender)
    with pytest.raises(ValueError, match="holds weights of version 1, announced was 2"):
        read(store.folder, 2, digest)
    table = read_table(store.folder)
    (store.folder / TABLE).write_text(Table(1, table.entries[1:]).render())
    with pytest.raises(ValueError, match="not the one that was announced"):
        read(store.folder, 1, digest)


def test_who_was_still_reading_when_the_next_version_was_begun_learns_of_it(store, sender):
    digest = sent_to(store, sender)
    reading = read_weights(store.folder, 1, digest)
    next(reading)
    require_unchanged(store.folder, digest)
    sent_to(store, sender, version=2)
    with pytest.raises(RuntimeError, match="was written to while it was read"):
        require_unchanged(store.folder, digest)


@by_both
@pytest.mark.parametrize("gone", [TABLE, DATA])
def test_what_somebody_removed_is_named_with_the_remedy_and_comes_again_with_the_next_version(
    gone, read, store, sender
):
    digest = sent_to(store, sender)
    (store.folder / gone).unlink()
    with pytest.raises(RuntimeError, match=rf"{gone} is not there: exclude .*/nemo_dapo_weights_\* from what cleans"):
        read(store.folder, 1, digest)
    digest = sent_to(store, sender, version=2)
    read(store.folder, 2, digest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a"}, "parameter a of the table of weights comes twice"),
        ({"dtype": "complex64"}, "parameter b of the table of weights has dtype 'complex64'"),
        ({"nbytes": 7}, r"parameter b of the table of weights has 7 bytes, which are not those of \(4,\) float16"),
        ({"shape": (-4,)}, "parameter b of the table of weights has 8 bytes"),
        ({"offset": 0}, "parameter b of the table of weights begins at byte 0, expected 64"),
        ({"offset": 128}, "parameter b of the table of weights begins at byte 128, expected 64"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_with_the_name(change, message):
    fields = {"name": "b", "dtype": "float16", "shape": (4,), "offset": 64, "nbytes": 8, "checksum": 1}
    entries = [Entry("a", "float16", (4,), 0, 8, 1), Entry(**(fields | change))]
    with pytest.raises(ValueError, match=message):
        check_places(entries)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 200_000, '{"version": 1}', '{"version": 1, "tensors": [[1]]}']
)
def test_what_is_no_table_is_refused(text):
    with pytest.raises(ValueError, match="is no table of weights"):
        parse(text)


# -------------------------------------------------------------------- checksums


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, PAGE * WORD, PAGE * WORD + 1, 3 * PAGE * WORD + 12])
def test_host_and_device_code_give_one_checksum(length):
    """The device's code runs on the CPU here: it is the same for every device."""
    data = torch.randint(0, 256, (length,), dtype=torch.uint8)
    assert checksum(data.numpy()) == tensor_checksum(data) < 1 << 64


def test_every_bit_counts_and_so_does_every_page_s_place():
    data = np.random.default_rng(0).integers(0, 256, 2 * PAGE * WORD + 5, dtype=np.uint8)
    whole = checksum(data)
    for place in [0, 1, 4095, 4096, 8191, *range(len(data) - 5, len(data))]:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(data) != whole
            data[place] ^= 1 << bit
    pages = data[: 2 * PAGE * WORD].reshape(2, -1)
    assert checksum(np.concatenate([pages[1], pages[0], data[-5:]])) != whole


def test_a_view_that_begins_within_a_word_has_the_checksum_of_its_bytes():
    base = torch.arange(64, dtype=torch.bfloat16)
    for start in range(5):
        assert tensor_checksum(as_bytes(base[start:40])) == checksum(as_bytes(base[start:40].clone()).numpy())


# -------------------------------------------------------------------- who sends to whom


def places(*nodes: str) -> list[Place]:
    return [Place(node, f"/dev/shm/{node}", "nonce") for node in nodes]


def test_every_node_is_served_by_its_own_first_rank_where_it_has_one():
    assigned = assign(places("a", "b"), ["a", "a", "b", "b"])
    assert [(one.rank, one.place.node) for one in assigned] == [(0, "a"), (2, "b")]


def test_nodes_without_ranks_are_dealt_out_among_the_trainer_s_hosts():
    assigned = assign(places("x", "b", "y", "z"), ["a", "a", "b", "b"])
    assert [(one.rank, one.place.node) for one in assigned] == [(0, "x"), (2, "b"), (2, "y"), (0, "z")]


def test_a_plan_and_what_came_of_it_travel_as_json():
    plan = UpdatePlan(3, "bfloat16", 9.0, "token", assign(places("x", "a"), ["a"]))
    assert UpdatePlan.of_json(json.loads(json.dumps(plan.as_json()))) == plan
    sent = Sent((Outcome("x", "d"), Outcome("a", fault="why")), "no")
    assert Sent.of_json(json.loads(json.dumps(sent.as_json()))) == sent


# -------------------------------------------------------------------- what rank 0 knows


def test_a_node_that_got_nothing_is_named_and_its_servers_have_nothing_to_load(caplog):
    ledger = Ledger(lambda: places("a", "b"), "bfloat16")
    with ledger.loading("a") as held:
        assert held is None  # the model's own folder
    ledger.begin(4, ["a"], 9.0)
    with ledger.finish([Sent((Outcome("a", "digest"), Outcome("b", fault="timed out")))]) as version:
        assert version == 4
    with ledger.loading("a") as held:
        assert held == Held(4, "/dev/shm/a", "digest")
    with pytest.raises(NoWeightsError, match="no weights for a server of node b"), ledger.loading("b"):
        raise AssertionError
    assert "weights 4 did not get to node b: timed out" in caplog.text


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ((Outcome("a", fault="full"), Outcome("b", fault="gone")), "no serving node received .*a: full; b: gone"),
        ((Outcome("a", "one"), Outcome("b", "other")), "ranks of the trainer hold different weights: .*'b': 'other'"),
    ],
)
def test_an_update_that_reached_nobody_or_two_in_different_states_ends_with_the_nodes_named(outcomes, message):
    ledger = Ledger(lambda: places("a", "b"), "bfloat16")
    ledger.begin(1, ["a"], 9.0)
    with pytest.raises(RuntimeError, match=message), ledger.finish([Sent(outcomes)]):
        raise AssertionError
    with pytest.raises(NoWeightsError), ledger.loading("a"):
        raise AssertionError


def test_an_update_waits_for_a_server_that_loads_and_a_server_for_an_update():
    ledger = Ledger(lambda: places("a"), "bfloat16")
    order: list[str] = []

    def update() -> None:
        ledger.begin(1, ["a"], 9.0)
        order.append("begun")
        loader.start()
        time.sleep(0.1)  # for the loader to get to where it waits
        with ledger.finish([Sent((Outcome("a", "digest"),))]):
            order.append("finished")

    def load() -> None:
        with ledger.loading("a") as held:
            assert held == Held(1, "/dev/shm/a", "digest")
            order.append("loaded")

    updater, loader = threading.Thread(target=update), threading.Thread(target=load)
    with ledger.loading("a"):
        updater.start()
        time.sleep(0.1)
        order.append("loaded before")
    for thread in (updater, loader):
        thread.join(20)
    assert order == ["loaded before", "begun", "finished", "loaded"]


# -------------------------------------------------------------------- the folder


def test_the_folder_is_made_again_where_somebody_removed_it_or_the_remedy_named(store, sender, caplog):
    remedy = r"exclude .*/nemo_dapo_weights_\* from what cleans that folder"
    sent_to(store, sender)
    shutil.rmtree(store.folder)
    store.require_folder()
    assert "is made again" in caplog.text
    digest = sent_to(store, sender, version=2)
    assert len(list(read_weights(store.folder, 2, digest))) == len(NAMES)

    def cleaned():
        yield from weights().items()
        shutil.rmtree(store.folder)

    (outcome,) = sender.send(cleaned(), plan_for(store.place()), 0).outcomes
    assert re.search(f"was removed while it was written to: {remedy}", outcome.fault)


def test_a_host_without_room_is_a_fault_that_says_so(store, sender, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    (outcome,) = sender.send(weights().items(), plan_for(store.place()), 0).outcomes
    assert "No space left on device" in outcome.fault


def test_the_folder_is_private_and_in_shared_memory(store):
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    if store_module.SHARED_MEMORY.is_dir():
        assert store.folder.parent == store_module.SHARED_MEMORY


def test_a_full_or_absent_shared_memory_falls_back_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(store_module, "SHARED_MEMORY", tmp_path)
    assert store_module.roomy_folder(1) == tmp_path
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert store_module.roomy_folder(11) != tmp_path
    monkeypatch.setattr(store_module, "SHARED_MEMORY", tmp_path / "absent")
    assert store_module.roomy_folder(1) != tmp_path
    assert "0.00 GB free" in caplog.text
    assert "does not exist" in caplog.text


# -------------------------------------------------------------------- what a server is told


def server_with(routes: dict[str, httpx.Response], calls: list[str]) -> httpx.AsyncClient:
    """A server that answers 200 but for `routes`, and records the calls."""

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        default = httpx.Response(200, json={"weight_version": "4"})
        said = routes.get(request.url.path, default)
        return httpx.Response(said.status_code, stream=httpx.ByteStream(said.content))  # unread, as from a socket

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server")


def push(client: httpx.AsyncClient, version: int, seconds: float = 10.0) -> None:
    asyncio.run(push_weights(client, Held(version, "/folder", "digest"), time.monotonic() + seconds))


def test_an_update_pauses_first_reads_the_version_back_and_resumes_last():
    calls: list[str] = []
    push(server_with({}, calls), 4)
    assert calls[:3] == ["/pause", "/start_weight_update", "/update_weights"]
    assert calls.index("/finish_weight_update") < calls.index("/reset_prefix_cache") < calls.index("/weight_info")
    assert calls[-1] == "/resume"


def test_a_server_with_another_version_after_the_update_is_an_error():
    with pytest.raises(RuntimeError, match=r"has weights .*4.* after the update, not 5"):
        push(server_with({}, []), 5)


def test_a_server_that_refuses_the_weights_is_an_error_and_is_not_resumed():
    calls: list[str] = []
    client = server_with({"/update_weights": httpx.Response(500, text="size mismatch")}, calls)
    with pytest.raises(RuntimeError, match=r"/update_weights of http://server.* failed: HTTP 500 size mismatch"):
        push(client, 4)
    assert "/resume" not in calls


def test_a_server_too_old_for_sessions_and_versions_is_updated_without_them():
    absent = httpx.Response(404)
    old = dict.fromkeys(("/start_weight_update", "/finish_weight_update", "/update_weight_version"), absent)
    calls: list[str] = []
    push(server_with(old, calls), 5)
    assert "/update_weights" in calls
    assert calls[-1] == "/resume"


def test_an_update_past_its_deadline_stops():
    with pytest.raises(TimeoutError, match="no time is left for /pause of http"):
        push(server_with({}, []), 4, seconds=-1.0)


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
from nemo_dapo.rollout.weights import store as store_module
store_module.SHARED_MEMORY = Path(sys.argv[1])
store = store_module.WeightStore(8, "here")
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
        monkeypatch.setattr(store_module, "SHARED_MEMORY", tmp_path)
        store = WeightStore(8, "here")
        assert not left.exists()
        assert used.exists()
        store.close()
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
