"""Messages between ranks are JSON in tensors, on real processes over gloo, and nothing is pickled."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_dapo import collectives
from nemo_dapo.collectives import Neighbours, gather_json
from nemo_dapo.telemetry.metrics import Last, Max, Mean, Metric, Min, Sum, merge_across_ranks, values

PACKAGE = Path(collectives.__file__).parent


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    mine = {"rank": rank, "text": "é" * 40 * rank, "list": [[rank, None], math.inf]}
    assert gather_json(mine) == [{"rank": r, "text": "é" * 40 * r, "list": [[r, None], math.inf]} for r in range(3)]
    record: dict[str, Metric] = {"mean": Mean(float(rank), 2), "sum": Sum(rank), "min": Min(rank)}
    record["max"] = Max([1.0, math.nan, 2.0][rank])
    if rank == 1:
        record["last"] = Last(5.0)
    merged = values(merge_across_ranks(record))
    assert math.isnan(merged.pop("max"))
    assert merged == {"mean": 0.5, "sum": 3, "min": 0, "last": 5.0}
    near = Neighbours(["a", "b", "a"], 30.0)
    assert (near.host, near.is_first) == [("a", True), ("b", True), ("a", False)][rank]
    assert near.gather(rank) == ([1] if rank == 1 else [0, 2])
    near.meet(30.0)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Rr]ank 1 failed to pass monitoredBarrier"):  # of the two on "a"
            near.meet(0.5)
    dist.barrier()
    collectives.MAX_BYTES = 100
    with pytest.raises(ValueError, match=r"rank 1 has 202 bytes to share, at most 100"):
        gather_json("x" * 200 if rank == 1 else "")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_rank_gets_the_values_of_all_in_rank_order_and_too_long_ones_are_refused(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(tmp_path,), nprocs=3)  # raises what a rank raises


def test_the_package_pickles_nothing() -> None:
    """Neither torch's object collectives nor pickle itself, but for the reader whose trade it is to refuse what one names;
    `.to_object` of OmegaConf is something else."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", "")
            assert not name.endswith(("_object", "_object_list")) or name == "to_object", f"{path}: {name}"
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "pickle" not in imported or path.name == "unpickling.py", path
