"""Context parallelism: the tokens of every sequence dealt to the ranks of a group.

Each sequence of a pack is cut into 2 * cp equal chunks, and rank r takes chunks r and 2 * cp - 1 - r: under causal
attention an early chunk is cheap and a late one dear, so every rank has the same work (Transformer Engine's and Megatron's
order). One index cuts tokens, targets, masks and whatever else is there for each token. Targets were shifted before the
cut: the last token of a chunk knows the next one, which lies on another rank.

Shapes: T packed tokens, S sequences in the pack, cp ranks of the group.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.batching import MicroBatch


def context_slice(cu_seqlens: Tensor, size: int, rank: int) -> Tensor:
    """Which of the pack's tokens rank `rank` of `size` holds, in their order there: [T / size] int64.

    Raises ValueError unless every sequence of `cu_seqlens` [S + 1] divides into 2 * size chunks.
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if size > 1 and bool((lengths % (2 * size)).any()):
        raise ValueError(
            f"context parallelism over {size} ranks cuts each sequence into {2 * size} equal chunks, but the lengths are "
            f"{lengths.tolist()}: fill each up (batching.pack's sequence_multiple)"
        )
    parts = []
    for start, length in zip(cu_seqlens[:-1].tolist(), lengths.tolist(), strict=True):
        chunk = length // (2 * size)
        for place in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + place * chunk, start + (place + 1) * chunk))
    return torch.cat(parts).to(cu_seqlens.device)


def slice_microbatch(micro: MicroBatch, size: int, rank: int) -> MicroBatch:
    """`micro` with the tokens of one rank; `cu_seqlens`, `max_seqlen` and what counts a whole response stay the pack's."""
    if size == 1:
        return micro
    index = context_slice(micro.cu_seqlens, size, rank)
    num_tokens = micro.tokens.numel()
    per_token: dict[str, Any] = {
        field.name: value[index]
        for field in dataclasses.fields(micro)
        if field.name not in ("cu_seqlens", "response_lengths")
        and isinstance(value := getattr(micro, field.name), Tensor)
        and value.size(0) == num_tokens
    }
    return dataclasses.replace(micro, **per_token)


def gather_pack(x: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tokens [T / cp, …] put together in the order of the pack, [T, …]; the gradient comes back summed."""
    size = dist.get_world_size(group)
    order = torch.cat([context_slice(cu_seqlens, size, rank) for rank in range(size)])
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered[torch.argsort(order)]


class _AllGather(torch.autograd.Function):
    """[n, …] of each rank -> [cp * n, …] in the order of the ranks; each gets back all ranks' gradients of its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None
