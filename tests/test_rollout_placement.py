"""An engine whose servers are on nodes of their own: lost, found again, given weights; agents and receivers are real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import save_file

from nemo_dapo.config import Placement, Precision, RolloutConfig
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.rollout.fleet import SickError
from nemo_dapo.rollout.nodes import ServingNodes
from nemo_dapo.rollout.weights.store import DATA, read_table
from nemo_dapo.types import Prompt, Sample, SamplingParams
from tests.agents import LEASE, agent_of, start_keeper
from tests.stand_in_server import wait_for
from tests.stand_in_vllm import interpreter

PROMPT = Prompt(uid="p-17", token_ids=(5, 6), problem="", ground_truth="")
NODE_SECONDS = 60.0


class Tokenizer:
    """What the engine needs of a tokenizer."""

    eos_token_id = 1


class Cluster:
    """Two nodes, n1 and n2, and rank 0 with its engine, all on this machine."""

    def __init__(self, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 9}))
        save_file({"w": np.zeros(2, np.float32)}, model / "model.safetensors")
        config = RolloutConfig(
            python=interpreter(folder / "interpreter"),
            placement=Placement.dedicated,
            nodes=2,
            listen="127.0.0.1:0",
            lease_seconds=LEASE,
            max_prompt_length=4,
            max_response_length=4,
        )
        self.run_file = folder / "run" / "rollout.json"
        self.engine = VLLMEngine.prepare(config, model, Precision.fp32, folder / "run", Tokenizer(), 0)
        self.keepers: dict[str, subprocess.Popen[str]] = {}

    def begin(self, name: str) -> None:
        self.keepers[name] = start_keeper(name, self.run_file)

    def start(self) -> None:
        nodes = self.engine.servers
        assert isinstance(nodes, ServingNodes)
        for slot, name in enumerate(("n1", "n2")):  # places are taken in the order of arrival
            self.begin(name)
            assert wait_for(lambda: nodes.hub.nodes[slot] is not None, NODE_SECONDS)  # noqa: B023
        self.engine.start_servers()

    def kill(self, name: str) -> None:
        """The whole node."""
        self.keepers[name].kill()
        self.keepers[name].wait()
        assert wait_for(lambda: self.state(name) == "lost")

    def signal_host(self, name: str, what: signal.Signals) -> None:
        """To the keeper and to what speaks with rank 0."""
        agent = agent_of(self.keepers[name])
        for pid in (self.keepers[name].pid, agent.pid):
            os.kill(pid, what)

    def state(self, name: str) -> str:
        fleet = self.engine.upkeep.fleet
        return next(fleet.state(m) for m in fleet.members if self.engine.servers.servers[m.index].node == name)

    def sampled(self, groups: int = 8) -> set[int]:
        """The versions of the weights under which so many groups were answered, all of them whole."""

        async def many() -> list[list[Sample]]:
            calls = [self.engine.generate(PROMPT, 2, SamplingParams(max_tokens=4)) for _ in range(groups)]
            return await asyncio.gather(*calls)

        samples = [sample for group in asyncio.run(many()) for sample in group]
        assert len(samples) == 2 * groups
        return {span.version for sample in samples for span in sample.versions}

    def update(self, version: int) -> None:
        self.engine.update_weights([("w", torch.full((2,), float(version)))], version)

    def held(self) -> dict[str, int]:
        """By node, the version in its memory."""
        return {place.node: read_table(Path(place.folder)).version for place in self.engine.servers.places()}

    def close(self) -> None:
        self.engine.close()
        for keeper in self.keepers.values():
            keeper.kill()
            keeper.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    opened = Cluster(tmp_path)
    yield opened
    opened.close()


def test_nodes_are_lost_at_any_time_and_come_back_by_themselves_with_the_newest_weights(cluster, capfd):
    cluster.start()
    assert cluster.sampled() == {0}
    cluster.update(1)
    assert cluster.held() == {"n1": 1, "n2": 1}
    assert cluster.sampled() == {1}

    # Killed while it is idle: samples and an update go on without it, and it has nothing to serve when it is back.
    cluster.kill("n2")
    assert cluster.sampled() == {1}
    cluster.update(2)
    assert cluster.held() == {"n1": 2}
    cluster.begin("n2")
    assert wait_for(lambda: cluster.state("n2") == "stale", NODE_SECONDS)
    assert cluster.sampled() == {2}
    cluster.update(3)
    assert cluster.held() == {"n1": 3, "n2": 3}
    assert cluster.state("n2") == "serving"
    assert cluster.sampled() == {3}

    record = cluster.engine.metrics()
    assert record["servers/n1/0/version"] == record["servers/n2/1/version"] == 3
    assert (record["servers/n1/0/restarts"], record["servers/n2/1/restarts"]) == (0, 1)
    assert record["servers/n2/1/serves"] == 1

    # Stopped in the middle of an update, as its host might be: the others complete, within the lease. What was sent to it
    # lies in its memory, which is this machine's, and is the newest when it is back.
    cluster.signal_host("n2", signal.SIGSTOP)
    cluster.update(4)
    assert cluster.held()["n1"] == 4
    assert cluster.sampled() == {4}
    assert wait_for(lambda: cluster.state("n2") == "lost", LEASE + 10)
    cluster.signal_host("n2", signal.SIGCONT)
    assert wait_for(lambda: cluster.state("n2") == "serving", NODE_SECONDS)
    assert cluster.held() == {"n1": 4, "n2": 4}
    assert cluster.sampled() == {4}

    said = ""

    def is_said(*words: str) -> bool:  # at the next look at the servers, which comes a moment later
        nonlocal said
        said += capfd.readouterr().out
        return all(word in said for word in words)

    assert wait_for(
        lambda: is_said("server 1 on n2 (pid ", "serving -> lost; 1 of 2 serve", "-> serving; 2 of 2 serve")
    )

    # Nobody is left: the run ends with each server's node and state, and not before the limit.
    for name in ("n1", "n2"):
        cluster.kill(name)
    cluster.engine.upkeep.fleet.patience = 2.0
    expected = (
        r"(?s)0 of 2 vLLM servers are left, rollout.min_servers=1 must be and no other came back .*, and resume\): "
        r"vLLM server 0 on n1 .* is lost with its node n1: .*; vLLM server 1 on n2 .* is lost with its node n2: "
    )
    with pytest.raises(SickError, match=expected):
        cluster.sampled()


def test_an_agent_that_was_killed_or_stopped_has_a_successor_that_serves_what_the_node_holds(cluster):
    cluster.start()
    cluster.update(1)
    place = cluster.engine.servers.places()[1]
    for how in (signal.SIGKILL, signal.SIGSTOP):
        victim = agent_of(cluster.keepers["n2"])
        family = [victim, *victim.children(recursive=True)]
        assert len(family) == 3  # with a server and its guardian
        os.kill(victim.pid, how)
        assert wait_for(lambda: cluster.state("n2") == "lost", LEASE + 10)
        assert psutil.wait_procs(family, timeout=LEASE + 10)[1] == []  # none holds on to a device
        assert wait_for(lambda: cluster.state("n2") == "serving", NODE_SECONDS)
        assert cluster.held() == {"n1": 1, "n2": 1}
        assert cluster.engine.servers.places()[1].folder == place.folder
        assert [member.version for member in cluster.engine.upkeep.fleet.members] == [1, 1]
        assert cluster.sampled() == {1}
    cluster.update(2)  # to the successor's receiver
    assert cluster.held() == {"n1": 2, "n2": 2}
    assert cluster.sampled() == {2}


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / DATA).read_bytes())
    data[0] ^= 1
    (folder / DATA).write_bytes(data)


def test_weights_that_a_node_s_memory_changes_are_served_by_nobody(cluster, caplog):
    cluster.start()
    cluster.update(1)
    folder = Path(cluster.engine.servers.places()[1].folder)

    # After they were loaded: a successor does not serve them.
    flip_a_bit(folder)
    os.kill(agent_of(cluster.keepers["n2"]).pid, signal.SIGKILL)
    assert wait_for(lambda: cluster.state("n2") == "stale", NODE_SECONDS)
    assert "next weight update: parameter w has other bytes than were sent" in caplog.text
    assert cluster.sampled() == {1}

    # Before: its server finds it, and needs no restart for the next ones.
    plan = cluster.engine.begin_update(2)
    sent = cluster.engine.sender.send([("w", torch.full((2,), 2.0))], plan, 0)
    flip_a_bit(folder)
    cluster.engine.finish_update([sent])
    assert "weights 2 did not get to node n2: parameter w has other bytes than were sent" in caplog.text
    assert cluster.state("n2") == "stale"
    assert cluster.sampled() == {2}
    cluster.update(3)
    assert cluster.state("n2") == "serving"
    assert cluster.sampled() == {3}
    assert cluster.engine.restarts == 1
