"""What the tests of a mixture of experts run in child processes: one job of one rank, then one of two.

`main(FOLDER)` forks the ranks; rank 0 of each job writes `world<W>.pt`, a dictionary {scenario: result}.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.telemetry.metrics import values
from tests.forks import fork_ranks, import_megatron
from tests.policy_scenarios import (
    LOSS,
    ROPE_THETA,
    VOCAB,
    Job,
    Layout,
    gradient_with,
    logprobs_of_all,
    make_train_batch,
)
from tests.tiny import save_tiny_model

Scenarios = dict[str, Callable[[Job], Any]]

MODEL = "mixture"
LAYERS = 4
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    1: {"one rank": Layout()},
    2: {
        "data": Layout(),
        "experts": Layout(ep=2),
        "tensor and experts": Layout(tp=2, sp=True, ep=2),
        "context": Layout(cp=2),
        "pipeline": Layout(pp=2, vpp=2),
    },
}


def note_counts(policy: Any) -> list[Tensor]:
    """What each update counts from now on."""
    taken: list[Tensor] = []
    take = policy.expert_load.take_counts

    def noted() -> Tensor:
        taken.append(take())
        return taken[-1]

    policy.expert_load.take_counts = noted
    return taken


def load(layout: Layout, megatron: dict[str, Any]) -> Callable[[Job], dict[str, Any]]:
    """What two updates count, and say of it in the first; the weights of the second are not the first's."""

    def scenario(job: Job) -> dict[str, Any]:
        policy, batch = job.policy(layout, MODEL, megatron=megatron), make_train_batch()
        counts = note_counts(policy)
        said = values(policy.update(batch, LOSS, None))
        policy.logprobs(batch)  # is not counted
        policy.update(batch, LOSS, None)
        return {"counts": counts} | {name: said[name] for name in said if name.startswith("moe_")}

    return scenario


def replay(layout: Layout, megatron: dict[str, Any]) -> Callable[[Job], dict[str, Any]]:
    """Routes recorded and followed, by the same weights and by another router."""

    def scenario(job: Job) -> dict[str, Any]:
        plain, batch = job.policy(layout, MODEL, megatron=megatron), make_train_batch()
        out: dict[str, Any] = {"plain": logprobs_of_all(plain, batch)}
        policy = job.policy(layout, MODEL, megatron=megatron, replay_routes=True, with_reference=True)
        out["recorded"] = logprobs_of_all(policy, batch)
        out["routes"] = batch.routes
        out["replayed"] = logprobs_of_all(policy, batch)
        out["gradient"] = gradient_with(policy, batch, LOSS, out["plain"], 128)["gradient"]
        out["plain gradient"] = gradient_with(plain, make_train_batch(), LOSS, out["plain"], 128)["gradient"]

        other_router(policy)
        taken, calls = note_counts(policy), count_calls(policy)
        out["other gradient"] = gradient_with(policy, batch, LOSS, out["plain"], 128)["gradient"]
        out |= {"counts of the other": taken[0], "counts of all its calls": calls()}
        out["other"] = logprobs_of_all(policy, batch)
        own = make_train_batch()
        out["other by itself"] = logprobs_of_all(policy, own)
        out["routes of the other"] = own.routes
        reference = policy.reference_logprobs(batch)
        dist.all_reduce(reference, group=parallel_state().get_data_parallel_group())
        out["reference"] = reference
        half = batch.select(torch.arange(4, 8))
        assert half.routes is not None
        assert batch.routes is not None
        out["selected"] = torch.equal(half.routes, batch.routes[batch.token_indices(torch.arange(4, 8))])
        return out

    return scenario


def parallel_state() -> Any:
    from megatron.core import parallel_state

    return parallel_state


@torch.no_grad()
def other_router(policy: Any) -> None:
    """Noise on the routers' weights, the same on every rank."""
    from nemo_dapo.megatron.moe import routers

    for router in routers(policy.model):
        generator = torch.Generator().manual_seed(router.layer_number)
        router.weight += 0.3 * router.weight.std() * torch.randn(router.weight.shape, generator=generator)


def count_calls(policy: Any) -> Callable[[], Tensor]:
    """[L, E] tokens of all ranks that every call of a router from now on sends to an expert, filling included."""
    from nemo_dapo.megatron.moe import routers

    counts = torch.zeros_like(policy.expert_load.counts)

    def count(router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        counts[router.layer_number - 1] += output[1].sum(0)

    hooks = [router.register_forward_hook(count) for router in routers(policy.model)]

    def total() -> Tensor:
        for hook in hooks:
            hook.remove()
        dist.all_reduce(counts)
        return counts

    return total


def sequences_for_attention(layout: Layout) -> Callable[[Job], list[Any]]:
    """The packed sequences that a micro-batch is run with."""

    def scenario(job: Job) -> list[Any]:
        from nemo_dapo.megatron import policy as module

        policy, original = job.policy(layout, MODEL), module.PackedSeqParams
        seen: list[dict[str, Any]] = []

        def noted(**said: Any) -> Any:
            seen.append(said)
            return original(**said)

        with mock.patch.object(module, "PackedSeqParams", noted):
            policy.logprobs(make_train_batch())
        return seen

    return scenario


def scenarios_of(name: str, layout: Layout) -> Scenarios:
    return {
        f"load, {name}": load(layout, {}),
        f"load, {name}, recomputed": load(layout, RECOMPUTED),
        f"replay, {name}": replay(layout, {}),
        f"replay, {name}, recomputed": replay(layout, RECOMPUTED),
        f"attention, {name}": sequences_for_attention(layout),
    }


SCENARIOS: dict[int, Scenarios] = {
    ranks: {n: one for name, layout in layouts.items() for n, one in scenarios_of(name, layout).items()}
    for ranks, layouts in LAYOUTS.items()
}


def run_rank(folder: Path, ranks: int, rank: int, scenarios: Scenarios) -> None:
    torch.set_num_threads(1)
    job, results = Job(folder, ranks, rank), {}
    job.join(f"meet{ranks}")
    for name, scenario in scenarios.items():
        try:
            results[name] = scenario(job)
        except Exception:
            (folder / f"failed-{ranks}-{rank}").write_text(f"{name}\n{traceback.format_exc()}")
            raise
    if rank == 0:
        torch.save(results, folder / f"world{ranks}.pt")


def run_jobs(folder: Path, jobs: dict[int, Scenarios]) -> None:
    """One job for each number of ranks, whose processes are forks of this one. Raises RuntimeError when a rank fails."""
    import_megatron()
    for ranks, scenarios in jobs.items():
        fork_ranks([(run_rank, (folder, ranks, rank, scenarios)) for rank in range(ranks)], folder)


def main(folder: Path) -> None:
    save_tiny_model(
        folder / "models" / MODEL,
        family="qwen3_moe",
        tied=False,
        rope_theta=ROPE_THETA,
        vocab=VOCAB,
        layers=LAYERS,
    )
    run_jobs(folder, SCENARIOS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
