"""A run's checkpoint into a sharded Hugging Face folder, or back, on a CPU and in little memory.

    python examples/convert_checkpoint.py --to hf runs/x/checkpoints/step_000100 models/x-100
    python examples/convert_checkpoint.py --to megatron models/sft runs/y/checkpoints/step_000000 --model models/base

Checkpoints of any layout of ranks are read, also those with adapters, which are merged. One that is written holds weights
alone: a run in that folder begins with them, its optimizer, schedule, data and counters at their beginning. Memory holds
one file of the target and one tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a machine that has GPUs converts on its CPU too
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nemo_dapo import entry, hf_folder
from nemo_dapo.config import Fp8, ModelConfig, ParallelConfig, Precision
from nemo_dapo.config.compose import saved_model

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_dapo.megatron.conversion import Converter

SAID_EVERY = 10.0  # seconds
START = "step_000000"  # what a run begins with


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's checkpoints/step_*, or a Hugging Face folder")
    parser.add_argument("target", type=Path, help=f"the folder to write; a checkpoint's is a run's checkpoints/{START}")
    parser.add_argument("--to", choices=["hf", "megatron"], required=True)
    parser.add_argument(
        "--model", help="the folder that the run starts from: by default its model.path, or the source itself"
    )
    parser.add_argument(
        "--precision", choices=[one.value for one in Precision], help="of a checkpoint's weights (bf16)"
    )
    parser.add_argument("--max-shard-bytes", type=int, default=hf_folder.SHARD_BYTES, help="of one file (5e9)")
    return parser.parse_args(given)


def options_of(args: argparse.Namespace) -> ModelConfig:
    """The options of the model that is converted: those of the run that wrote the checkpoint.

    Raises ValueError where they cannot be found.
    """
    if args.to == "megatron":
        return ModelConfig(path=args.model or str(args.source), precision=Precision(args.precision or "bf16"))
    written = args.source.parent.parent / "config.yaml"
    if not written.is_file() and not args.model:
        raise ValueError(f"there is no {written}: say by --model which folder the run started from")
    options = saved_model(written) if written.is_file() else ModelConfig()
    options.path = args.model or options.path
    options.fp8 = Fp8.none  # of products on GPUs: weights are the same
    return options


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be converted, or would be overwritten."""
    marker = "manifest.json" if args.to == "hf" else "config.json"
    if not (args.source / marker).is_file():
        kind = "checkpoint" if args.to == "hf" else "Hugging Face folder"
        raise ValueError(f"{args.source} has no {marker}; expected a {kind} for --to {args.to}")
    if args.target.exists():
        raise ValueError(f"{args.target} is there already; name another target, or remove it")
    if args.to == "megatron" and args.target.name != START:
        raise ValueError(f"a run begins with a checkpoint called {START}; expected that in place of {args.target.name}")
    if args.to == "hf" and args.precision:
        raise ValueError("--precision is of a checkpoint to write; a folder gets the weights as they were saved")
    if args.max_shard_bytes <= 0:
        raise ValueError(f"--max-shard-bytes={args.max_shard_bytes} must be above 0")


def to_folder(args: argparse.Namespace, options: ModelConfig) -> None:
    """Raises ValueError for a damaged checkpoint, and one of another model."""
    from nemo_dapo import checkpoint
    from nemo_dapo.megatron.conversion import Converter

    print(f"comparing {args.source} with its manifest", flush=True)
    checkpoint.require_whole(args.source, Path(options.path), None)
    state = checkpoint.read_state_without_window(args.source.parent, int(args.source.name.removeprefix("step_")))
    options.precision = Precision(state["precision"])
    weights = said(Converter(options).weights_of(args.source / "policy"))
    hf_folder.write_model(args.target, weights, Path(options.path), args.max_shard_bytes)


def to_checkpoint(args: argparse.Namespace, options: ModelConfig) -> None:
    """Raises ValueError where the source's weights are not those of the model."""
    from nemo_dapo import checkpoint
    from nemo_dapo.megatron.conversion import Converter

    model = Path(options.path)
    sent = hf_folder.expected_weights(args.source).shapes
    if found := hf_folder.mismatch(sent, hf_folder.expected_weights(model)):
        raise ValueError(
            f"{args.source} has not the weights of --model {model} ({found}); name the model that it is of"
        )
    state = {"model": hf_folder.fingerprint(model), "precision": options.precision.value, "weights_alone": True}
    weights = WeightsOf(args.source, Converter(options), args.max_shard_bytes)
    checkpoint.save(args.target.parent, 0, weights, state, keep=0, group=None)


class WeightsOf:
    """What `checkpoint.save` saves in place of a policy: the weights of a folder."""

    def __init__(self, source: Path, converter: Converter, file_bytes: int) -> None:
        self.source, self.converter, self.file_bytes = source, converter, file_bytes
        self.path = Path()

    def take(self, path: Path, *, portable: bool, apart: bool) -> WeightsOf:
        """They lie on the disk, where nothing changes them."""
        self.path = path
        return self

    def write(self) -> list[Path]:
        return self.converter.save(self.source, self.path, self.file_bytes)

    def finish(self) -> list[Path]:
        return []


def said(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`weights`, with a line on the console every few seconds."""
    done, start = 0, time.monotonic()
    last = start
    for name, weight in weights:
        done += weight.nbytes
        if time.monotonic() - last > SAID_EVERY:
            last = time.monotonic()
            print(f"{done / 1e9:.2f} GB, {done / 1e6 / (last - start):.0f} MB/s, at {name}", flush=True)
        yield name, weight
        del weight  # the next one needs the memory


def convert(args: argparse.Namespace) -> None:
    entry.require("megatron.core", "megatron.bridge")
    check(args)
    options, start = options_of(args), time.monotonic()
    print("importing Megatron (about 20 s)", flush=True)
    from nemo_dapo.megatron import parallel

    with ExitStack() as stack:
        parallel.initialize(ParallelConfig(), seed=0)
        stack.callback(parallel.shut_down)
        (to_folder if args.to == "hf" else to_checkpoint)(args, options)
    print(f"written to {args.target} in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    entry.quiet_libraries()
    try:
        convert(arguments(sys.argv[1:]))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
