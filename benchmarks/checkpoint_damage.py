"""What is said of a damaged checkpoint, and what looking costs: `python benchmarks/checkpoint_damage.py [--help]`.

One process saves two checkpoints of a small random model by Megatron. Each file of the newer one is then damaged in five
ways, one at a time, and the run's own choice is made; after that single bits of all files are flipped. Saving and loading
are timed with and without digests. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nemo_dapo import checkpoint, digests
from nemo_dapo.config import ModelConfig, OptimizerConfig, ParallelConfig, Precision
from nemo_dapo.megatron import parallel
from tests.tiny import save_tiny_model

OLDER, NEWER = 4, 8
HASHED_BYTES = 1 << 30


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make_policy(model: Path) -> Any:
    config = ParallelConfig()
    parallel.initialize(config, seed=1)
    from nemo_dapo.megatron.policy import MegatronPolicy

    options = ModelConfig(path=str(model), precision=Precision.fp32)
    return MegatronPolicy(options, config, OptimizerConfig(), tokens_per_microbatch=128)


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def damages(name: str, pristine: Path) -> dict[str, Callable[[Path], object]]:
    size = (pristine / name).stat().st_size
    other = pristine.parent / f"step_{OLDER:06d}" / name
    return {
        "truncated": lambda file: os.truncate(file, size // 2),
        "emptied": lambda file: os.truncate(file, 0),
        "deleted": lambda file: file.unlink(),
        "bit flipped": lambda file: flip(file, 8 * (size // 2)),
        "another's": lambda file: shutil.copyfile(other, file),
    }


def table_of_damages(saved: Path, work: Path) -> list[dict[str, Any]]:
    """One row a file and damage: what was said, and the step that was chosen."""
    newest = saved / f"step_{NEWER:06d}"
    rows = []
    for name in sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()):
        for damage, apply in damages(name, newest).items():
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(saved, work)
            apply(work / newest.name / name)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                chosen = checkpoint.choose(work, None)
            same = (newest / name).read_bytes() == (saved / f"step_{OLDER:06d}" / name).read_bytes()
            rows.append(
                {
                    "file": name,
                    "damage": damage + (" (equal to it)" if damage == "another's" and same else ""),
                    "said": said.getvalue().strip().replace(f"{work}/", ""),
                    "used": chosen,
                }
            )
    return rows


def bits_found(saved: Path, flips: int) -> int:
    """Of `flips` single bits, spread over all files by their bytes, how many are found."""
    place, chance = saved / f"step_{NEWER:06d}", random.Random(0)
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    found = 0
    for file in chance.choices(files, weights=[file.stat().st_size for file in files], k=flips):
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        found += bool(checkpoint.verify(place, None))
        flip(file, bit)
    assert checkpoint.verify(place, None) == []
    return found


def seconds_of_hashing(folder: Path) -> float:
    """A GB, from the page cache: what hashing adds where the disk is not the limit."""
    file = folder / "bytes"
    file.write_bytes(os.urandom(1 << 20) * (HASHED_BYTES >> 20))
    digests.digest(file)
    seconds = min(timed(lambda: digests.digest(file)) for _ in range(3))
    file.unlink()
    return seconds / (HASHED_BYTES / 1e9)


def times(policy: Any, folder: Path) -> dict[str, float]:
    """Seconds of a save and a load of the policy alone, and of a checkpoint with its manifest; the second of two each."""
    out: dict[str, float] = {}
    for round in range(2):
        plain = folder / f"plain_{round}"
        plain.mkdir(parents=True)
        out["save policy"] = timed(lambda at=plain: policy.take(at).complete())  # type: ignore[misc]
        directory = folder / f"whole_{round}"
        out["save checkpoint"] = timed(
            lambda at=directory: checkpoint.save(at, 1, policy, {}, keep=0, group=None)  # type: ignore[misc]
        )
        out |= times_behind(policy, folder / f"behind_{round}")
        out["load policy"] = timed(lambda at=plain: policy.load(at))  # type: ignore[misc]
        out["choose"] = timed(lambda at=directory: checkpoint.choose(at, None))  # type: ignore[misc]
        out["load checkpoint"] = timed(lambda at=directory: checkpoint.load(at, 1, policy))  # type: ignore[misc]
        out["GB"] = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e9
    return out


def times_behind(policy: Any, directory: Path) -> dict[str, float]:
    """Seconds of a checkpoint that is written behind the training: what the training waits for at first, until a thread has
    written it, and what it waits for at the end."""
    begun = time.perf_counter()
    writing = checkpoint.save_behind(directory, 1, policy, {}, group=None, portable=True)
    out = {"begin behind": time.perf_counter() - begun}
    writing.share.result()
    out["written behind"] = time.perf_counter() - begun
    return out | {"finish behind": timed(lambda: writing.finish(keep=0))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100, help="single bits to flip")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model whose saving is timed")
    parser.add_argument("--layers", type=int, default=12, help="its layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint_damage_") as name:
        folder = Path(name)
        policy = make_policy(save_tiny_model(folder / "small"))
        for step in (OLDER, NEWER):
            state = {"progress": {"rollout_steps": step}}
            checkpoint.save(folder / "saved", step, policy, state, keep=0, group=None)
            with torch.no_grad():
                next(policy.model[0].parameters()).add_(1.0)  # the two must differ
        rows = table_of_damages(folder / "saved", folder / "work")
        found = bits_found(folder / "saved", options.flips)
        hashing = seconds_of_hashing(folder)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        large = save_tiny_model(folder / "large", hidden=options.hidden, layers=options.layers)
        seconds = times(make_policy(large), folder / "timed")
        parallel.shut_down()
    for row in rows:
        print(f"{row['file']:24} {row['damage']:24} used step {row['used']}: {row['said'] or 'nothing'}")
    print(f"bit flips found: {found} of {options.flips}")
    print(f"hashing: {hashing:.3f} s a GB")
    print(", ".join(f"{what} {value:.2f}" + (" s" if what != "GB" else "") for what, value in seconds.items()))
    summary = {"damages": len(rows), "older used": sum(row["used"] == OLDER for row in rows)}
    print(json.dumps(summary | {"flips": options.flips, "found": found, "hashing s/GB": hashing, "seconds": seconds}))


if __name__ == "__main__":
    main()
