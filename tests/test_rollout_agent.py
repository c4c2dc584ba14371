"""Hub and agents: who may join, how a lease ends, what is left then. Agents are processes; their servers are stand-ins."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import psutil
import pytest

import nemo_dapo
from nemo_dapo.config import Placement, RolloutConfig, Transport
from nemo_dapo.rollout import holdings, host, probe
from nemo_dapo.rollout.agent import ENDED, LOST, REFUSED
from nemo_dapo.rollout.agreement import Terms, refuse_node, refuse_report, refuse_version
from nemo_dapo.rollout.hub import CallFailedError, NodeLostError, listening_socket
from nemo_dapo.rollout.messages import (
    PROTOCOL,
    Call,
    Hello,
    Report,
    Result,
    decode,
    encode,
    options_heard,
    options_said,
)
from nemo_dapo.rollout.run_file import Door, read_run_file, write_run_file
from tests.agents import LEASE, TOKEN, Link, Nodes, end_of, family
from tests.stand_in_server import wait_for

MODEL = {"config": {"model_type": "qwen2"}, "weights": "abc"}
TERMS = Terms("/models/m", MODEL)
REPORT = Report(address="10.0.0.7", vllm="0.32.0", nccl="2.27.5", model=MODEL)


# -------------------------------------------------------------------- what is said, and what is agreed on


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no message"),
        ("[]", "no message"),
        ('{"kind": "Nonsense"}', "no message"),
        (encode(Result(1)), "Result was said where Call was expected"),
        ('{"kind": "Call", "number": 1}', "Call lacks action"),
        ('{"kind": "Call", "number": "1", "action": "start"}', "Call.number='1' is not"),
        ('{"kind": "Call", "number": true, "action": "start"}', "Call.number='True' is not"),
        ('{"kind": "Call", "number": 1, "action": "start", "more": 2}', "Call.more='2' is not"),
        ("[" * 10**5, "no message"),
    ],
)
def test_what_is_no_message_is_refused_and_says_what_it_is(text, problem):
    with pytest.raises(ValueError, match=problem):
        decode(text, Call)


def test_a_message_arrives_as_it_was_sent():
    for message in (Call(3, "restart", 1), REPORT, Hello(PROTOCOL, "1", "n", 2, ["GPU-1"])):
        assert decode(encode(message), type(message)) == message


def test_a_node_of_another_version_or_protocol_is_refused_with_both_versions():
    assert refuse_version(PROTOCOL, nemo_dapo.__version__) is None
    for protocol, package in ((PROTOCOL, "0.0.9"), (PROTOCOL + 1, nemo_dapo.__version__)):
        refusal = refuse_version(protocol, package)
        assert refusal
        assert f"nemo_dapo {package} (protocol {protocol})" in refusal.reason
        assert nemo_dapo.__version__ in refusal.reason
        assert "pip install" in refusal.reason


def test_a_node_needs_a_name_of_its_own_a_place_and_where_nodes_are_known_to_be_one_of_them():
    hello = Hello(PROTOCOL, "1", "n1", 2, [])
    assert refuse_node(hello, {"n2": 5}, [], True) is None
    assert refuse_node(hello, {}, ["n1", "n2"], True) is None
    twice = refuse_node(hello, {"n1": 5}, [], True)
    spare = refuse_node(hello, {"n2": 5}, [], False)
    stranger = refuse_node(hello, {}, ["n2", "n3"], True)
    nameless = refuse_node(replace(hello, node="../x"), {}, [], True)
    assert twice
    assert spare
    assert stranger
    assert nameless
    assert "agent 5" in twice.reason
    assert "SLURMD_NODENAME" in twice.reason
    assert not twice.is_final
    assert "all 1 places" in spare.reason
    assert "rollout.nodes" in spare.reason
    assert not spare.is_final
    assert "n2, n3" in stranger.reason
    assert stranger.is_final
    assert "cannot name a folder" in nameless.reason


def test_a_node_with_another_model_or_another_nccl_is_refused_with_what_differs():
    assert refuse_report(REPORT, TERMS) is None
    other = refuse_report(replace(REPORT, model={**MODEL, "weights": "xyz"}), TERMS)
    assert other
    assert "weights differ" in other.reason
    assert "copy" in other.reason
    absent = refuse_report(replace(REPORT, model={}, problems=["model.path cannot be read"]), TERMS)
    assert absent
    assert absent.reason == "model.path cannot be read"
    for nccl, is_refused in (("2.28.3", True), ("2.27.5", False), ("", False)):
        refusal = refuse_report(REPORT, replace(TERMS, nccl=nccl))
        assert bool(refusal) is is_refused
        if refusal:
            assert "NCCL 2.27.5" in refusal.reason
            assert "2.28.3" in refusal.reason
    none = refuse_report(replace(REPORT, nccl=""), replace(TERMS, nccl="2.28.3"))
    assert none
    assert "no NCCL, the trainer has 2.28.3" in none.reason


def test_a_vllm_that_takes_whole_updates_alone_is_refused_where_pieces_are_to_come():
    for vllm, is_refused in (("0.20.1", True), ("0.9.2", True), ("0.21.0", False), ("0.32.0", False), ("1.0.0", False)):
        report = replace(REPORT, vllm=vllm)
        assert refuse_report(report, TERMS) is None
        refusal = refuse_report(report, replace(TERMS, is_direct=True))
        assert bool(refusal) is is_refused
        assert not refusal or "rollout.transport=host" in refusal.reason


def test_gpus_are_named_by_uuid_as_the_visible_devices_leave_them():
    gpus = ["GPU-a1", "GPU-a2", "GPU-b1"]
    assert host.visible(gpus, None) == gpus
    assert host.visible(gpus, "2,0") == ["GPU-b1", "GPU-a1"]
    assert host.visible(gpus, "GPU-b, GPU-a2") == ["GPU-b1", "GPU-a2"]
    assert host.visible(gpus, "0,7,1") == ["GPU-a1"]  # CUDA stops at the first that there is not
    assert host.visible(gpus, "GPU-a,0") == []  # two begin so
    assert host.visible(gpus, "") == []


def test_a_node_says_which_gpu_each_worker_of_its_servers_is_on(monkeypatch):
    monkeypatch.setattr(host, "gpu_uuids", lambda environment: ["g0", "g1", "g2", "g3"] if not environment else [])
    config = RolloutConfig(visible_devices=["2,3", "g1,g0"], vllm={"tensor_parallel_size": 2})
    assert holdings.gpus_of(config) == [["g2", "g3"], ["g1", "g0"]]
    config.vllm = {}
    assert holdings.gpus_of(config) == [["g2"], ["g1"]]  # vLLM leaves the second one alone


def test_a_node_without_gpus_is_refused_where_weights_are_to_go_into_them(nodes, tmp_path):
    run = nodes(probe="""echo '{"package": "x", "vllm": "0.32.0", "torch": "2.13.0+cpu", "nccl": ""}'""")
    for transport, is_refused in ((Transport.host, False), (Transport.device, True)):
        run.rollout.transport = transport
        report, held = holdings.prepare(run.plan(0, "n1"), TOKEN, "n1", "127.0.0.1", ["g0"], str(tmp_path), tmp_path)
        assert any("rollout.transport=device" in problem for problem in report.problems) is is_refused
        assert held is None  # another package's version


def test_the_library_that_is_chosen_says_the_version_of_nccl(monkeypatch):
    versions = {"nvidia-nccl-cu12": "2.26.2.post1"}
    monkeypatch.setattr(probe, "version", lambda *names: next((versions[n] for n in names if n in versions), ""))
    monkeypatch.delenv("VLLM_NCCL_SO_PATH", raising=False)
    assert probe.nccl() == "2.26.2"
    opened = []

    def library(path: str) -> SimpleNamespace:
        opened.append(path)
        return SimpleNamespace(ncclGetVersion=lambda number: setattr(number._obj, "value", 22803))

    monkeypatch.setattr(probe.ctypes, "CDLL", library)
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/opt/libnccl.so.2")
    assert probe.nccl() == "2.28.3"
    monkeypatch.delenv("VLLM_NCCL_SO_PATH")
    versions.clear()
    assert probe.nccl() == "2.28.3"
    assert opened == ["/opt/libnccl.so.2", "libnccl.so.2"]


def test_every_server_gets_gpus_of_its_own_or_the_node_says_how_many_it_lacks():
    assert host.gpus_each({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "max_num_seqs": 9}) == 4
    assert host.share_gpus(["a", "b", "c", "d", "e"], 2, 2) == ["a,b", "c,d"]
    with pytest.raises(ValueError, match=r"num_servers=3 with 2 GPU\(s\) each need 6 GPUs, it has 5"):
        host.share_gpus(["a", "b", "c", "d", "e"], 3, 2)


def test_an_interpreter_says_its_versions_and_one_that_cannot_is_named(tmp_path):
    import sys

    assert host.probed(sys.executable)["package"] == nemo_dapo.__version__
    bad = tmp_path / "python"
    bad.write_text("#!/bin/sh\necho 'No module named nemo_dapo' >&2; exit 1\n")
    bad.chmod(0o755)
    for python, said in ((str(bad), "No module named nemo_dapo"), (str(tmp_path / "none"), "No such file")):
        with pytest.raises(ValueError, match=rf"rollout.python={python} .*{said}.*pip install --no-deps"):
            host.probed(python)


# -------------------------------------------------------------------- agents


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    """Opens hubs, and ends them with their agents after the test."""
    opened: list[Nodes] = []

    def one(slots: int = 1, **options: Any) -> Nodes:
        opened.append(Nodes(tmp_path, slots, **options))
        return opened[-1]

    yield one
    for each in opened:
        each.close()


def gone(processes: list[psutil.Process], seconds: float = 30.0) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def answer_of(address: str, request: bytes) -> bytes:
    host_name, port = address.rsplit(":", 1)
    with socket.create_connection((host_name, int(port)), timeout=10) as peer:
        peer.sendall(request)
        peer.settimeout(2)
        got = b""
        try:
            while piece := peer.recv(4096):
                got += piece
        except TimeoutError:
            pass
        return got


def test_a_node_joins_serves_is_restarted_and_told_to_stop_and_nobody_else_is_answered(nodes):
    run = nodes(servers=2)
    agent = run.agent("n1", f"{closed_address()},{run.address}")
    node = run.ready()
    started = family(agent)
    assert [(s.index, s.is_ready, s.ended) for _, s in sorted(node.servers.items())] == [(0, True, ""), (1, True, "")]
    assert (run.folder / "servers" / "n1" / "server_1.log").exists()

    # The same node a second time: not now, and the first one goes on.
    code, said = end_of(run.agent("n1"))
    assert code == LOST
    assert f"n1 serves already (agent {agent.pid})" in said
    code, said = end_of(run.agent("n2"))
    assert (code, "it is a spare" in said) == (LOST, True)

    # Who does not show the token learns nothing, whatever is asked.
    code, said = end_of(run.agent("n3", token="guess"))
    assert code == REFUSED
    assert "does not accept this token" in said
    assert "--run-file" in said
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    for line in ("GET /agent", "GET /", "POST /agent", "DELETE /x?y=z", "OPTIONS /agent", "HEAD /"):
        for more in ("", upgrade, "Authorization: Bearer t0ke\r\n", "Authorization: Basic dDBrZW4=\r\n"):
            reply = answer_of(run.address, f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n".encode())
            head, _, body = reply.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 401"), (line, more, reply)
            assert body == b"", reply
            assert b"aiohttp" not in head
            assert b"Server" not in head

    # A server that dies is told of with its log, and started anew in its place.
    victim = node.servers[1]
    os.kill(psutil.Process(victim.pid).children()[0].pid, signal.SIGKILL)
    assert wait_for(lambda: "vLLM server 1 was killed by signal 9" in node.servers[1].ended)
    run.do(node.call("restart", 1))
    assert node.servers[1].is_ready
    assert node.servers[1].pid != victim.pid
    assert node.servers[1].url == victim.url
    started += family(agent)

    run.do(run.hub.close())
    assert end_of(agent)[0] == ENDED
    assert gone(started)
    with pytest.raises(NodeLostError, match="node n1: the connection was closed"):
        run.do(node.call("restart", 0))


def closed_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_node_that_cannot_serve_the_run_is_refused_at_the_door_with_the_remedy(nodes):
    run = nodes(probe="""echo '{"package": "0.1.0", "vllm": "0.32.0", "torch": "2.13.0+cpu", "nccl": "2.27.5"}'""")
    run.set_terms(model={"weights": "another"}, nccl="2.28.3")
    code, said = end_of(run.agent("n1"))
    assert code == REFUSED
    assert "is another model there" in said
    assert "NCCL 2.27.5, the trainer has 2.28.3" in said
    assert "is another model there" in run.hub.refusals["n1"].reason
    run.run_file.unlink()
    run.rollout.visible_devices, run.rollout.return_routes = ["0", "1"], True
    (run.model / "config.json").unlink()
    code, said = end_of(run.agent("n1"))
    assert code == REFUSED
    assert f"model.path={run.model} cannot be read there" in said
    assert "output_dir" in said
    assert "rollout.return_routes=false" in said
    name, refusal = run.do(run.hub.first_refusal())
    assert (name, refusal.is_final) == ("n1", True)


def test_hellos_of_other_versions_and_words_of_no_version_are_refused(nodes):
    run = nodes()

    async def said_to(first: str) -> str | None:
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as http,
            http.ws_connect(f"http://{run.address}/agent") as socket_,
        ):
            await socket_.send_str(first)
            message = await socket_.receive(timeout=20)
            return message.data if message.type is aiohttp.WSMsgType.TEXT else None

    older = asyncio.run(said_to(json.dumps({"protocol": 0, "package": "0.0.1", "node": "n1", "hostname": "x"})))
    assert older
    assert "it has nemo_dapo 0.0.1 (protocol 0)" in json.loads(older)["reason"]
    for nonsense in ("", "{}", encode(Result(1)), "[" * 10**5):
        assert asyncio.run(said_to(nonsense)) is None
    assert run.hub.nodes == [None]


@pytest.mark.parametrize("fault", ["kill", "stop", "cut"])
def test_a_lease_that_is_lost_ends_the_nodes_servers_and_the_node_joins_again(fault, nodes):
    run = nodes()
    link = Link(run.address)
    agent = run.agent("n1", link.address)
    node = run.ready()
    started = family(agent)
    calls = run.loop.submit(node.call("restart", 0)) if fault == "stop" else None
    if fault == "kill":
        agent.kill()
    elif fault == "stop":
        os.kill(agent.pid, signal.SIGSTOP)
    else:
        link.is_whole.clear()
    assert wait_for(lambda: run.hub.nodes == [None], LEASE + 10)
    assert node.lost == ("the connection was closed" if fault == "kill" else node.lost)
    assert "rollout.lease_seconds" in node.lost or fault == "kill"
    if calls is not None:
        with pytest.raises(NodeLostError, match="node n1: no sign of life for 3 s"):
            calls.result(10)
        os.kill(agent.pid, signal.SIGCONT)
    code, _ = end_of(agent)
    assert code == (-signal.SIGKILL if fault == "kill" else LOST)
    assert gone(started)
    run.agent("n1")
    assert run.ready().hello.pid != node.hello.pid
    link.close()


def test_an_agent_ends_its_servers_on_sigterm_and_a_start_that_fails_is_told_with_the_log(nodes):
    run = nodes()
    (run.folder / "interpreter").write_text(
        (run.folder / "interpreter")
        .read_text()
        .replace("  *) exec", "  *) echo 'ValueError: no such model'; exit 3; exec")
    )
    agent = run.agent("n1")
    node = run.do(run.hub.node_at(0))
    with pytest.raises(CallFailedError, match=r"(?s)exit code 3.*ValueError: no such model") as failed:
        run.do(node.call("start"))
    assert failed.value.error_class == "RuntimeError"
    os.kill(agent.pid, signal.SIGTERM)
    assert end_of(agent)[0] == ENDED
    assert wait_for(lambda: run.hub.nodes == [None])


def test_all_addresses_of_a_host_have_the_same_free_port():
    with listening_socket("", 0) as listener:
        port = listener.getsockname()[1]
        for address in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
            socket.create_connection((address, port), timeout=5).close()
    for address in ("127.0.0.1", "localhost"):
        with listening_socket(address, 0) as listener:
            assert listener.getsockname()[0] in ("127.0.0.1", "::1")


def test_the_run_file_is_for_its_user_alone_and_replaced_at_each_start(tmp_path):
    path = write_run_file(tmp_path, Door(["a:1"], "x", 3.0, 8))
    path.chmod(0o644)
    door = Door(["a:2"], "y", 60.0, 1 << 40)
    path = write_run_file(tmp_path, door)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_run_file(path) == door
    path.write_text(json.dumps({"addresses": ["a:2"], "token": "y"}))  # of a run before there were keepers
    with pytest.raises(ValueError, match=r"rollout.json is no rollout.json of a run"):
        read_run_file(path)


def test_a_configuration_arrives_at_the_node_as_it_was():
    options = RolloutConfig(num_servers=3, vllm={"max_num_seqs": 4}, placement=Placement.colocated)
    assert options_heard(json.loads(json.dumps(options_said(options)))) == options
