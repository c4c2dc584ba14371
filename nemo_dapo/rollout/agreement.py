"""On what a node and the run must agree before the node serves: pure functions from what was said to a refusal, or None."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import nemo_dapo
from nemo_dapo.hf_folder import differences
from nemo_dapo.rollout.messages import PROTOCOL, Hello, Refusal, Report

TOO_OLD = tuple(f"0.{minor}." for minor in range(21))  # of vLLM: engines that do not own the update
NAME = re.compile(r"\w[\w.-]{0,252}")


@dataclass(frozen=True)
class Terms:
    """The run's side: whose model it trains, and how its weights travel.

    `nccl` is the version of NCCL that is to carry them ("": NCCL does not); `is_direct` says that they go into GPUs.
    """

    model_path: str
    model: Mapping[str, Any]
    nccl: str = ""
    is_direct: bool = False


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
    if terms.is_direct and report.vllm.startswith(TOO_OLD):
        problems.append(
            f"its vLLM {report.vllm} takes whole updates alone, not the pieces of rollout.transport=device: install a "
            "newer one, or set rollout.transport=host"
        )
    if terms.nccl and terms.nccl != report.nccl:
        theirs = f"NCCL {report.nccl}" if report.nccl else "no NCCL"
        problems.append(
            f"its servers have {theirs}, the trainer has {terms.nccl}, and they cannot talk: start its agent with "
            "VLLM_NCCL_SO_PATH=<a libnccl.so.2 of the trainer's version>, install the same nvidia-nccl package in both "
            "environments, or set rollout.transport=host"
        )
    return Refusal("; ".join(problems)) if problems else None
