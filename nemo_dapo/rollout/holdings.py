"""What an agent owns on its node: the servers, their weights in the node's memory, and the receiver that fills it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

from nemo_dapo.config import Precision, RolloutConfig, Transport
from nemo_dapo.rollout import host
from nemo_dapo.rollout.command import connect_host, listen_host
from nemo_dapo.rollout.messages import Plan, Report, options_heard
from nemo_dapo.rollout.run_file import read_run_file
from nemo_dapo.rollout.servers import Share, VLLMServers
from nemo_dapo.rollout.weights.receive import Receiver
from nemo_dapo.rollout.weights.store import place_of

FOLDER_SECONDS = 5.0  # for a network file system to show what another host has just written
LOOK_SECONDS = 0.2


class Holdings:
    """Made where nothing speaks against it; nothing is started yet."""

    def __init__(self, servers: VLLMServers, receiver: Receiver | None) -> None:
        self.servers, self.receiver = servers, receiver

    def close(self, *, kill: bool) -> None:
        """End the servers, at once where `kill` says so."""
        self.servers.close(kill=kill)
        if self.receiver:
            self.receiver.close()


def prepare(
    plan: Plan, token: str, node: str, address: str, gpus: list[str], scratch: str, folder: Path
) -> tuple[Report, Holdings | None]:
    """What the hub wants to know of this node, and its holdings where nothing speaks against them. Blocks.

    `folder` is the weight store of whoever keeps the agent.
    """
    config = options_heard(plan.rollout)
    report, has_cpu_build = host.look(plan, config, address)
    on_cpu = has_cpu_build or not gpus
    problems = list(report.problems)
    if not sees_run(Path(plan.run_file), token):
        problems.append(
            f"{Path(plan.run_file).parent}, the run's output_dir, is another folder there: put output_dir on a file "
            "system that all nodes see"
        )
    is_direct = config.transport is Transport.device
    if is_direct and on_cpu:
        problems.append(
            "it has no GPU that its vLLM could use, and rollout.transport=device sends weights from GPU to GPU: set "
            "rollout.transport=host"
        )
    if config.return_routes and on_cpu:
        problems.append("vLLM on a CPU does not tell the experts of a token: set rollout.return_routes=false")
    if plan.spans_hosts:
        config.host = listen_host(config.host, address)
    try:
        if not on_cpu and not config.visible_devices:
            config.visible_devices = host.share_gpus(gpus, config.num_servers, host.gpus_each(config.vllm))
        share = Share(
            seed=plan.seed,
            first=plan.first,
            total=plan.total,
            api_key=plan.api_key,
            address=address,
            scratch=scratch,
            on_cpu=on_cpu,
        )
        if not problems:
            model, precision = Path(plan.model_path), Precision(plan.precision)
            servers = VLLMServers(config, model, precision, Path(plan.log_dir), share)
            receives = plan.spans_hosts and not is_direct
            receiver = Receiver(folder, plan.weight_token, address) if receives else None
            place = place_of(folder, node, f"{connect_host(address)}:{receiver.port}" if receiver else "")
            report = dataclasses.replace(
                report, place=dataclasses.asdict(place), gpus=gpus_of(config) if is_direct else []
            )
            return report, Holdings(servers, receiver)
    except (ValueError, OSError) as problem:
        problems.append(str(problem))
    return dataclasses.replace(report, problems=problems), None


def gpus_of(config: RolloutConfig) -> list[list[str]]:
    """By server, the UUIDs of its workers' GPUs: CUDA_VISIBLE_DEVICES of a server counts all GPUs of its host."""
    there, each = host.gpu_uuids({}), host.gpus_each(config.vllm)
    return [host.visible(there, devices)[:each] for devices in config.visible_devices]


def sees_run(run_file: Path, token: str) -> bool:
    """Whether this node sees the very folder of the run, not one of the same name on a disk of its own."""
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError):
            if read_run_file(run_file).token == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
