"""The policy's output layer: it scores targets instead of giving logits.

Shapes: T packed tokens of a micro-batch, H hidden size, tp tensor-parallel size.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nemo_dapo.megatron.logprobs import score_targets

# Megatron-core from 0.18 on gives the last hidden states to a function of ours; before, the layer's forward is replaced.
HAS_OUTPUT_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters


@dataclass
class ScoringHead:
    """How hidden states become log-probabilities: of `vocab_size` words, at a temperature, with or without rounding."""

    vocab_size: int
    temperature: float
    fp32_logits: bool

    def install(self, model: GPTModel) -> None:
        """Prepare a model, or the part of it that is this pipeline stage's."""
        layer = getattr(model, "output_layer", None)
        if layer is not None and not HAS_OUTPUT_PROCESSOR:
            layer.forward = functools.partial(self._in_place_of_forward, layer)

    def arguments(self, model: GPTModel, targets: Tensor) -> dict[str, Any]:
        """What `model.forward` is called with so that it returns scores [1, T, 2] of `targets` [T]."""
        if HAS_OUTPUT_PROCESSOR:
            return {"output_processor": self._process_output, "output_processor_context": targets}
        if model.post_process:
            model.output_layer.targets = targets
        return {}

    def _process_output(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Tensor, **unused: Any
    ) -> Tensor:
        return self._score(output_layer, hidden_states, output_weight, context).transpose(0, 1)

    def _in_place_of_forward(
        self, layer: Any, hidden: Tensor, weight: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        return self._score(layer, hidden, weight, layer.targets), None

    def _score(self, layer: Any, hidden: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
        """Log-probability and entropy [T, 1, 2]; hidden is [T, 1, H], or [T / tp, 1, H] under sequence parallelism."""
        assert layer.bias is None, "language-model heads have no bias"
        if layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        logprobs, entropy = score_targets(
            hidden.squeeze(1),
            layer.weight if weight is None else weight,
            targets,
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            fp32_logits=self.fp32_logits,
        )
        return torch.stack([logprobs, entropy], dim=-1).unsqueeze(1)
