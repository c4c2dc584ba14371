"""Weights straight into the devices of servers, the product's whole way: engine, hub, agents and HTTP are real.

Servers are processes of their own, whose workers take what comes by `incoming.py`. Host memory and gloo stand in for GPUs
and NCCL (`stand_in_devices.py`), and so does what `nvidia-smi` says: nothing here shows that bytes get to a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import save_file

import nemo_dapo
from nemo_dapo.config import Placement, Precision, RolloutConfig, Transport
from nemo_dapo.hf_folder import expected_weights
from nemo_dapo.rollout import engine as engine_module
from nemo_dapo.rollout import fleet as fleet_module
from nemo_dapo.rollout import sharing
from nemo_dapo.rollout.agent import REFUSED
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.rollout.fleet import SickError
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.weights import broadcast, servers
from nemo_dapo.rollout.weights.direct import Direct
from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.types import Prompt, SamplingParams
from tests.agents import LEASE, end_of, start_keeper
from tests.stand_in_devices import GlooNCCL, HostMemory, Neighbours, checksums
from tests.stand_in_server import wait_for
from tests.stand_in_vllm import interpreter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = Prompt(uid="p-17", token_ids=(5, 6), problem="", ground_truth="")
SHAPES = {"embed": (9, 64), "wide": (70, 33), "bias": (5,)}
PIECE_BYTES = 1024  # "wide" lies in nine of them
NODE_SECONDS = 60.0
GPUS = """#!/bin/sh
for i in 0 1 2 3; do echo GPU-${SLURMD_NODENAME:-here}-$i; done
"""
PROBE = """echo '{{"package": "{0}", "vllm": "0.32.0", "torch": "2.13.0", "nccl": "{1}"}}'"""


class Tokenizer:
    """What the engine needs of a tokenizer."""

    eos_token_id = 1


def weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 9}))
    save_file({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, folder / "model.safetensors")
    return folder


class Run:
    """Rank 0's engine, the senders of all ranks, which are threads of this process, and agents of nodes of their own."""

    def __init__(self, folder: Path, ranks: int, nccl: str = "2.28.3", **options: Any) -> None:
        python = interpreter(
            folder / "interpreter", PROBE.format(nemo_dapo.__version__, nccl), "tests.stand_in_devices"
        )
        config = RolloutConfig(
            python=python,
            transport=Transport.device,
            listen="127.0.0.1:0",
            lease_seconds=LEASE,
            max_prompt_length=4,
            max_response_length=4,
            **options,
        )
        model, self.folder = write_model(folder / "model"), folder
        self.engine = VLLMEngine.prepare(config, model, Precision.fp32, folder / "run", Tokenizer(), 0)
        self.seats = [Seat(node_name(), f"GPU-here-{rank}") for rank in range(ranks)]
        neighbours = Neighbours(node_name(), ranks)
        self.senders = [
            Sender(
                lambda: expected_weights(model),
                direct=Direct(HostMemory(), neighbours.as_rank(rank), seat.gpu, PIECE_BYTES),  # type: ignore[arg-type]
            )
            for rank, seat in enumerate(self.seats)
        ]
        self.keepers: dict[str, subprocess.Popen[str]] = {}

    def begin(self, *names: str) -> None:
        """Agents of nodes that only serve, and the servers of all."""
        for name in names:
            self.keepers[name] = start_keeper(name, self.folder / "run" / "rollout.json")
            assert wait_for(lambda: any(node and node.name == name for node in self.nodes), NODE_SECONDS)  # noqa: B023
        self.engine.start_servers()

    @property
    def nodes(self) -> Sequence[Any]:
        return self.engine.servers.hub.nodes  # type: ignore[union-attr]

    def update(self, version: int, midway: Callable[[], None] = lambda: None) -> list[Sent]:
        """As `DAPOTrainer.sync_weights`, on all ranks; `midway` happens on rank 0 when half of the export is on its way."""

        def exported(rank: int) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights(version).items():
                yield name, tensor
                if rank == 0 and name == "wide":
                    midway()

        for sender in self.senders:
            if not sender.has_looked:
                sender.look(weights(version).items(), "float32")
        plan = UpdatePlan.of_json(json.loads(json.dumps(self.engine.begin_update(version, self.seats).as_json())))
        with ThreadPoolExecutor(len(self.senders)) as pool:
            sends = [pool.submit(one.send, exported(rank), plan, rank) for rank, one in enumerate(self.senders)]
            everyone = [Sent.of_json(json.loads(json.dumps(send.result(60).as_json()))) for send in sends]
        self.engine.finish_update(everyone)
        return everyone

    def sync(self, version: int, midway: Callable[[], None] = lambda: None) -> int:
        """As `DAPOTrainer.sync_weights`, until somebody has them: how many times. Only the first has a `midway`."""
        self.update(version, midway)
        self.engine.wake_up()
        if not self.engine.must_repeat:
            return 1
        self.train()
        return 1 + self.sync(version)

    def train(self) -> None:
        """The servers' part of it: they sleep, and then have room for weights again."""
        self.engine.sleep()
        self.engine.wake_weights()

    def loaded(self, index: int) -> dict[str, Any]:
        """What came to server `index`, and how often it joined a group."""
        where = self.engine.servers.servers[index].url
        found: dict[str, Any] = httpx.get(f"{where}/loaded", headers=self.engine.servers.headers, timeout=20.0).json()
        return found

    def has_all(self, index: int, version: int, workers: int) -> bool:
        return bool(self.loaded(index)["loaded"] == [checksums(iter(weights(version).items()))] * workers)

    def sampled(self, groups: int = 6) -> set[int]:
        """The versions under which so many groups were answered, all of them whole."""

        async def many() -> list[list[Any]]:
            return await asyncio.gather(
                *(self.engine.generate(PROMPT, 2, SamplingParams(max_tokens=4)) for _ in range(groups))
            )

        samples = [sample for group in asyncio.run(many()) for sample in group]
        assert len(samples) == 2 * groups
        return {span.version for sample in samples for span in sample.versions}

    def state(self, index: int) -> str:
        fleet = self.engine.upkeep.fleet
        return fleet.state(fleet.members[index])

    def server(self, index: int) -> psutil.Process:
        """The process that takes the weights, below its guardian."""
        guardian = psutil.Process(self.engine.servers.servers[index].pid)
        return next(one for one in guardian.children(recursive=True) if "tests.stand_in_devices" in one.cmdline())

    def close(self) -> None:
        self.engine.close()
        for sender in self.senders:
            sender.close()
        for keeper in self.keepers.values():
            keeper.kill()
            keeper.wait()


@pytest.fixture
def a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """Builds runs on a machine that seems to have GPUs, of which the trainer has the first."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(GPUS)
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(engine_module, "NCCL", GlooNCCL)
    monkeypatch.setattr(sharing, "trainer_devices", lambda environment: ["0"])
    monkeypatch.setattr(broadcast, "PIECE_SECONDS", 2.0)
    monkeypatch.setattr(servers, "GRACE_SECONDS", 1.0)
    runs: list[Run] = []

    def build(**options: Any) -> Run:
        runs.append(Run(tmp_path, **options))
        return runs[-1]

    yield build
    for run in runs:
        run.close()


def test_servers_on_the_trainer_s_gpus_read_from_the_ranks_there_and_one_that_dies_meanwhile_waits_for_the_next_update(
    a_run, caplog
):
    run = a_run(ranks=4, num_servers=2, vllm={"tensor_parallel_size": 2, "enable_sleep_mode": True})
    run.begin()
    assert run.sampled() == {0}
    (leader, *others) = run.update(1)  # as the trainer's first: nobody sleeps yet
    assert [outcome.name for outcome in leader.outcomes] == ["vLLM server 0", "vLLM server 1"]
    assert others == [Sent()] * 3
    assert run.has_all(0, 1, 2)
    assert run.has_all(1, 1, 2)
    assert run.sampled() == {1}

    run.train()
    run.update(2, midway=run.server(1).kill)
    run.engine.wake_up()
    assert run.has_all(0, 2, 2)
    assert run.sampled() == {2}
    assert wait_for(lambda: run.state(1) == "stale", NODE_SECONDS)
    assert "no node keeps a copy of what goes straight to devices (rollout.transport=device)" in caplog.text
    run.train()
    run.update(3)
    run.engine.wake_up()
    assert run.has_all(1, 3, 2)
    assert run.state(1) == "serving"
    assert run.sampled() == {3}


def test_servers_on_gpus_of_their_own_receive_broadcasts_and_one_that_stands_still_is_left_out_and_comes_back(
    a_run, caplog
):
    run = a_run(ranks=1, placement=Placement.dedicated, nodes=2, vllm={"tensor_parallel_size": 2})
    run.begin("n1", "n2")
    for version in (1, 2):
        run.update(version)
        for index in range(2):
            assert run.has_all(index, version, 2)
            assert run.loaded(index)["joins"] == 1  # the group stays
    assert run.sampled() == {2}

    stopped = run.server(1)
    run.update(3, midway=lambda: stopped.send_signal(signal.SIGSTOP))
    assert "weights 3 no longer go to vLLM server 1" in caplog.text
    assert run.has_all(0, 3, 2)
    assert run.sampled() == {3}
    assert wait_for(lambda: run.state(1) == "stale", NODE_SECONDS)
    assert not stopped.is_running()
    run.update(4)
    assert run.has_all(0, 4, 2)
    assert run.has_all(1, 4, 2)
    assert run.loaded(0)["joins"] == 3
    assert run.sampled() == {4}


ALONE = {"ranks": 1, "placement": Placement.dedicated, "nodes": 1, "vllm": {"tensor_parallel_size": 2}}
SHARED = {"ranks": 2, "num_servers": 2, "vllm": {"enable_sleep_mode": True}}


@pytest.mark.parametrize(("options", "names"), [(ALONE, ["n1"]), (SHARED, [])], ids=["alone", "shared"])
def test_where_no_server_outlives_an_update_those_that_are_started_anew_are_sent_it_again(
    options, names, a_run, caplog, monkeypatch
):
    """Dead before it, or in its middle; one server by NCCL, awake, or two on the trainer's GPUs, which sleep in between."""
    run = a_run(**options)
    run.begin(*names)
    fleet, workers = run.engine.upkeep.fleet, 2 if names else 1

    def kill_all() -> None:
        for member in fleet.members:
            run.server(member.index).kill()

    assert run.sync(1) == 1
    assert run.sampled() == {1}
    run.train()
    kill_all()
    assert run.sync(2) == 2
    assert "no server has weights 2; they are sent again" in caplog.text
    assert run.sampled() == {2}
    run.train()
    assert run.sync(3, midway=kill_all) == 2
    assert [run.state(member.index) for member in fleet.members] == ["serving"] * len(fleet.members)
    assert all(run.has_all(member.index, 3, workers) for member in fleet.members)
    assert run.sampled() == {3}

    monkeypatch.setattr(fleet_module, "MAX_RESTARTS", 0)  # as after so many in a row
    run.train()
    with pytest.raises(SickError, match=r"vLLM server 0 .* is sick after 0 restart\(s\) in a row"):
        run.sync(4, midway=kill_all)


def test_a_node_with_another_nccl_than_the_trainer_s_is_refused_when_it_registers(a_run, tmp_path):
    run = a_run(ranks=1, nccl="2.27.5", placement=Placement.dedicated, nodes=1)
    code, said = end_of(start_keeper("n1", tmp_path / "run" / "rollout.json"))
    assert code == REFUSED
    assert "NCCL 2.27.5, the trainer has 2.28.3" in said
    assert "rollout.transport=host" in run.engine.servers.hub.refusals["n1"].reason
