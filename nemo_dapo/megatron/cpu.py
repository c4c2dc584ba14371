"""Lets the unmodified Megatron-core run on a host without CUDA, over gloo.

Megatron-core names the device `cuda` in its sources. On a CPU host `install()` sends those names to the CPU: tensor
factories drop `device="cuda"` and pinned memory, `torch.cuda`'s streams and synchronisation do nothing, and the CUDA
random states are the CPU generator's. A `TorchFunctionMode` would be shorter, but torch switches it off inside
`autograd.Function.apply`, where activation recomputation runs.

Call `install()` before Megatron is imported. It refuses to run where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device
from torch import nn

FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_installed = False


def install() -> None:
    """Redirect Megatron's CUDA calls to the CPU, once; a no-op on a CUDA host and on the second call."""
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True
    # Megatron's jit_fuser is torch.compile: on a CPU host its first call costs a C++ compiler run and wins nothing.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    _redirect_factories()
    _redirect_cuda_module()
    _redirect_tensor_methods()
    _redirect_megatron_rng()
    _make_gloo_scatter_contiguous()
    _make_all_to_all_take_counts()


def _redirect_factories() -> None:
    # `with torch.device(...)` recognises factories by identity, from a set it builds on first use: build it before they
    # change, or models loaded under the meta device keep uninitialised buffers.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _NoStream:
    """Stands for `torch.cuda.Stream` and `Event`: a CPU runs its operations in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _redirect_cuda_module() -> None:
    # One function object a name: TorchDynamo refuses the same one under two.
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda *args: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda *args: _NoStream(),
        "default_stream": lambda *args: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        # The generator's method, not torch.manual_seed: that one seeds CUDA too and would come back here.
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "get_rng_state": lambda *args: torch.default_generator.get_state(),
        "set_rng_state": lambda state, *args: torch.default_generator.set_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _redirect_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_as_if_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The distributed optimizer recognises parameters by the string "torch.cuda.FloatTensor".
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = type_as_if_on_cuda  # type: ignore[assignment,method-assign]
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _redirect_megatron_rng() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.default_generator.get_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.default_generator.set_state(state)


def _make_gloo_scatter_contiguous() -> None:
    """gloo sends the memory of a strided view as it lies, so a row-parallel shard would arrive with the wrong weights."""
    scatter = torch.distributed.scatter

    @functools.wraps(scatter)
    def scatter_contiguous(tensor: torch.Tensor, scatter_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        if scatter_list is not None:
            scatter_list = [part.contiguous() for part in scatter_list]
        return scatter(tensor, scatter_list, *args, **kwargs)

    torch.distributed.scatter = scatter_contiguous


def _make_all_to_all_take_counts() -> None:
    """Megatron makes numbers of the counts of tokens when it copies them off a GPU, which never happens here."""
    all_to_all = torch.distributed.all_to_all_single

    @functools.wraps(all_to_all)
    def all_to_all_single(output: Any, input: Any, *sizes: Any, **options: Any) -> Any:
        return all_to_all(
            output, input, *(_numbers(size) for size in sizes), **{k: _numbers(size) for k, size in options.items()}
        )

    torch.distributed.all_to_all_single = all_to_all_single


def _numbers(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


class _StandInLoader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves empty modules for `transformer_engine*`; capitalised attributes are empty `nn.Module` classes."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = functools.partial(self._attribute, spec.name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...

    @staticmethod
    def _attribute(module: str, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return importlib.import_module(f"{module}.{name}") if name.islower() else type(name, (nn.Module,), {})


@contextlib.contextmanager
def transformer_engine_stand_in() -> Iterator[None]:
    """Inside, `import transformer_engine` gives an empty package; outside, its true absence.

    Megatron-Bridge imports Transformer Engine at the top of its LoRA files even where nothing of it is used. Megatron-core
    must have been imported before: it has to see that Transformer Engine is missing, or it takes the GPU path.
    """
    finder = _StandInLoader()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [
            n for n in sys.modules if n.partition(".")[0] in ("transformer_engine", "transformer_engine_torch")
        ]:
            del sys.modules[name]
