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
import pytest
import torch
from safetensors.numpy import save_file

from nemo_dapo.config import Placement, Precision, RolloutConfig
from nemo_dapo.rollout.agent import ENDED
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.rollout.fleet import SickError
from nemo_dapo.rollout.weights.store import read_table
from nemo_dapo.types import Prompt, SamplingParams
from tests.agents import LEASE, end_of, start_agent
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
        self.agents: dict[str, subprocess.Popen[str]] = {}

    def begin(self, name: str) -> None:
        self.agents[name] = start_agent(name, "--run-file", str(self.run_file))

    def kill(self, name: str) -> None:
        self.agents[name].kill()
        self.agents[name].wait()
        assert wait_for(lambda: self.state(name) == "lost")

    def state(self, name: str) -> str:
        fleet = self.engine.upkeep.fleet
        return next(fleet.state(m) for m in fleet.members if self.engine.servers.servers[m.index].node == name)

    def sampled(self, groups: int = 8) -> set[int]:
        """The versions of the weights under which so many groups were answered, all of them whole."""

        async def many() -> list[list[object]]:
            calls = (self.engine.generate(PROMPT, 2, SamplingParams(max_tokens=4)) for _ in range(groups))
            return await asyncio.gather(*calls)  # type: ignore[arg-type]

        samples = [sample for group in asyncio.run(many()) for sample in group]
        assert len(samples) == 2 * groups
        return {span.version for sample in samples for span in sample.versions}  # type: ignore[attr-defined]

    def update(self, version: int) -> None:
        self.engine.update_weights([("w", torch.full((2,), float(version)))], version)

    def held(self) -> dict[str, int]:
        """By node, the version in its memory."""
        return {place.node: read_table(Path(place.folder)).version for place in self.engine.servers.places()}

    def close(self) -> None:
        self.engine.close()
        for agent in self.agents.values():
            agent.kill()
            agent.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    opened = Cluster(tmp_path)
    yield opened
    opened.close()


def test_nodes_are_lost_at_any_time_and_come_back_by_themselves_with_the_newest_weights(cluster, capfd):
    for slot, name in enumerate(("n1", "n2")):  # places are taken in the order of arrival
        cluster.begin(name)
        assert wait_for(lambda: cluster.engine.servers.hub.nodes[slot] is not None, NODE_SECONDS)  # noqa: B023
    cluster.engine.start_servers()
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

    # Stopped in the middle of a transfer, as its host might be: the others complete, within the lease.
    os.kill(cluster.agents["n2"].pid, signal.SIGSTOP)
    cluster.update(4)
    assert cluster.held()["n1"] == 4
    assert cluster.sampled() == {4}
    assert wait_for(lambda: cluster.state("n2") == "lost", LEASE + 10)
    os.kill(cluster.agents["n2"].pid, signal.SIGCONT)
    assert end_of(cluster.agents["n2"])[0] != ENDED

    said = ""

    def is_said(*words: str) -> bool:  # at the next look at the servers, which comes a moment later
        nonlocal said
        said += capfd.readouterr().out
        return all(word in said for word in words)

    assert wait_for(
        lambda: is_said("server 1 on n2 (pid ", "serving -> lost; 1 of 2 serve", "-> serving; 2 of 2 serve")
    )

    # Nobody is left: the run ends with each server's node and state, and not before the limit.
    cluster.engine.upkeep.fleet.patience = 2.0
    cluster.kill("n1")
    expected = (
        r"(?s)0 of 2 vLLM servers are left, rollout.min_servers=1 .*server 0 on n1 .* lost; .*server 1 on n2 .* lost"
    )
    with pytest.raises(SickError, match=expected):
        cluster.sampled()
