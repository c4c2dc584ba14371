"""What is started on a node that only serves: it outlives rank 0, and ends when it is told to, leaving nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_dapo.rollout import keeper as keeper_module
from nemo_dapo.rollout.agent import ENDED, LOST, REFUSED
from nemo_dapo.rollout.keeper import require_listener
from tests.agents import Nodes, end_of, family
from tests.stand_in_server import wait_for
from tests.test_rollout_agent import closed_address, gone


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    opened: list[Nodes] = []

    def one(**options: Any) -> Nodes:
        opened.append(Nodes(tmp_path, **options))
        return opened[-1]

    yield one
    for each in opened:
        each.close()


def test_a_keeper_serves_the_run_that_takes_a_dead_ones_place_and_ends_with_it(run):
    nodes = run()
    was = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as examples/slurm/server.sh starts it
    keeper = nodes.keeper("n1")
    signal.signal(signal.SIGTERM, was)
    first = nodes.ready()
    servers = family(keeper)[2:]
    os.kill(keeper.pid, signal.SIGTERM)  # Slurm's, long before the end
    assert (nodes.folder / "servers" / "n1" / "agent.log").exists()

    # Rank 0 is killed: nobody says stop. The servers end; an agent that finds no run is not started.
    nodes.kill_hub()
    assert gone(servers)
    assert keeper.poll() is None
    folder = Path(first.report.place["folder"])
    assert folder.exists()  # the very run may come back

    nodes.open(1, "another token")
    second = nodes.ready()
    assert second.report.place["folder"] != str(folder)  # another run finds an empty one
    assert not folder.exists()
    servers = family(keeper)[1:]
    nodes.do(nodes.hub.close())
    assert end_of(keeper)[0] == ENDED
    assert gone(servers)
    assert not Path(second.report.place["folder"]).exists()


def test_a_run_that_is_not_found_in_time_frees_the_node_and_says_what_was_tried(run):
    nodes = run()
    nodes.run_file.unlink()
    code, said = end_of(nodes.keeper("n1", "--patience", "1"))
    assert code == LOST
    assert "n1: no run was found in 1 s; is rank 0 running? The last attempt: FileNotFoundError" in said


def test_a_node_that_is_refused_for_good_is_given_back_with_the_reason(run):
    nodes = run(probe="exit 1")
    code, said = end_of(nodes.keeper("n1"))
    assert code == REFUSED
    assert "the agent of node n1 ended with exit code 2" in said
    assert "cannot say what it has" in said


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_keeper_that_ends_takes_agent_servers_and_weights_along(how, run):
    nodes = run()
    keeper = nodes.keeper("n1")
    node = nodes.ready()
    started = family(keeper)
    assert len(started) == 5  # itself, guardian, agent, guardian, server
    os.kill(keeper.pid, how)
    assert end_of(keeper)[0] == (-signal.SIGKILL if how == signal.SIGKILL else ENDED)
    assert gone(started)
    assert wait_for(lambda: not Path(node.report.place["folder"]).exists())


def test_whether_a_hub_listens_is_asked_at_each_address(monkeypatch):
    monkeypatch.setattr(keeper_module, "CONNECT_SECONDS", 1.0)
    with keeper_module.socket.create_server(("127.0.0.1", 0)) as there:
        require_listener([closed_address(), f"127.0.0.1:{there.getsockname()[1]}"])
    for addresses, said in (([closed_address()], "Connection refused"), ([], "no address"), (["[::1]:1"], "::1")):
        with pytest.raises(OSError, match=said):
            require_listener(addresses)
