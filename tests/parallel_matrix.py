"""One batch under every layout of up to four ranks: the same gradient, weights and log-probabilities as on one rank.

A case is a model, a layout and a budget of tokens a micro-batch. The reference is one rank with one micro-batch. Each
layout forks ranks of its own, since its process groups leave threads behind; they run its cases one after another, and
rank 0 compares.
"""

from __future__ import annotations

import itertools
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import policy_scenarios as scenarios
from tests.forks import fork_ranks, import_megatron
from tests.policy_scenarios import ROPE_THETA, VOCAB, Job, Layout, gradient_with, logprobs_of_all, weights_of
from tests.tiny import save_tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "dense, tied": {"family": "qwen2", "tied": True},
    "dense, untied": {"family": "qwen3", "tied": False},
    "experts, untied": {"family": "qwen3_moe", "tied": False},
    "experts, tied": {"family": "qwen3_moe", "tied": True},
}
LAYERS, HEADS, KV_HEADS = 4, 8, 4  # so that four stages, two parts of two stages, and four tensor-parallel ranks divide
BUDGETS = {"one pack": 10_000, "packs": 128, "one by one": scenarios.LONGEST}
RANKS = (1, 2, 4)
GRADIENT_TOLERANCE = 1e-5  # relative, of the whole gradient's norm, in float32; a wrong denominator is at 1e-2
# Adam divides by the gradient's size, so after two steps rounding of tiny entries shows: 3e-6 nats were seen.
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    model: str
    ranks: int
    layout: Layout
    budget: str

    @property
    def data_parallel(self) -> int:
        return self.ranks // (self.layout.tp * self.layout.pp * self.layout.cp)


def case_of(result: dict[str, Any]) -> Case:
    """The case of a line of results."""
    return Case(result["model"], result["ranks"], Layout(**result["layout"]), result["budget"])


def layouts(ranks: int, experts: bool) -> Iterator[Layout]:
    """Every layout of `ranks` ranks, sequence parallelism on and off where it may be."""
    sizes = [n for n in RANKS if n <= ranks]
    for tp, pp, cp, ep in itertools.product(sizes, sizes, sizes, sizes if experts else [1]):
        if ranks % (tp * pp * cp) or ranks % (ep * pp):
            continue
        for sp, vpp in itertools.product({False, tp > 1}, {1, 2 if pp == 2 else 1}):
            if not (experts and tp > 1 and not sp):  # refused: config/checks.py
                yield Layout(tp=tp, pp=pp, sp=sp, cp=cp, vpp=vpp, ep=ep)


def cases() -> list[Case]:
    """All of them, but the reference itself."""
    every = (
        Case(model, ranks, layout, budget)
        for ranks in RANKS
        for model in MODELS
        for layout in layouts(ranks, "experts" in model)
        for budget in BUDGETS
    )
    return [case for case in every if not (case.ranks == 1 and case.budget == "one pack")]


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    """Every two settings that the case has together."""
    settings = sorted(
        (asdict(case.layout) | {"model": case.model, "dp": case.data_parallel, "budget": case.budget}).items()
    )
    return set(itertools.combinations(settings, 2))


def pairwise(every: list[Case]) -> list[Case]:
    """Few cases in which any two settings that occur together in `every` still do; greedy, the same each time."""
    left = set().union(*(pairs_of(case) for case in every))
    chosen = []
    while left:
        best = max(every, key=lambda case: (len(pairs_of(case) & left), -case.ranks))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative, over all tensors together."""
    assert a.keys() == b.keys()
    off = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    return float((off / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5)


def measure(job: Job, model: str, layout: Layout, budget: str) -> dict[str, Any]:
    """Gradient of the first step, then weights and log-probabilities after two; `layout` becomes the job's."""
    policy, batch = job.policy(layout, model.replace(", ", "_"), tokens=BUDGETS[budget]), scenarios.make_train_batch()
    old = scenarios.noisy_old_logprobs(policy, batch)
    first = gradient_with(policy, batch, scenarios.LOSS, old, BUDGETS[budget])
    for _ in range(2):
        policy.update(batch, scenarios.LOSS, old)
    after = logprobs_of_all(policy, batch)
    return {"gradient": first["gradient"], "norm": first["norm"], "weights": weights_of(policy), "logprobs": after}


def compared(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    return {
        "gradient": distance(found["gradient"], reference["gradient"]),
        "norm": abs(found["norm"] / reference["norm"] - 1),
        "weights": distance(found["weights"], reference["weights"]),
        "logprobs": float((found["logprobs"] - reference["logprobs"]).abs().max()),
    }


def is_equal(differences: dict[str, float]) -> bool:
    return (
        max(differences["gradient"], differences["norm"], differences["weights"]) < GRADIENT_TOLERANCE
        and differences["logprobs"] < LOGPROB_TOLERANCE
    )


def run_rank(folder: Path, ranks: int, rank: int, name: str, wanted: list[Case]) -> None:
    """One rank's cases; rank 0 appends a line of JSON for each to `results`. `name` is this job's alone."""
    torch.set_num_threads(1)
    job = Job(folder, ranks, rank)
    job.join(name)
    for case in wanted:
        reference, started = folder / f"{case.model}.pt", time.monotonic()
        try:
            found = measure(job, case.model, case.layout, case.budget)
        except Exception:
            (folder / f"failed-{ranks}-{rank}").write_text(f"{case}\n{traceback.format_exc()}")
            raise
        if rank == 0:
            line = asdict(case) | compared(found, torch.load(reference)) | {"seconds": time.monotonic() - started}
            with (folder / "results").open("a") as results:
                results.write(json.dumps(line) + "\n")


def run_reference(folder: Path) -> None:
    torch.set_num_threads(1)
    job = Job(folder, 1, 0)
    job.join("meet")
    for model in MODELS:
        torch.save(measure(job, model, Layout(), "one pack"), folder / f"{model}.pt")


def run(folder: Path, wanted: list[Case]) -> Iterator[dict[str, Any]]:
    """Run the cases in `folder`; yields each case's settings and differences. Raises RuntimeError when a rank fails."""
    for i, (model, options) in enumerate(MODELS.items()):
        path = folder / "models" / model.replace(", ", "_")
        save_tiny_model(
            path, rope_theta=ROPE_THETA, vocab=VOCAB, seed=i, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, **options
        )
    import_megatron()
    fork_ranks([(run_reference, (folder,))], folder)
    results = folder / "results"
    for number, (ranks, layout) in enumerate(dict.fromkeys((case.ranks, case.layout) for case in wanted)):
        results.write_text("")
        mine = [case for case in wanted if (case.ranks, case.layout) == (ranks, layout)]
        fork_ranks([(run_rank, (folder, ranks, rank, f"meet{number}", mine)) for rank in range(ranks)], folder)
        yield from map(json.loads, results.read_text().splitlines())
