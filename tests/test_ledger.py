"""Who holds device memory when a stage does not fit, from made-up readings; and when servers share the trainer's GPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from nemo_dapo.config import Offload, Placement, Precision, RolloutConfig, RunConfig, TrainerConfig, Transport
from nemo_dapo.ledger import Reading, ServerMemory, shortage
from nemo_dapo.rollout import sharing
from nemo_dapo.telemetry.memory import GIB
from nemo_dapo.types import Stage


def reading(free: float, allocated: float, reserved: float) -> Reading:
    return Reading(int(free * GIB), 80 * GIB, int(allocated * GIB), int(reserved * GIB))


def test_a_stage_that_does_not_fit_is_refused_with_what_it_needs_and_everyone_who_holds_memory() -> None:
    held = {"parameters": 8 * GIB, "gradients": 16 * GIB}
    said = shortage(Stage.sync, reading(10, 30, 41), {"the servers' weights": 16 * GIB, "in transfer": 2 * GIB}, held)
    assert said.startswith(
        "stage sync needs 18.0 GiB of device memory (the servers' weights 16.0 GiB, in transfer 2.0 GiB) and 10.0 GiB of "
        "80.0 GiB are free; held by: parameters 8.0 GiB, gradients 16.0 GiB, other tensors of the trainer 6.0 GiB, "
        "torch's unused cache 11.0 GiB, other processes, NCCL and CUDA itself 29.0 GiB; "
    )
    assert "rollout.vllm.gpu_memory_utilization" in said


def test_a_stage_that_fits_to_the_byte_is_not_refused() -> None:
    assert shortage(Stage.train, reading(24, 8, 8), {"gradients": 24 * GIB}, {}) == ""
    assert shortage(Stage.train, reading(24, 8, 8), {"gradients": 24 * GIB + 1}, {})


def test_what_servers_take_when_they_wake_is_what_they_gave_back_when_they_fell_asleep() -> None:
    servers = ServerMemory.released(reading(30, 0, 0), reading(76, 0, 0), weights=16 * GIB)
    assert servers == ServerMemory(weights=16 * GIB, cache=30 * GIB)
    assert servers.needs(Stage.generate) == {"the servers' key-value cache": 30 * GIB}
    assert sum(servers.needs(Stage.sync).values()) == 18 * GIB
    assert servers.needs(Stage.score) == servers.needs(Stage.train) == {}


@pytest.mark.parametrize("awake", [reading(76, 0, 0), reading(77, 0, 0), None])
def test_a_gpu_without_a_server_needs_nothing_for_one(awake: Reading | None) -> None:
    servers = ServerMemory.released(awake, reading(76, 0, 0), weights=16 * GIB)
    assert servers == ServerMemory()
    assert servers.needs(Stage.sync) == servers.needs(Stage.generate) == {}


# ------------------------------------------------------------------ sharing


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of eight GPUs, four of them the trainer's."""
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 8)
    monkeypatch.setattr(sharing, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def config_of(devices: list[str] | None = None, offload: Offload = Offload.auto, **vllm: object) -> RunConfig:
    return RunConfig(
        rollout=RolloutConfig(visible_devices=devices or [], vllm=dict(vllm)), trainer=TrainerConfig(offload=offload)
    )


@pytest.mark.parametrize(
    ("devices", "shares"), [([], True), (["4,5", "6,7"], False), (["6,7", "3, 4"], True), (["GPU-1a"], False)]
)
def test_servers_share_the_trainer_s_gpus_unless_they_have_others(
    gpus: None, devices: list[str], shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sharing.offloads(config_of(devices)) is shares
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # the ranks' now
    assert sharing.offloads(config_of(["0,1", "2,3"])) is False
    assert sharing.offloads(config_of(["4,5", "6,7"])) is True


@pytest.mark.parametrize("placement", Placement)
def test_servers_on_nodes_of_their_own_share_nothing(gpus: None, placement: Placement) -> None:
    config = config_of()
    config.rollout.placement = placement
    assert sharing.offloads(config) is (placement in (Placement.local, Placement.colocated))


def test_servers_on_the_trainer_s_gpus_sleep_and_take_a_share_of_the_memory(gpus: None) -> None:
    assert sharing.with_sleep(config_of(enforce_eager=True)).vllm == {
        "enable_sleep_mode": True,
        "gpu_memory_utilization": 0.6,
        "enforce_eager": True,
    }
    assert sharing.with_sleep(config_of(gpu_memory_utilization=0.5)).vllm["gpu_memory_utilization"] == 0.5
    for elsewhere in (config_of(["4,5,6,7"], a=1), config_of(offload=Offload.never, a=1)):
        assert sharing.with_sleep(elsewhere).vllm == {"a": 1}


def test_servers_that_may_not_sleep_are_refused_on_the_trainer_s_gpus(gpus: None) -> None:
    with pytest.raises(ValueError, match=r"enable_sleep_mode=false .* trainer\.offload=never"):
        sharing.with_sleep(config_of(enable_sleep_mode=False))


def test_generation_during_updates_is_refused_on_the_trainer_s_gpus(gpus: None) -> None:
    config = config_of()
    config.rollout.max_staleness = 1
    with pytest.raises(ValueError, match=r"max_staleness=1 .* rollout\.visible_devices"):
        sharing.with_sleep(config)


def test_nccl_is_needed_where_weights_go_to_devices_that_are_not_the_trainer_s(gpus: None) -> None:
    shared, elsewhere = config_of().rollout, config_of(["4,5", "6,7"]).rollout
    assert not sharing.needs_nccl(shared)
    assert not sharing.needs_nccl(elsewhere)
    shared.transport = elsewhere.transport = Transport.device
    assert not sharing.needs_nccl(shared)
    assert sharing.needs_nccl(elsewhere)
    shared.placement = Placement.dedicated
    assert sharing.needs_nccl(shared)


def test_memory_that_cuda_ipc_cannot_share_is_refused_where_servers_are_to_read_from_it(gpus: None) -> None:
    shared, elsewhere = config_of().rollout, config_of(["4,5", "6,7"]).rollout
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}
    sharing.require_devices(shared, environment)
    shared.transport = elsewhere.transport = Transport.device
    sharing.require_devices(shared, {})
    sharing.require_devices(elsewhere, environment)
    with pytest.raises(ValueError, match=r"expandable_segments:True .* unset it, or set rollout\.transport=host"):
        sharing.require_devices(shared, environment)


def test_weights_to_devices_are_refused_on_a_cpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), __version__="2.13.0+cpu")
    monkeypatch.setattr(sharing, "torch", nothing)
    config = config_of().rollout
    sharing.require_devices(config, {})
    config.transport = Transport.device
    with pytest.raises(ValueError, match=r"torch 2\.13\.0\+cpu finds none on this host; set rollout\.transport=host"):
        sharing.require_devices(config, {})


def test_on_a_cpu_host_nothing_is_shared_and_the_option_still_moves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    assert not sharing.offloads(config_of())
    assert sharing.offloads(config_of(offload=Offload.always))
    assert sharing.with_sleep(config_of(offload=Offload.always)).vllm == {}


def test_a_server_s_share_of_the_weights_is_that_of_its_gpus(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(100, 30), "b": torch.zeros(1000)}, tmp_path / "model.safetensors")
    rollout = RolloutConfig(vllm={"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    assert sharing.weight_bytes(RolloutConfig(), tmp_path, Precision.fp32) == 16000
    assert sharing.weight_bytes(rollout, tmp_path, Precision.bf16) == 2000
