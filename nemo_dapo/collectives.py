"""Small messages between ranks as JSON in plain tensors: torch's own object collectives unpickle what another rank sent."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

MAX_BYTES = 1 << 20  # of one rank's message; every rank receives all of them


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of `group`, in rank order, on every rank. Collective.

    Raises ValueError, on every rank, when one of them is longer than MAX_BYTES as JSON.
    """
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    world = dist.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([mine.numel()], device=device), group=group)
    longest = int(sizes.max())
    if longest > MAX_BYTES:
        raise ValueError(f"rank {int(sizes.argmax())} has {longest} bytes to share, at most {MAX_BYTES} are allowed")
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    everyone = torch.empty(world * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone, padded, group=group)
    rows = everyone.view(world, longest).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes.tolist(), strict=True)]


class Neighbours:
    """The ranks of this rank's host, in a gloo group of their own; `hosts` are all ranks'. Making it is collective."""

    def __init__(self, hosts: Sequence[str], seconds: float) -> None:
        """`seconds` bound each collective among them."""
        rank = dist.get_rank()
        self.host = hosts[rank]
        self.is_first = hosts.index(self.host) == rank
        for host in dict.fromkeys(hosts):
            ranks = [number for number, one in enumerate(hosts) if one == host]
            group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=seconds), backend="gloo")
            if host == self.host:
                self.group = group

    def meet(self, seconds: float) -> None:
        """Wait for all of them; raises RuntimeError, which names who did not come, after `seconds`."""
        dist.monitored_barrier(self.group, timeout=datetime.timedelta(seconds=seconds))

    def gather(self, value: Any) -> list[Any]:
        return gather_json(value, self.group)
