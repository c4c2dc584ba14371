"""Who sends one version of the weights to whom: decided by rank 0, told to every rank, and what came of it.

With `rollout.transport=host`, to serving nodes, which keep it:

    host   a rank on the serving node's own host writes into that node's folder
    tcp    nodes without a rank are dealt out among the trainer's hosts; one rank of the host sends to the node's receiver

With `rollout.transport=device`, to servers:

    ipc    a server's workers read from the ranks on their own GPUs
    nccl   workers on other GPUs receive what rank 0 broadcasts

Every rank holds each full tensor during the export, so that nothing crosses the network twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a serving node keeps its weights: a folder on its host, and the receiver that fills it for others, if any."""

    node: str
    folder: str
    nonce: str  # in the folder: a rank that reads it there sees the folder itself
    address: str = ""  # host:port of the receiver


@dataclass(frozen=True)
class Delivery:
    rank: int
    place: Place


@dataclass(frozen=True)
class Seat:
    """Where one rank is: its host and, by UUID, its GPU; "" where weights go through hosts."""

    host: str
    gpu: str = ""


@dataclass(frozen=True)
class Target:
    """One server whose workers' devices are written to: each one's UUID, in the workers' order, and their NCCL.

    `pid` tells one start of the server from the next. `host` is that of ranks on the same GPUs; "" where there are none.
    """

    name: str
    url: str
    gpus: tuple[str, ...]
    nccl: str = ""
    pid: int = 0
    host: str = ""

    @property
    def workers(self) -> int:
        return len(self.gpus)


def named(targets: Sequence[Target]) -> str:
    return ", ".join(target.name for target in targets)


@dataclass(frozen=True)
class UpdatePlan:
    """One update; `seconds` are from the plan to the last byte, `token` is the receivers', `key` the servers'.

    One that `is_direct` goes to `targets`, of which there may be none that live; any other by `deliveries`.
    """

    version: int
    dtype: str
    seconds: float
    token: str
    deliveries: tuple[Delivery, ...] = ()
    targets: tuple[Target, ...] = ()
    key: str = ""
    is_direct: bool = False

    def for_rank(self, rank: int) -> list[Place]:
        return [one.place for one in self.deliveries if one.rank == rank]

    def on_gpus_of(self, host: str) -> list[Target]:
        """The servers that share the GPUs of `host`'s ranks; with "" those that share nobody's."""
        return [target for target in self.targets if target.host == host]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> UpdatePlan:
        deliveries = tuple(Delivery(one["rank"], Place(**one["place"])) for one in said["deliveries"])
        targets = tuple(Target(**{**one, "gpus": tuple(one["gpus"])}) for one in said["targets"])
        return cls(**{**said, "deliveries": deliveries, "targets": targets})


@dataclass(frozen=True)
class Outcome:
    """What became of one delivery, to a node or a server: the `digest` of what arrived, or why nothing did."""

    name: str
    digest: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Sent:
    """What one rank's export came to; `refusal` says why it is not the served model, and then nothing was delivered."""

    outcomes: tuple[Outcome, ...] = ()
    refusal: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> Sent:
        return cls(tuple(Outcome(**one) for one in said["outcomes"]), said["refusal"])


def require_accepted(everyone: Sequence[Sent]) -> None:
    """Raise ValueError where some rank's export was not the served model."""
    for rank, sent in enumerate(everyone):
        if sent.refusal:
            raise ValueError(sent.refusal if len(everyone) == 1 else f"rank {rank}: {sent.refusal}")


def assign(places: Sequence[Place], hosts: Sequence[str]) -> tuple[Delivery, ...]:
    """The sender of each place, given the host of each rank: the first rank of its own host, else of each host in turn."""
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        first.setdefault(host, rank)
    others = [place for place in places if place.node not in first]
    in_turn = list(first.values())
    dealt = {place.node: in_turn[i % len(in_turn)] for i, place in enumerate(others)}
    return tuple(Delivery(first.get(place.node, dealt.get(place.node, 0)), place) for place in places)


def seated(targets: Sequence[Target], seats: Sequence[Seat]) -> tuple[Target, ...]:
    """`targets`, each with the host of the ranks on its GPUs; raises ValueError where it shares some of them alone."""
    hosts = {seat.gpu: seat.host for seat in seats if seat.gpu}
    return tuple(replace(target, host=_host_of(target, hosts)) for target in targets)


def _host_of(target: Target, hosts: Mapping[str, str]) -> str:
    found = {hosts.get(gpu, "") for gpu in target.gpus}
    if len(found) != 1:
        shared = [gpu for gpu in target.gpus if gpu in hosts]
        raise ValueError(
            f"{target.name} is on the GPUs {list(target.gpus)}, of which the trainer has {shared}: with "
            "rollout.transport=device it must share all or none; choose them by rollout.visible_devices, or set "
            "rollout.transport=host"
        )
    return found.pop()
