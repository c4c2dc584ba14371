"""On what a node and the run must agree before the node serves: pure functions from what was said to a refusal, or None."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import nemo_dapo
from nemo_dapo.hf_folder import differences
from nemo_dapo.rollout.messages import PROTOCOL, Hello, Refusal, Report

NAME = re.compile(r"\w[\w.-]{0,252}")


@dataclass(frozen=True)
class Terms:
    """The run's side: whose model it trains, and the version of NCCL that is to carry its weights ("": NCCL does not)."""

    model_path: str
    model: Mapping[str, Any]
    nccl: str = ""


def refuse_version(protocol: int, package: str) -> Refusal | None:
    """Exactly this version: fields of messages, routes of servers and tables of weights change without notice."""
    ours = (PROTOCOL, nemo_dapo.__version__)
    if (protocol, package) == ours:
        return None
    return Refusal(
        f"it has nemo_dapo {package} (protocol {protocol}), the run has {ours[1]} (protocol {ours[0]}): `pip install "
        "--no-deps` the same version into the environment that starts the agent"
    )


def refuse_node(hello: Hello, present: Mapping[str, int], expected: Collection[str], has_room: bool) -> Refusal | None:
    """`present` holds the process of each node that is there; `expected`, where not empty, the only names there may be."""
    if not NAME.fullmatch(hello.node):
        return Refusal(
            f"its name {hello.node!r} cannot name a folder: give the host a name of letters, digits, - and ."
        )
    if pid := present.get(hello.node):
        return Refusal(
            f"a node of the name {hello.node} serves already (agent {pid}): end that agent, or wait until its lease runs "
            "out (rollout.lease_seconds); where two hosts have one name, give each its own (hostname, SLURMD_NODENAME)",
            is_final=False,
        )
    if expected and hello.node not in expected:
        return Refusal(
            f"{hello.node} is none of the run's nodes {', '.join(sorted(expected))}: start agents of your own only with "
            "rollout.placement=dedicated"
        )
    if not has_room:
        return Refusal(
            f"all {len(present)} places for nodes are taken: it is a spare until one is lost; raise rollout.nodes to use "
            "it now",
            is_final=False,
        )
    return None


def refuse_report(report: Report, terms: Terms) -> Refusal | None:
    """Whether the node has the run's model and can serve it."""
    problems = list(report.problems)
    if not problems and (found := differences(terms.model, report.model)):
        problems.append(
            f"model.path={terms.model_path} is another model there ({'; '.join(found[:4])}): copy the run's to every node, "
            "or name a folder that all of them see"
        )
    if terms.nccl and report.nccl and terms.nccl != report.nccl:
        problems.append(
            f"its servers have NCCL {report.nccl}, the trainer has {terms.nccl}, and they cannot talk: install the same "
            f"nvidia-nccl package in both environments (`pip install nvidia-nccl-cu12=={terms.nccl}`), or set "
            "LD_PRELOAD to one libnccl.so.2 for both"
        )
    return Refusal("; ".join(problems)) if problems else None
