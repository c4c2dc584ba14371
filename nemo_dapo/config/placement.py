"""The checks of where the servers run: rollout.placement and what belongs to it."""

from __future__ import annotations

import re
import socket
import urllib.parse
from collections.abc import Iterator

from nemo_dapo.config.schema import LAST_PORT, AlgorithmConfig, Placement, RolloutConfig, Transport

URL = re.compile(r"https?://[^/\s]+:\d+/?")
LISTEN = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]*):(\d{1,5})")


def split_address(listen: str) -> tuple[str, int]:
    """(host, port) of `rollout.listen`; '' and 0 for what is left open. Raises ValueError for what is no host:port."""
    if not listen:
        return "", 0
    found = LISTEN.fullmatch(listen)
    if found is None or int(found[2]) > LAST_PORT:
        raise ValueError(
            f"rollout.listen={listen!r} must be host:port, such as 10.0.0.1:29600, or :29600 for all addresses"
        )
    return found[1].strip("[]"), int(found[2])


def check_placement(r: RolloutConfig) -> Iterator[str]:
    """What contradicts itself, with its remedy; how many nodes colocated servers have is known only at the start."""
    try:
        split_address(r.listen)
    except ValueError as problem:
        yield str(problem)
    if r.placement is Placement.dedicated and not r.nodes:
        yield "rollout.placement=dedicated with rollout.nodes=0 waits for nobody; set rollout.nodes to the nodes that serve"
    if r.placement is not Placement.dedicated and r.nodes:
        yield f"rollout.nodes={r.nodes} is for rollout.placement=dedicated, and it is {r.placement.value}; set one of both"
    if r.placement is not Placement.attach and r.servers:
        yield f"rollout.servers is for rollout.placement=attach, and it is {r.placement.value}; set one of both"
    if r.placement is Placement.attach:
        yield from _check_attached(r)
    if r.placement is Placement.attach and r.transport is Transport.device:
        yield (
            "rollout.transport=device sends into the GPUs of servers that the run started, and rollout.placement=attach "
            "has yours; set rollout.transport=host"
        )
    servers = total_servers(r)
    if servers and r.min_servers > servers:
        yield f"rollout.min_servers={r.min_servers} exceeds the {servers} server(s) that there are; lower it"


def _check_attached(r: RolloutConfig) -> Iterator[str]:
    if not r.servers:
        yield "rollout.placement=attach needs your servers: rollout.servers=[http://host:8000,…]"
    for url in r.servers:
        if not URL.fullmatch(url):
            yield f"rollout.servers: {url!r} must be http://host:port"
        elif urllib.parse.urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
            yield (
                f"rollout.servers: {url!r} is on another host, and attached servers take their weights from the memory of "
                "rank 0's; start agents there with rollout.placement=dedicated"
            )
    if len(set(r.servers)) < len(r.servers):
        yield "rollout.servers names a server twice; name each once"


def check_staleness(r: RolloutConfig, a: AlgorithmConfig) -> Iterator[str]:
    """What generation while the trainer updates asks of the other options."""
    if not r.max_staleness:
        return
    asked = f"rollout.max_staleness={r.max_staleness}"
    if not a.importance_cap:
        remedy = (
            "set algorithm.importance_cap=2" if a.loss != "gspo" else "gspo has no such correction: choose another loss"
        )
        yield f"{asked} trains on tokens of older weights uncorrected; {remedy}, or max_staleness=0"
    if r.placement is Placement.colocated or r.vllm.get("enable_sleep_mode"):
        yield (
            f"{asked} generates while the trainer updates, but these servers sleep then; give them GPUs of their own "
            "(rollout.placement=dedicated, or rollout.visible_devices) without rollout.vllm.enable_sleep_mode"
        )
    if r.replay:
        yield f"{asked}: a recorded run is played back step by step; leave rollout.replay out, or set max_staleness=0"


def total_servers(r: RolloutConfig) -> int:
    """Servers of the run; 0 where only the launcher knows."""
    return {
        Placement.local: r.num_servers,
        Placement.colocated: 0,
        Placement.dedicated: r.nodes * r.num_servers,
        Placement.attach: len(r.servers),
    }[r.placement]
