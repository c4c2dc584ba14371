"""Router replay: tokens go to the experts that another forward pass sent them to, whatever the router would choose by now.

The policy ratio compares the pass that scored a token, by the trainer or by vLLM, with those of the updates. Where a router
changes its mind in between, the two run through other weights, and the ratio measures that. Scores of the chosen experts
are still the router's own, so it learns.

Routes are data of tokens: `TrainBatch.routes` holds them, recorded or received; they are packed, filled up and sliced as
tokens are. The reference model routes by itself.

Shapes: T tokens of a micro-batch on this rank, t of them its routers'; L layers of the model that have experts, of which a
token goes to K in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemo_dapo.batching import MicroBatch
from nemo_dapo.megatron.moe import at_router, expert_pattern, routers
from nemo_dapo.types import BYTE_EXPERTS, TrainBatch


class RouterReplay:
    """Records and replays the routes of one model; of no chunks it does nothing.

    Megatron keeps a list of all routers of the process, other models' too: only this model's own are touched here.
    """

    def __init__(self, model: list[Any]) -> None:
        self.routers = routers(model)
        self.shape, self.layers = (0, 0), {}
        self.recorded: Tensor | None = None
        if model:
            config = unwrap_model(model[0]).config
            self.num_layers = config.num_layers
            self.sequence_parallel = config.sequence_parallel
            self.layers = layers_with_experts(config)
            self.shape = len(self.layers), config.moe_router_topk
            self.dtype = dtype_of_routes(config.num_moe_experts)
            # Megatron queues what it replays for layers that the backward pass computes again, whether it does or not.
            self.computes_again = config.recompute_granularity is not None

    def will_record(self, batch: TrainBatch) -> bool:
        return bool(self.layers) and batch.routes is None

    def begin_recording(self, batch: TrainBatch) -> None:
        self.recorded = torch.zeros(batch.tokens.numel(), *self.shape, dtype=self.dtype)

    def take_recorded(self) -> Tensor:
        """[T_batch, L, K] of this rank's tokens and layers, 0 elsewhere: the sum over a replica's ranks is whole."""
        recorded, self.recorded = self.recorded, None
        assert recorded is not None, "begin_recording was not called"
        return recorded

    @contextlib.contextmanager
    def routing(self, micro: MicroBatch, chunk: Any) -> Iterator[None]:
        """The forward pass of `chunk` inside follows `micro.routes`, and what the backward pass computes of it again does.

        While recording, it routes by itself and is written down.
        """
        if not self.routers or (self.recorded is None and micro.routes is None):
            yield
            return
        mine, action = routers([chunk]), RouterReplayAction.RECORD
        if self.recorded is None:
            action = RouterReplayAction.REPLAY_FORWARD
            self._set_targets(mine, micro.routes)
        for router in mine:
            router.router_replay.set_router_replay_action(action)
        yield
        if self.recorded is not None:
            self._write_down(mine, micro)
        for router in mine:
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def finish(self) -> None:
        """After a pass over micro-batches: each router chooses by itself again, and nothing of the routes is kept."""
        for router in self.routers:
            router.router_replay.clear_indices()
            router.router_replay.clear_router_replay_action()

    def _set_targets(self, mine: list[Any], routes: Tensor | None) -> None:
        assert routes is not None
        rows = at_router(routes, self.sequence_parallel)
        columns = columns_of(routes, self.layers, self.num_layers, self.shape[1])
        for router in mine:
            replay = router.router_replay
            replay.set_target_indices(rows[:, columns[router.layer_number]].long())
            if not self.computes_again:
                replay.replay_backward_list.clear()

    def _write_down(self, mine: list[Any], micro: MicroBatch) -> None:
        if not mine:
            return
        origin = at_router(micro.origin, self.sequence_parallel).cpu()
        real = origin >= 0
        chosen = torch.stack([router.router_replay.get_recorded_indices() for router in mine], dim=1)  # [t, l, K]
        layers = torch.tensor([self.layers[router.layer_number] for router in mine])
        assert self.recorded is not None
        self.recorded[origin[real].unsqueeze(1), layers] = chosen.cpu()[real].to(self.dtype)


def layers_with_experts(config: Any) -> dict[int, int]:
    """Position among the layers that have experts, by Megatron's layer_number, which counts all from 1."""
    numbers = [number for number, has_experts in enumerate(expert_pattern(config), start=1) if has_experts]
    return {number: position for position, number in enumerate(numbers)}


def columns_of(routes: Tensor, layers: dict[int, int], num_layers: int, top_k: int) -> dict[int, int]:
    """Where in `routes` [T, L, K] each layer's experts are, by layer_number: of layers with experts alone, or of all.

    The trainer records the former, vLLM tells the latter. Raises ValueError for routes of another model.
    """
    _, told, chosen = routes.shape
    if chosen == top_k and told in (len(layers), num_layers):
        return layers if told == len(layers) else {number: number - 1 for number in layers}
    raise ValueError(
        f"routes of {told} layers and {chosen} experts a token came, the model has {num_layers} layers, {len(layers)} of "
        f"them with experts, and sends a token to {top_k}: are the servers of another model?"
    )


def dtype_of_routes(experts: int) -> torch.dtype:
    """The narrowest that both NCCL and gloo sum up."""
    return torch.uint8 if experts <= BYTE_EXPERTS else torch.int32
