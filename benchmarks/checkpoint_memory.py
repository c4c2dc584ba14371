"""Host memory that a checkpoint takes of each rank, by number of replicas: `python benchmarks/checkpoint_memory.py`.

Ranks of one layout (tensor and pipeline parallel size 1) save and load a random model in both forms, over gloo on a CPU
host. What a rank held before is taken off its peak, so that the model itself, which shrinks with more replicas as the
optimizer's states are dealt out, does not count. A save `apart` is that of checkpoint.asynchronous. Reading is `shared`
among the replicas, which pass on what they read to those that want it too, or each rank reads `alone`; the policy shares
but for the optimizer's states of a portable one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from nemo_dapo.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision
from nemo_dapo.losses.dapo import make_loss_fn
from nemo_dapo.types import TrainBatch
from tests.tiny import save_tiny_model

FORMS = {"by rank": False, "portable": True}
READINGS: dict[str, dict[str, Any]] = {
    "shared": {"_is_portable": lambda form: False, "_check_layout": lambda form: None},
    "alone": {"FullyParallelLoadStrategyWrapper": lambda strategy, group: strategy},
}
MIB = 2**20


def peak_of(work: Callable[[], Any]) -> tuple[float, float]:
    """MiB by which this process's memory rose above what it held before, at most; seconds."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start = time.perf_counter()
    work()
    return (_status("VmHWM") - before) / MIB, time.perf_counter() - start


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_rank(folder: Path, replicas: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{replicas}", rank=rank, world_size=replicas)
    from nemo_dapo.megatron import checkpoint, parallel
    from nemo_dapo.megatron.policy import MegatronPolicy

    parallel.initialize(ParallelConfig(), seed=1)

    def fresh() -> Any:
        options = ModelConfig(path=str(folder / "model"), precision=Precision.bf16)
        return MegatronPolicy(options, ParallelConfig(), OptimizerConfig(), tokens_per_microbatch=64)

    policy, tokens = fresh(), torch.arange(2, 18)
    batch = TrainBatch(tokens, torch.tensor([8, 8]), torch.tensor([2, 2]), torch.zeros(16), torch.ones(2))
    policy.update(batch, make_loss_fn(AlgorithmConfig()), None)
    parameters = sum(p.numel() for p in policy.model[0].parameters())
    found: dict[Any, Any] = {"parameters": parameters}

    def save(place: Path, **options: bool) -> None:
        if rank == 0:
            place.mkdir()
        dist.barrier()
        policy.take(place, **options).complete()

    for form, portable in FORMS.items():
        for where, apart in {"": False, " apart": True}.items():
            work = functools.partial(save, folder / f"{form} {replicas}{where}", portable=portable, apart=apart)
            found["save", form, where.strip()] = peak_of(work)
    for form in FORMS:
        for reading, patched in READINGS.items():
            with ExitStack() as stack:
                for name, stand_in in patched.items():
                    stack.enter_context(mock.patch.object(checkpoint, name, stand_in))
                place = folder / f"{form} {replicas}"
                found["load", form, reading] = peak_of(lambda place=place: policy.load(place))  # type: ignore[misc]
    torch.save(found, folder / f"found{replicas}-{rank}.pt")
    dist.destroy_process_group()


def measure(folder: Path, replicas: int) -> list[dict[Any, Any]]:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(folder, replicas, rank)) for rank in range(replicas)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [torch.load(folder / f"found{replicas}-{rank}.pt", weights_only=False) for rank in range(replicas)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16384)
    args = parser.parse_args()
    from nemo_dapo.megatron import cpu

    cpu.install()
    from nemo_dapo.megatron import policy, weights

    assert policy is not None
    weights._import_bridge()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny_model(folder / "model", hidden=args.hidden, layers=args.layers, vocab=args.vocab, heads=8)
        found = {replicas: measure(folder, replicas) for replicas in args.replicas}
    states = 12 * found[args.replicas[0]][0]["parameters"] / MIB
    print(
        f"master weights and moments: {states:.0f} MiB in all. MiB above what the rank held, and seconds, largest rank:\n"
    )
    print("| | form | reading |" + "".join(f" {replicas} replica(s) |" for replicas in args.replicas))
    print("|---|---|---|" + "---:|" * len(args.replicas))
    for key in (key for key in found[args.replicas[0]][0] if key != "parameters"):
        cells = [max(rank[key] for rank in found[replicas]) for replicas in args.replicas]
        print(f"| {' | '.join(key)} |" + "".join(f" {mib:.0f} ({seconds:.1f} s) |" for mib, seconds in cells))


if __name__ == "__main__":
    main()
