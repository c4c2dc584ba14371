"""What servers and ranks get of the environment of one of NVIDIA's containers, under srun and torchrun."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.environment import rank_variables
from nemo_dapo.rollout.environment import (
    FIRST_INTERNAL_PORT,
    PORTS_A_SERVER,
    internal_port,
    is_trainers,
    server_environment,
)

PACKAGES = "/usr/local/lib/python3.12/dist-packages"
# Variables as NVIDIA's NeMo container sets them, beside those of a user with habits of their own.
CONTAINER = {
    "PATH": "/opt/venv/bin:/usr/local/cuda/bin:/usr/bin",
    "LD_LIBRARY_PATH": f"{PACKAGES}/torch/lib:{PACKAGES}/torch_tensorrt/lib:/usr/local/cuda/compat/lib:"
    "/opt/venv/lib/python3.12/site-packages/nvidia/cudnn/lib:/usr/local/nvidia/lib64:/opt/torch/lib/",
    "PYTHONPATH": "/opt/Megatron-Bridge/3rdparty/Megatron-LM",
    "PYTHONHOME": "/usr",
    "VIRTUAL_ENV": "/opt/venv",
    "LD_PRELOAD": "/usr/lib/libtcmalloc.so.4",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_IB_HCA": "mlx5",
    "NCCL_CUMEM_ENABLE": "0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "HF_HOME": "/models",
    "VLLM_ATTENTION_BACKEND": "FLASHINFER",
}
LAUNCHER = {
    "RANK": "8",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "ROLE_RANK": "8",
    "GROUP_RANK": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "node-[1-2]",
    "SLURM_STEPID": "0",
    "SLURM_MPI_TYPE": "pmix",
    "SLURM_PMIXP_ABORT_AGENT_PORT": "38000",
    "PMIX_RANK": "1",
    "PMI_FD": "9",
    "PMI2_KVS": "x",
    "OMPI_MCA_plm": "x",
    "MPI_LOCALRANKID": "0",
}
OF_THE_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_PER_TASK": "96"}
INHERITED = CONTAINER | LAUNCHER | OF_THE_JOB
OWN_PYTHON = RolloutConfig(python="/opt/vllm/bin/python")
FP32, BF16 = Precision.fp32, Precision.bf16
TF32_OFF = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}
# What describes the machine, the job or the user's wishes.
STAYS = {*OF_THE_JOB, "NCCL_IB_HCA", "NCCL_CUMEM_ENABLE", "GLOO_SOCKET_IFNAME", "HF_HOME", "VLLM_ATTENTION_BACKEND"}


def server(config: RolloutConfig = OWN_PYTHON, precision: Precision = BF16, **changes: str) -> dict[str, str]:
    return server_environment(config, precision, 0, "key", INHERITED | changes, on_cpu=True)


def test_a_server_with_its_own_interpreter_gets_none_of_the_containers_libraries() -> None:
    found = server()
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD"} & found.keys()
    # The driver's and CUDA's own folders stay; those of any Python's packages go.
    assert found["LD_LIBRARY_PATH"] == "/usr/local/cuda/compat/lib:/usr/local/nvidia/lib64"
    assert found["PATH"] == "/opt/vllm/bin:" + CONTAINER["PATH"]


def test_the_libraries_of_the_servers_own_interpreter_stay() -> None:
    own = "/opt/vllm/lib/python3.12/site-packages/torch/lib"
    assert server(LD_LIBRARY_PATH=f"{own}:{PACKAGES}/torch/lib")["LD_LIBRARY_PATH"] == own
    assert "LD_LIBRARY_PATH" not in server(LD_LIBRARY_PATH=f"{PACKAGES}/torch/lib")


@pytest.mark.parametrize("python", ["", sys.executable, str(Path(sys.executable).with_name("python3"))])
def test_a_server_of_the_trainers_own_interpreter_keeps_its_libraries(python: str) -> None:
    found = server(RolloutConfig(python=python))
    for variable in ("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH"):
        assert found[variable] == INHERITED[variable]


@pytest.mark.parametrize("config", [OWN_PYTHON, RolloutConfig()])
def test_what_describes_or_tunes_the_trainers_processes_reaches_no_server(config: RolloutConfig) -> None:
    found = server(config)
    assert not LAUNCHER.keys() & found.keys()
    tuned = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", *TF32_OFF}
    assert not tuned & found.keys()
    assert {key: found[key] for key in STAYS} == {key: INHERITED[key] for key in STAYS}


def test_fp32_means_no_tf32_in_servers_and_ranks_alike() -> None:
    for found in (server(precision=FP32), rank_variables(INHERITED, FP32)):
        assert {key: found[key] for key in TF32_OFF} == TF32_OFF
    assert not TF32_OFF.keys() & rank_variables(INHERITED, BF16).keys()


def test_a_rank_starts_kernels_in_order_unless_the_user_says_otherwise() -> None:
    assert rank_variables({}, BF16) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert rank_variables({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, BF16) == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def test_a_rank_that_srun_started_without_torchrun_takes_its_local_rank_from_slurm() -> None:
    under_srun = {"RANK": "5", "SLURM_LOCALID": "1"}
    assert rank_variables(under_srun, BF16)["LOCAL_RANK"] == "1"
    assert "LOCAL_RANK" not in rank_variables(under_srun | {"LOCAL_RANK": "3"}, BF16)
    assert "LOCAL_RANK" not in rank_variables({"SLURM_LOCALID": "1"}, BF16)  # one process in a Slurm shell


def test_servers_that_start_at_once_look_for_ports_in_blocks_of_their_own() -> None:
    """vLLM chooses a port first and binds it later: two that search the same block can choose the same one."""
    starts = sorted(internal_port(index, "any key") for index in range(64))
    assert all(after - before >= PORTS_A_SERVER for before, after in itertools.pairwise(starts))
    assert starts[0] >= FIRST_INTERNAL_PORT
    assert starts[-1] + PORTS_A_SERVER <= 32768  # where the kernel begins to hand ports out
    runs = {internal_port(0, f"key {run}") for run in range(20)}
    assert len(runs) > 10  # runs side by side rarely share a block
    # A Kubernetes service named `vllm` sets the variable to an address, which vLLM refuses.
    assert server(VLLM_PORT="tcp://10.0.0.1:80")["VLLM_PORT"] == str(internal_port(0, "key"))


def test_each_server_gets_its_devices_and_the_key() -> None:
    config = RolloutConfig(visible_devices=["0,1", "2,3"], num_servers=2)
    found = server_environment(config, BF16, 1, "key", INHERITED | {"CUDA_VISIBLE_DEVICES": "0"}, on_cpu=False)
    assert (found["CUDA_VISIBLE_DEVICES"], found["VLLM_API_KEY"]) == ("2,3", "key")
    assert server(CUDA_VISIBLE_DEVICES="0")["CUDA_VISIBLE_DEVICES"] == "0"


def test_temporary_files_go_with_the_run_and_compiled_kernels_stay() -> None:
    def with_scratch(scratch: str, **inherited: str) -> dict[str, str]:
        return server_environment(RolloutConfig(), BF16, 0, "key", inherited, scratch, on_cpu=True)

    found = with_scratch("/dev/shm/x", TORCHINDUCTOR_CACHE_DIR="/kernels")
    assert found["TMPDIR"] == found["VLLM_RPC_BASE_PATH"] == "/dev/shm/x"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/kernels"
    assert "/dev/shm/x" not in with_scratch("/dev/shm/x")["TORCHINDUCTOR_CACHE_DIR"]
    too_long_for_a_socket = "/x" * 40
    assert "TMPDIR" not in with_scratch(too_long_for_a_socket)


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "RANKING", "MY_RANK", "NCCL_DEBUG", "TORCH_HOME", "PMI"])
def test_a_variable_that_only_resembles_a_launchers_stays(variable: str) -> None:
    assert not is_trainers(variable)
