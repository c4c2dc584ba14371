"""The environment of one vLLM server: the trainer's, without what holds for the trainer's processes or its Python alone."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.environment import FULL_FP32
from nemo_dapo.rollout.command import CPU_ENGINE_OPTIONS

# They describe the trainer's process group, or a task of its srun or mpirun; a server that reads them would try to join.
LAUNCHER_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_.*|TORCH_NCCL_.*|PMI.?_.*|OMPI_.*|MPI_LOCAL.*|HYDI_.*|MV2_COMM_.*|PALS_.*"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|NTASKS.*|NPROCS|TASKS_PER_NODE|TASK_PID|STEP.*|SRUN_.*|LAUNCH_.*|MPI_.*|PMI.*)"
)
# What tunes the trainer's process and not the server's. Expandable segments cannot be put to sleep, nor be shared by CUDA
# IPC; one hardware queue serialises vLLM's streams.
TRAINER_VARIABLES = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", *FULL_FP32}
# With an interpreter of its own, a server must find that one's libraries and no others.
PYTHON_VARIABLES = {"PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_PRELOAD"}
# Folders of a Python's packages, such as /usr/local/lib/python3.12/dist-packages/torch/lib in NVIDIA's containers.
PACKAGE_LIBRARIES = re.compile(r"/(site|dist)-packages(/|$)|/(torch|torch_tensorrt)/lib/*$")
# No warm-up; the model runs in the engine's process, not in a worker below it (vllm.platforms.cpu reads this variable):
# one process less to start, no hop through shared memory.
CPU_VARIABLES = {"VLLM_CPU_CI_ENV": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# A Unix socket's path holds 107 bytes, and vLLM names its sockets by a UUID.
MAX_SOCKET_FOLDER = 107 - 37
# vLLM looks for ports of its own from VLLM_PORT upwards, and binds them later. Below 32768, where the kernel takes ports
# for outgoing connections, blocks of their own keep servers that start at once from choosing the same ones.
FIRST_INTERNAL_PORT, PORTS_A_SERVER, PORT_BLOCKS = 20000, 64, 192


def server_environment(
    config: RolloutConfig,
    precision: Precision,
    index: int,
    api_key: str,
    inherited: Mapping[str, str],
    scratch: str = "",
    *,
    on_cpu: bool,
) -> dict[str, str]:
    """Environment of server `index` of the fleet: what it inherits of its node's agent's, plus what vLLM reads.

    Variables that the user has set win over our CPU defaults. Sockets and the like go to the folder `scratch`, which
    disappears with the run however that ends.
    """
    cpu_defaults = CPU_VARIABLES if on_cpu else {}
    if cpu_defaults and config.vllm.get("enforce_eager", CPU_ENGINE_OPTIONS["enforce_eager"]):
        # Else one sampler function is still compiled by a C++ compiler, during the first request.
        cpu_defaults = {**cpu_defaults, "TORCH_COMPILE_DISABLE": "1"}
    devices = {}
    if config.visible_devices:
        devices = {"CUDA_VISIBLE_DEVICES": config.visible_devices[index % config.num_servers]}
    ours = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes of weight transfer, pause and abort
        "VLLM_PLUGINS": "nemo_dapo",  # other packages' plugins import what a server does not need
        "VLLM_API_KEY": api_key,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PORT": str(internal_port(index, api_key)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "JOBLIB_MULTIPROCESSING": "0",  # else an import leaves a semaphore in /dev/shm when the process is killed
    }
    if config.return_routes:
        ours["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the only one that tells the experts of a token
    numerics = FULL_FP32 if precision is Precision.fp32 else {}
    kept = {key: value for key, value in inherited.items() if not is_trainers(key)}
    return {
        **cpu_defaults,
        **for_interpreter(config.python, kept),
        **devices,
        **places(scratch, inherited),
        **numerics,
        **ours,
    }


def for_interpreter(python: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` as the interpreter `python` can take it; '' is this one."""
    if not python or (folder := program_folder(python)) == program_folder(sys.executable):
        return dict(inherited)
    return of_another_python(inherited, folder)


def is_trainers(variable: str) -> bool:
    """Whether `variable` describes or tunes the trainer's own process; NCCL's stay, they describe the machine."""
    return variable in TRAINER_VARIABLES or LAUNCHER_VARIABLES.fullmatch(variable) is not None


def program_folder(program: str) -> Path:
    """Where `program` lies, its symbolic links kept: in a virtual environment they all end in the Python below it."""
    return Path(shutil.which(program) or program).absolute().parent


def of_another_python(inherited: Mapping[str, str], programs: Path) -> dict[str, str]:
    """`inherited` as the interpreter in the folder `programs` can take it: no other Python's libraries, and its own
    programs first, such as the ninja that compiles kernels at run time."""
    kept = {key: value for key, value in inherited.items() if key not in PYTHON_VARIABLES}
    kept["PATH"] = ":".join(filter(None, [str(programs), inherited.get("PATH")]))
    if "LD_LIBRARY_PATH" in kept:
        folders = [f for f in kept.pop("LD_LIBRARY_PATH").split(":") if f and not is_foreign(f, programs.parent)]
        kept |= {"LD_LIBRARY_PATH": ":".join(folders)} if folders else {}
    return kept


def is_foreign(folder: str, prefix: Path) -> bool:
    """Whether the libraries in `folder` belong to a Python, and not to the one installed in `prefix`."""
    return PACKAGE_LIBRARIES.search(folder) is not None and not Path(folder).is_relative_to(prefix)


def internal_port(index: int, api_key: str) -> int:
    """The first port of server `index`'s own block; another run on this machine has another key, and other blocks."""
    return FIRST_INTERNAL_PORT + (zlib.crc32(api_key.encode()) + index) % PORT_BLOCKS * PORTS_A_SERVER


def places(scratch: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables that put sockets and rendezvous files into `scratch`, while compiled kernels stay where runs share them."""
    if not scratch or len(os.fsencode(scratch)) > MAX_SOCKET_FOLDER:
        return {}
    kernels = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return {
        "TMPDIR": scratch,
        "VLLM_RPC_BASE_PATH": scratch,
        "TORCHINDUCTOR_CACHE_DIR": inherited.get("TORCHINDUCTOR_CACHE_DIR", kernels),
    }
