"""Weights over the network: real receivers on real sockets, which die, stop, lie or have no room while weights travel."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from nemo_dapo.rollout.weights import receive, tcp
from nemo_dapo.rollout.weights.checksum import checksum as checksum_of
from nemo_dapo.rollout.weights.plan import Delivery, Outcome, Place, Sent, UpdatePlan
from nemo_dapo.rollout.weights.read import read_weights
from nemo_dapo.rollout.weights.receive import Receiver
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.rollout.weights.store import TABLE, WeightStore, read_table
from nemo_dapo.rollout.weights.table import Entry, Table
from tests.test_rollout_weights import EXPECTED, weights

TOKEN = "token"
ELSEWHERE = "not the folder's nonce: as from another host"


@pytest.fixture
def node(tmp_path) -> Iterator[Callable[..., tuple[WeightStore, Place]]]:
    """Makes a node's store with its receiver, and its place as a rank on another host sees it."""
    made: list[tuple[WeightStore, Receiver]] = []

    def one(name: str) -> tuple[WeightStore, Place]:
        store = WeightStore(1, name)
        receiver = Receiver(store.folder, TOKEN, "127.0.0.1")
        made.append((store, receiver))
        return store, Place(name, str(store.folder), ELSEWHERE, f"127.0.0.1:{receiver.port}")

    yield one
    for store, receiver in made:
        receiver.close()
        store.close()


def plan_for(*places: Place, version: int = 1, seconds: float = 30.0, token: str = TOKEN) -> UpdatePlan:
    return UpdatePlan(version, "bfloat16", seconds, token, tuple(Delivery(0, place) for place in places))


def send(plan: UpdatePlan, piece_bytes: int = 1024) -> Sent:
    sender = Sender(lambda: EXPECTED, piece_bytes)
    try:
        return sender.send(weights(plan.version).items(), plan, 0)
    finally:
        sender.close()


def arrived(store: WeightStore, version: int, digest: str) -> bool:
    loaded = dict(read_weights(store.folder, version, digest))
    sent = weights(version)
    return loaded.keys() == sent.keys() and all(torch.equal(loaded[name], sent[name]) for name in sent)


def test_every_node_receives_the_same_bytes_whether_over_the_network_or_on_the_host(node):
    (far, far_place), (farther, farther_place) = node("far"), node("farther")
    near = WeightStore(1, "near")
    sender = Sender(lambda: EXPECTED, 1024)
    try:
        for version in (1, 2):  # into the same memory
            plan = plan_for(near.place(), far_place, farther_place, version=version)
            outcomes = sender.send(weights(version).items(), plan, 0).outcomes
            assert [one.name for one in outcomes] == ["near", "far", "farther"]
            assert len({one.digest for one in outcomes}) == 1
            for store in (near, far, farther):
                assert arrived(store, version, outcomes[0].digest)
    finally:
        sender.close()
        near.close()


def test_a_receiver_that_hung_up_between_two_updates_is_called_again(node, monkeypatch):
    """A step takes minutes, and whoever waits for the next request ends a silent connection at some time."""
    monkeypatch.setattr(receive.Handler, "timeout", 0.2)
    store, place = node("far")
    sender = Sender(lambda: EXPECTED, 1024)
    try:
        for version in (1, 2):
            (outcome,) = sender.send(weights(version).items(), plan_for(place, version=version), 0).outcomes
            assert not outcome.fault
            assert arrived(store, version, outcome.digest)
            time.sleep(0.6)
    finally:
        sender.close()


def test_a_node_that_came_back_with_another_receiver_is_sent_to_and_the_old_one_let_go(node):
    (_, before), (store, after) = node("far"), node("far")
    sender = Sender(lambda: EXPECTED, 1024)
    try:
        assert not sender.send(weights(1).items(), plan_for(before), 0).outcomes[0].fault
        (outcome,) = sender.send(weights(2).items(), plan_for(after, version=2), 0).outcomes
        assert arrived(store, 2, outcome.digest)
        assert list(sender._carriers) == [after]
    finally:
        sender.close()


RECEIVER = """
import sys, time
from pathlib import Path
from nemo_dapo.rollout.weights.receive import Receiver
receiver = Receiver(Path(sys.argv[1]), "token", "127.0.0.1")
print(receiver.port, flush=True)
assert "torch" not in sys.modules
time.sleep(600)
"""


@pytest.fixture
def process(tmp_path) -> Iterator[tuple[subprocess.Popen[str], Place]]:
    """A receiver in a process of its own."""
    running = subprocess.Popen([sys.executable, "-c", RECEIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        yield running, Place("sick", str(tmp_path), ELSEWHERE, f"127.0.0.1:{running.stdout.readline().strip()}")
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize(
    ("how", "said"), [(signal.SIGSTOP, "s were over before {} had "), (signal.SIGKILL, "ConnectionRefusedError")]
)
def test_a_receiver_that_is_stopped_or_dead_is_dropped_with_its_name_while_the_others_complete(
    how, said, process, node, monkeypatch
):
    monkeypatch.setattr(tcp, "STALL_SECONDS", 0.5)
    running, sick = process
    store, place = node("well")
    running.send_signal(how)
    if how == signal.SIGKILL:
        running.wait()
    outcomes = send(plan_for(sick, place)).outcomes
    assert outcomes[0].name == "sick"
    assert said.format(sick.address) in outcomes[0].fault
    assert arrived(store, 1, outcomes[1].digest)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_receiver_that_is_lost_while_weights_travel_is_dropped_while_the_others_complete(
    how, process, node, monkeypatch
):
    monkeypatch.setattr(tcp, "STALL_SECONDS", 0.5)
    running, sick = process
    store, place = node("well")

    def exported():
        for number, pair in enumerate(weights().items()):
            if number == 4:  # before the large one
                running.send_signal(how)
            yield pair

    outcomes = Sender(lambda: EXPECTED, 64).send(exported(), plan_for(sick, place), 0).outcomes
    assert outcomes[0].fault.startswith(("TimeoutError", "Connection", "BrokenPipe", "RemoteDisconnected"))
    assert arrived(store, 1, outcomes[1].digest)


def test_no_receiver_holds_an_update_up_beyond_its_deadline():
    """It accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = Place("slow", "/nowhere", ELSEWHERE, f"127.0.0.1:{listener.getsockname()[1]}")
        (outcome,) = send(plan_for(place, seconds=0.5)).outcomes
    assert f"s were over before {place.address} had " in outcome.fault
    assert "/weights/1/" in outcome.fault


def test_a_node_that_neither_has_a_receiver_nor_is_this_host_is_named():
    (outcome,) = send(plan_for(Place("lone", "/nowhere", ELSEWHERE))).outcomes
    assert outcome == Outcome("lone", fault=outcome.fault)
    assert "/nowhere is not on this host, and the node has no receiver" in outcome.fault


def test_a_sender_with_another_token_is_refused(node):
    store, place = node("far")
    (outcome,) = send(plan_for(place, token="guess")).outcomes
    assert "HTTP 401" in outcome.fault or "Connection" in outcome.fault or "BrokenPipe" in outcome.fault
    assert not (store.folder / TABLE).exists()


def talk(place: Place, text: bytes) -> bytes:
    host, port = place.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(text)
        said = b""
        while chunk := connection.recv(4096):
            said += chunk
        return said


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PUT /weights/1/0 HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"PUT /weights/1/0 HTTP/1.1\r\nAuthorization: Bearer guess\r\nContent-Length: 3\r\n\r\nabc",
        b"nonsense\r\n\r\n",
    ],
)
def test_whoever_has_no_token_hears_a_status_and_nothing_else(request_, node):
    _, place = node("far")
    head, _, body = talk(place, request_).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"401", b"400")
    assert set(head.lower().split(b"\r\n")[1:]) == {b"content-length: 0", b"connection: close"}
    assert body == b""


class Speaker:
    """Puts whatever a test says to a receiver."""

    def __init__(self, place: Place) -> None:
        host, port = place.address.split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=20)

    def put(self, what: str, body: bytes, checksum: int | None = None) -> tuple[int, str]:
        if checksum is None:
            checksum = checksum_of(np.frombuffer(body, np.uint8))
        headers = {"Authorization": f"Bearer {TOKEN}", receive.CHECKSUM_HEADER: str(checksum)}
        self.connection.request("PUT", f"/weights/{what}", body, headers)
        response = self.connection.getresponse()
        return response.status, response.read().decode()


def table_of(nbytes: int, version: int = 1) -> bytes:
    return Table(version, (Entry("w", "uint8", (nbytes,), 0, nbytes, 0),)).render().encode()


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        ([("1/64", b"x" * 64)], 409, "version 1 was not begun by this sender"),
        ([("1/0", b"x" * 64), ("1/0", b"y" * 64), ("1/128", b"z" * 64)], 409, "byte 128 came, expected was byte 64"),
        ([("1/0", b"x" * 64), ("2/64", b"y" * 64)], 409, "version 2 was not begun by this sender"),
        ([("1/0", b"x" * 64), ("1/table", table_of(128))], 409, "with 128 bytes, 64 bytes of version 1 came"),
        ([("1/0", b"x" * 64), ("1/table", table_of(64, version=2))], 409, "the table is of version 2"),
        ([("1/0", b"x" * 64), ("1/table", b"[]")], 422, "is no table of weights"),
        ([("1/x", b"")], 400, "is nothing that is received here"),
        ([("../../etc", b"")], 400, "is nothing that is received here"),
    ],
)
def test_pieces_that_are_missing_doubled_or_of_another_version_are_refused(said, status, why, node):
    store, place = node("far")
    speaker = Speaker(place)
    *before, last = said
    assert all(speaker.put(*one)[0] == 200 for one in before)
    assert speaker.put(*last)[0] == status
    speaker = Speaker(place)
    assert why in [speaker.put(*one) for one in said][-1][1]
    assert not (store.folder / TABLE).exists()


def test_a_bit_that_flips_on_the_way_is_found_by_the_receiver(node):
    _, place = node("far")
    status, why = Speaker(place).put("1/0", b"x" * 64, checksum=1)
    assert (status, why) == (422, "bytes 0 to 64 changed on the way")


def test_a_version_is_gone_with_the_first_byte_of_the_next(node):
    store, place = node("far")
    (outcome,) = send(plan_for(place)).outcomes
    assert arrived(store, 1, outcome.digest)
    assert Speaker(place).put("2/0", b"x" * 64)[0] == 200
    assert not (store.folder / TABLE).exists()


def test_a_sender_that_begins_anew_ends_one_that_is_stuck(node):
    store, place = node("far")
    stuck = socket.create_connection(("127.0.0.1", int(place.address.split(":")[1])), timeout=20)
    head = f"PUT /weights/1/0 HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 640\r\n\r\n"
    stuck.sendall(head.encode() + b"x" * 64)
    time.sleep(0.2)  # for it to be in the middle
    (outcome,) = send(plan_for(place)).outcomes
    assert arrived(store, 1, outcome.digest)
    stuck.close()


def test_a_receiver_without_room_says_so(node, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, place = node("far")
    monkeypatch.setattr(os, "posix_fallocate", full)
    (outcome,) = send(plan_for(place), piece_bytes=1 << 20).outcomes
    assert "refused the weights: HTTP 507 [Errno 28] No space left on device" in outcome.fault


def test_the_table_that_arrives_is_the_one_that_was_sent(node):
    store, place = node("far")
    (outcome,) = send(plan_for(place)).outcomes
    assert read_table(store.folder).digest == outcome.digest
