"""A mixture's routers, and how evenly they load their experts.

A router decides for each token that its rank holds: under context parallelism those of a slice of the pack, under sequence
parallelism, without which Megatron takes no experts beside tensor parallelism, those of a part of that slice. So each token
meets each layer's router on one rank.

Shapes: T tokens of a micro-batch on this rank, t of them its routers', L layers of the whole model, E experts of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemo_dapo.batching import MicroBatch
from nemo_dapo.megatron.parallel import device
from nemo_dapo.telemetry.metrics import Max, Mean, Metric


def routers(model: list[Any]) -> list[TopKRouter]:
    """Those of this rank's layers, in their order; `layer_number` counts from 1 through the whole model."""
    found = [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]
    return sorted(found, key=lambda router: router.layer_number)


def expert_pattern(config: Any) -> list[bool]:
    """Of each layer of the whole model, whether it has experts."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [i % pattern == 0 for i in range(config.num_layers)]
    return [bool(config.num_moe_experts and here) for here in pattern]


def at_router(per_token: Tensor, sequence_parallel: bool) -> Tensor:
    """Of [T, …] the part [t, …] whose tokens this rank's routers decide for."""
    if not sequence_parallel:
        return per_token
    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return per_token.chunk(ranks)[rank]


class ExpertLoad:
    """Counts the tokens of an update that each expert gets: once each, however often a layer is computed again."""

    def __init__(self, model: list[Any]) -> None:
        config = unwrap_model(model[0]).config
        self.sequence_parallel = config.sequence_parallel
        self.counts = torch.zeros(config.num_layers, config.num_moe_experts or 0, dtype=torch.int64)  # [L, E]
        self._counted: Tensor | None = None  # [t, 1] bool: which tokens at the routers; None between forward passes
        for router in routers(model):
            router.register_forward_hook(self._count)

    @contextlib.contextmanager
    def counting(self, micro: MicroBatch) -> Iterator[None]:
        """Count the tokens of `micro`, but not those that fill it up, in the forward pass inside.

        A layer that the backward pass computes again is not inside.
        """
        self._counted = at_router(micro.origin >= 0, self.sequence_parallel).unsqueeze(1)
        try:
            yield
        finally:
            self._counted = None

    def _count(self, router: TopKRouter, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._counted is not None:
            _, chosen = output  # [t, E] bool
            self.counts = self.counts.to(chosen.device)
            self.counts[router.layer_number - 1] += (chosen & self._counted).sum(0)

    def take_counts(self) -> Tensor:
        """[L, E] int64 of the whole model and all ranks, the same on each; begins again at 0. Collective."""
        counts = self.counts.to(device())
        self.counts = torch.zeros_like(self.counts)
        dist.all_reduce(counts)
        return counts

    def take_metrics(self) -> dict[str, Metric]:
        """`take_counts` in a few numbers; none for a model without experts.

        `moe_load` is the tokens of a layer's busiest expert over those of its average one, in the mean over layers; 1 is
        even, E over the experts of a token is the worst. `moe_load_max` is the worst layer's, and `moe_unused` the share of
        the experts that no token of the update went to.
        """
        if not self.counts.numel():
            return {}
        counts = self.take_counts().double()
        counts = counts[counts.sum(1) > 0]  # layers that have experts
        load = counts.amax(1) / counts.mean(1)
        return {
            "moe_load": Mean(float(load.sum()), load.numel()),
            "moe_load_max": Max(float(load.max())),
            "moe_unused": Mean(float((counts == 0).sum()), counts.numel()),
        }
