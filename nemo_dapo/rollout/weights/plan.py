"""Who sends one version of the weights to whom: decided by rank 0, told to every rank, and what came of it.

    host   a rank on the serving node's own host writes into that node's folder
    tcp    nodes without a rank are dealt out among the trainer's hosts; one rank of the host sends to the node's receiver

Every rank holds each full tensor during the export, so that nothing crosses the network twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
class UpdatePlan:
    """One update; `seconds` are from the plan to the last byte, `token` is the receivers'."""

    version: int
    dtype: str
    seconds: float
    token: str
    deliveries: tuple[Delivery, ...] = ()

    def for_rank(self, rank: int) -> list[Place]:
        return [one.place for one in self.deliveries if one.rank == rank]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> UpdatePlan:
        deliveries = tuple(Delivery(one["rank"], Place(**one["place"])) for one in said["deliveries"])
        return cls(**{**said, "deliveries": deliveries})


@dataclass(frozen=True)
class Outcome:
    """What became of one delivery: the `digest` of what arrived, or why nothing did."""

    node: str
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
