"""Device memory that Megatron, Transformer Engine and torch keep between steps, and that nothing needs again."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor, nn


class TemporaryTensors:
    """What a forward pass leaves behind in `model` and in the libraries below it."""

    def __init__(self, model: list[nn.Module]) -> None:
        self.modules = [module for chunk in model for module in chunk.modules()]
        dispatchers = [one for module in self.modules if (one := getattr(module, "token_dispatcher", None)) is not None]
        # Those that a dispatcher has from the start are its own.
        self.dispatchers = [(one, set(_tensors_of(one))) for one in dispatchers]

    def free(self) -> None:
        """Give it back to the device."""
        for dispatcher, own in self.dispatchers:
            for name in set(_tensors_of(dispatcher)) - own:
                setattr(dispatcher, name, None)
        for module in self.modules:
            getattr(module, "_fp8_workspaces", {}).clear()
        RotaryEmbedding.forward.cache_clear()
        get_global_memory_buffer().buffer.clear()
        getattr(sys.modules.get("transformer_engine.pytorch.module.base"), "_dummy_wgrads", {}).clear()
        gc.collect()
        if torch.cuda.is_available():
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            torch.cuda.ipc_collect()


def _tensors_of(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if isinstance(value, Tensor)]
