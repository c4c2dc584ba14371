"""The serving nodes as rank 0 has them: what starts and keeps their agents, what is said when one is lost or missing."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nemo_dapo.config import Placement, RolloutConfig
from nemo_dapo.rollout.agent import ENDED
from nemo_dapo.rollout.attached import AttachedServers
from nemo_dapo.rollout.command import choose_ports
from nemo_dapo.rollout.loop import LoopThread
from nemo_dapo.rollout.nodes import ServingNodes, reachable_as
from nemo_dapo.rollout.servers import ServersClosedError
from tests.agents import end_of, serving, start_keeper
from tests.stand_in_server import wait_for
from tests.stand_in_vllm import ROOT, interpreter

CHILDREN_GONE_SECONDS = 60.0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[..., ServingNodes]]:
    """Opens serving nodes in the test's folder, and closes them after it."""
    opened: list[ServingNodes] = []

    def one(**options: object) -> ServingNodes:
        opened.append(serving(tmp_path, **options))
        return opened[-1]

    yield one
    for each in opened:
        each.close()


@pytest.fixture
def below() -> Callable[[], list[psutil.Process]]:
    """The processes below this one that the test started: other tests of the session may have left it a helper."""
    before = set(psutil.Process().children(recursive=True))
    return lambda: [one for one in psutil.Process().children(recursive=True) if one not in before]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=CHILDREN_GONE_SECONDS)[1]


def agent_of(nodes: ServingNodes) -> psutil.Process:
    node = nodes.last[0]
    assert node is not None
    return psutil.Process(node.hello.pid)


def test_the_servers_of_one_host_are_started_killed_restarted_and_their_agent_is_kept(nodes, tmp_path, below):
    run = nodes(num_servers=2)
    run.start()
    started = below()
    assert [server.url.rpartition(":")[0] for server in run.servers] == ["http://127.0.0.1"] * 2
    assert all(run.alive(index) for index in range(2))
    assert run.servers[1].log_path == tmp_path / "run" / "servers" / "server_1.log"
    assert run.servers[1].log_path.exists()
    assert run.describe(1) == f"vLLM server 1 (pid {run.servers[1].pid}, {run.servers[1].log_path})"

    victim = run.servers[1].pid
    os.kill(psutil.Process(victim).children()[0].pid, signal.SIGKILL)
    assert wait_for(lambda: not run.alive(1))
    assert "vLLM server 1 was killed by signal 9" in run.describe_exit(1)
    run.restart(1)
    assert run.alive(1)
    assert run.servers[1].pid != victim

    # An agent that is killed, or stands still, takes its servers along; another takes its place.
    for how in (signal.SIGKILL, signal.SIGSTOP):
        old = agent_of(run)
        family = [old, *old.children(recursive=True)]
        os.kill(old.pid, how)
        assert wait_for(lambda: run.is_away(0), 30)
        assert not run.alive(0)
        assert "is lost with its node" in run.describe_exit(0)
        assert gone(family)
        run.restart(0)  # waits for the new agent
        assert run.alive(0)
        assert agent_of(run).pid != old.pid
        started += below()
    run.close()
    run.close()
    assert gone(started)
    with pytest.raises(ServersClosedError):
        run.restart(0)


def test_a_server_that_dies_at_start_is_reported_with_its_log_and_the_remedy(nodes, tmp_path, below):
    run = nodes(num_servers=2)
    path = tmp_path / "interpreter"
    path.write_text(path.read_text().replace("  *) exec", "  *) echo 'ValueError: no such model'; exit 3; exec"))
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*server_\d\.log.*ValueError: no such model.*remedy"):
        run.start()
    assert gone(below())


def test_a_node_of_the_run_that_cannot_serve_ends_the_start_with_the_reason(nodes, tmp_path, below):
    run = nodes(probe="echo no such interpreter >&2; exit 1")
    with pytest.raises(
        RuntimeError, match=r"node .* is refused: rollout.python=.* cannot say what it has \(no such int"
    ):
        run.start()
    assert gone(below())


def test_closing_from_another_thread_ends_the_start_at_once(nodes, tmp_path, below):
    run = nodes()
    path = tmp_path / "interpreter"
    path.write_text(path.read_text().replace("  *) exec", "  *) sleep 987; exec"))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(run.start)
        assert wait_for(lambda: run.servers[0].pid != 0, 60)
        started = below()
        began = time.monotonic()
        run.close()
        with pytest.raises(ServersClosedError):
            starting.result(30)
    assert time.monotonic() - began < 8  # no server that is still starting is given the 10 s of an orderly end
    assert gone(started)


OWNER = """
import sys, time
from pathlib import Path
from tests.agents import serving
run = serving(Path(sys.argv[1]))
run.start()
print("started", flush=True)
time.sleep(987)
"""


def test_a_trainer_killed_by_sigkill_leaves_no_agent_and_no_server(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 4  # guardian, agent, guardian, server
    owner.kill()
    owner.wait()
    assert gone(family)


def test_nodes_of_their_own_register_are_waited_for_and_come_back_or_are_replaced(nodes, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("nemo_dapo.rollout.nodes.SECONDS_BETWEEN_WORDS", 0.5)
    run = nodes(placement=Placement.dedicated, nodes=2, listen="127.0.0.1:0")
    agents = [start_keeper("n1", tmp_path / "run" / "rollout.json")]
    try:
        with ThreadPoolExecutor(1) as pool:
            starting = pool.submit(run.start)
            assert wait_for(lambda: run.hub.nodes.count(None) == 1, 60)
            time.sleep(1.5)  # for a word on who is missing
            agents.append(start_keeper("n2", tmp_path / "run" / "rollout.json"))
            starting.result(60)
        said = capfd.readouterr().out
        assert "n1 (0 of 1 ready); waiting for 1 more node(s)" in said
        assert [server.node for server in run.servers] == ["n1", "n2"]
        assert (tmp_path / "run" / "servers" / "n2" / "server_1.log").exists()
        assert run.describe(1).startswith("vLLM server 1 on n2 (pid ")

        agents[1].kill()
        assert wait_for(lambda: run.is_away(1))
        assert "is lost with its node n2: the connection was closed" in run.describe_exit(1)
        assert run.alive(0)
        agents.append(start_keeper("n3", tmp_path / "run" / "rollout.json"))
        run.restart(1)
        assert run.servers[1].node == "n3"
        assert run.alive(1)
        run.close()
        assert [end_of(agent)[0] for agent in (agents[0], agents[2])] == [ENDED, ENDED]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def test_nodes_that_do_not_come_are_counted_with_how_to_start_them_and_who_was_refused(nodes, tmp_path):
    run = nodes(placement=Placement.dedicated, nodes=2, start_timeout=2.0, probe="exit 1", listen="127.0.0.1:0")
    agent = start_keeper("n1", tmp_path / "run" / "rollout.json")
    expected = (
        r"(?s)2 of 2 serving nodes did not register within rollout.start_timeout=2 s.*"
        r"python -m nemo_dapo.rollout.keeper --run-file .*rollout.json.*node n1 is refused: rollout.python"
    )
    try:
        assert wait_for(lambda: "n1" in run.hub.refusals, 60.0)
        with pytest.raises(TimeoutError, match=expected):
            run.start()
    finally:
        agent.kill()
        agent.wait()


def test_a_run_that_cannot_be_opened_leaves_neither_its_thread_nor_its_port(nodes, tmp_path):
    def held() -> tuple[set[int | None], set[int]]:
        """Threads of this process, and ports it listens on."""
        connections = psutil.Process().net_connections(kind="tcp")
        listening = {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
        return {thread.ident for thread in threading.enumerate()}, listening

    before = held()
    refused = pytest.raises(ValueError, match=r"rollout.listen: 127.0.0.1 port \d+ cannot be listened on")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused:
        nodes(listen=f"127.0.0.1:{taken.getsockname()[1]}")
    assert held() == before
    (tmp_path / "run").write_text("a file where the run's folder should be")
    with pytest.raises(FileExistsError):
        nodes()  # fails once the port is open
    assert held() == before


def test_work_that_comes_after_the_end_is_refused_and_not_left_unawaited():
    async def nothing() -> None: ...

    loop = LoopThread("hub")
    loop.submit(nothing()).result(10)
    loop.close()
    loop.close()
    late = nothing()
    with pytest.raises(RuntimeError, match="the loop of hub has ended"):
        loop.submit(late)
    assert inspect.getcoroutinestate(late) == inspect.CORO_CLOSED


def test_where_rank_0_is_found_follows_where_it_listens(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "head")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert reachable_as("", spans_hosts=False) == ["127.0.0.1"]
    assert reachable_as("", spans_hosts=True) == ["head", "10.0.0.1"]
    assert reachable_as("0.0.0.0", spans_hosts=True) == ["head", "10.0.0.1"]
    assert reachable_as("ib0", spans_hosts=True) == ["ib0"]
    assert reachable_as("fd00::1", spans_hosts=True) == ["[fd00::1]"]


def test_two_threads_may_end_a_run_at_once(nodes):
    run = nodes()
    threads = [threading.Thread(target=run.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_attached_servers_are_waited_for_and_never_started_or_ended(tmp_path, monkeypatch):
    port = choose_ports("127.0.0.1", 0, 1)[0]
    monkeypatch.setenv("NEMO_DAPO_API_KEY", "k")
    config = RolloutConfig(placement=Placement.attach, servers=[f"http://127.0.0.1:{port}/"], start_timeout=30.0)
    attached = AttachedServers(config, 8)
    command = [interpreter(tmp_path / "interpreter"), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "VLLM_API_KEY": "k"}, cwd=ROOT, start_new_session=True)
    try:
        attached.start()
        assert [place.node for place in attached.places()] == [attached.servers[0].node]
        attached.end(0)
        attached.restart(0)
        config.start_timeout = 1.0
        assert server.poll() is None
        server.kill()
        server.wait()
        with pytest.raises(TimeoutError, match=rf"vLLM server 0 \(http://127.0.0.1:{port}, attached\) did not become"):
            attached.restart(0)
    finally:
        attached.close()
        server.kill()
        server.wait()
