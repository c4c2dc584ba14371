"""Memory and time of converting a random model of 2 B parameters to a checkpoint and back: `python benchmarks/convert.py`.

The model is Qwen3-1.7B's with an output layer of its own, 4.06 GB of bfloat16; it takes 12.2 GB of disk below --folder.
What a process held after its imports is taken off its peak. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoint_memory import peak_of
from examples import convert_checkpoint
from nemo_dapo import hf_folder
from tests.presets import QWEN3
from tests.tiny import save_tiny_tokenizer

CONFIG = QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
MB = 1e6


def shapes() -> dict[str, torch.Size]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIG)
    with torch.device("meta"):
        return {name: one.shape for name, one in AutoModelForCausalLM.from_config(config).named_parameters()}


def write_random(folder: Path, shard_bytes: int) -> int:
    """A model folder of random weights; returns their number."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_tiny_tokenizer(folder)
    wanted = shapes()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in wanted.items():
            yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)

    hf_folder._write_shards(folder, hf_folder.buckets(weights(), shard_bytes))
    return sum(shape.numel() for shape in wanted.values())


def measured(name: str, arguments: list[str], results: Any) -> None:
    peak, seconds = peak_of(lambda: convert_checkpoint.convert(convert_checkpoint.arguments(arguments)))
    results[name] = {"peak_mb": peak * 2**20 / MB, "seconds": seconds}


def are_equal(first: Path, second: Path) -> bool:
    ours, theirs = hf_folder.FolderTensors(first), hf_folder.FolderTensors(second)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="on a disk with room")
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    args = parser.parse_args()
    from nemo_dapo.megatron import cpu

    cpu.install()
    from nemo_dapo.megatron import weights

    weights._import_bridge()
    from nemo_dapo.megatron import conversion

    assert conversion is not None
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=args.folder) as name, fork.Manager() as manager:
        model, start, back = Path(name) / "model", Path(name) / "run" / "step_000000", Path(name) / "back"
        parameters, results = write_random(model, args.shard_bytes), manager.dict()
        print(f"{parameters:,} parameters", flush=True)
        size = ["--max-shard-bytes", str(args.shard_bytes)]
        for to, given in {
            "megatron": [str(model), str(start)],
            "hf": [str(start), str(back), "--model", str(model)],
        }.items():
            process = fork.Process(target=measured, args=(to, ["--to", to, *given, *size], results))
            process.start()
            process.join()
            print(f"to {to}: {results[to]}", flush=True)
        largest = max(shape.numel() * 2 for shape in shapes().values())
        bound = (1.3 * args.shard_bytes + largest) / MB
        print(json.dumps(dict(results) | {"bound_mb": bound, "bit_equal": are_equal(model, back)}))


if __name__ == "__main__":
    main()
