"""A Hugging Face model folder as files: what it holds, whose model it is, and writing one.

Knows safetensors headers and file names only: neither Megatron nor vLLM, which both build on it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError

from nemo_dapo.digests import digest

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5_000_000_000  # of one written file, as transformers has it
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TIED_OUTPUT = "lm_head.weight"
TOKENIZER_FILES = ("*token*", "vocab.*", "merges.txt", "chat_template.jinja", "special_tokens_map.json")
NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn"}
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class ExpectedWeights:
    """Name, shape and dtype of every parameter of a Hugging Face folder; `optional` names may be sent or not."""

    shapes: Mapping[str, tuple[int, ...]]
    optional: frozenset[str] = frozenset()
    dtypes: Mapping[str, str] = field(default_factory=dict)  # by torch's names

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def expected_weights(folder: Path) -> ExpectedWeights:
    """Read the headers of a folder's safetensors files; raises ValueError where it has none."""
    entries = {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    dtypes = {name: TORCH_DTYPES.get(entry["dtype"], entry["dtype"]) for name, entry in entries.items()}
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    optional = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}  # a buffer that old folders hold
    return ExpectedWeights(shapes, frozenset(optional | ({TIED_OUTPUT} if tied else set())), dtypes)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's model; raises ValueError where it has none."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        single = folder / SINGLE
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors files; save the model with safe serialization")
    return files


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in one safetensors file."""
    return {name: tuple(entry["shape"]) for name, entry in read_header(file).items()}


class FolderTensors(Mapping[str, "Tensor"]):
    """The tensors of a folder by name, each read anew into memory of its own: safetensors maps whole files instead."""

    def __init__(self, folder: Path) -> None:
        self.places = {
            name: (file, entry) for file in weight_files(folder) for name, entry in read_header(file).items()
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        file, entry = self.places[name]
        start, end = entry["data_offsets"]
        content = torch.empty(end - start, dtype=torch.uint8)
        with file.open("rb", buffering=0) as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            opened.seek(8 + length + start)
            view = memoryview(content.numpy())  # type: ignore[arg-type]
            while len(view):
                if not (count := opened.readinto(view)):
                    raise ValueError(f"{file} ends within {name}; restore it from a copy")
                view = view[count:]
        return content.view(getattr(torch, TORCH_DTYPES[entry["dtype"]])).view(entry["shape"])


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of each tensor: an 8-byte little-endian length, then a JSON header of that length."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def fingerprint(folder: Path) -> dict[str, Any]:
    """Whose model a folder holds, as JSON: its architecture, digests of its tokenizer's files, of samples of its weights.

    Samples, because all of them may take minutes to read: the headers, and SAMPLES pieces spread over each file.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern))]
    return {
        "config": {name: value for name, value in config.items() if name not in NOT_ARCHITECTURE},
        "tokenizer": {file.name: digest(file).xxh3 for file in tokenizer},
        "weights": _sampled(weight_files(folder)),
    }


def _sampled(files: Iterable[Path]) -> str:
    state = xxhash.xxh3_128()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            for k in range(SAMPLES + 1):
                opened.seek(max(0, (size - SAMPLE_BYTES) * k // SAMPLES))
                state.update(opened.read(SAMPLE_BYTES))
        state.update(f"{file.name} {size}".encode())
    return state.hexdigest()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two fingerprints differ, one phrase each, the saved value first."""
    found = []
    for kind, first in saved.items():
        second = now.get(kind)
        if isinstance(first, dict) and isinstance(second, dict):
            names = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
            shown = kind == "config"  # the others are digests
            found += [f"{n} {first.get(n)} -> {second.get(n)}" if shown else f"{n} differs" for n in names]
        elif first != second:
            found.append(f"{kind} differ" if kind == "weights" else f"{kind} {first} -> {second}")
    return found


def check_weights(sent: Mapping[str, tuple[int, ...]], expected: ExpectedWeights) -> None:
    """Raise ValueError that lists missing and unexpected names and wrong shapes, if there are any."""
    if found := mismatch(sent, expected):
        raise ValueError(
            f"the exported weights are not those of the model folder ({found}); expected each of its "
            f"{len(expected.shapes)} parameters exactly once: nothing was replaced"
        )


def mismatch(sent: Mapping[str, tuple[int, ...]], expected: ExpectedWeights) -> str:
    """Missing and unexpected names and wrong shapes, the first ones of each; empty where there are none."""
    missing = sorted(expected.shapes.keys() - sent.keys() - expected.optional)
    unexpected = sorted(sent.keys() - expected.shapes.keys() - expected.optional)
    wrong = [
        f"{name} {sent[name]} instead of {shape}"
        for name, shape in sorted(expected.shapes.items())
        if name in sent and sent[name] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    return "; ".join(f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in problems.items() if names)


def buckets(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Host copies of the stream in groups of at most `limit` bytes, or of one larger tensor.

    Raises ValueError for a name that comes a second time. Copies, because an exporter may reuse its buffers and two
    names may share one storage.
    """
    seen: set[str] = set()
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if name in seen:
            raise ValueError(f"parameter {name} was exported twice; every parameter must be sent exactly once")
        seen.add(name)
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        del tensor  # the next one needs the memory
    if bucket:
        yield bucket


def write_model(
    folder: Path, weights: Iterable[tuple[str, Tensor]], source: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `weights` as a model folder, with the configuration and tokenizer files of `source` as they are.

    It is written beside its place and takes it only when every parameter of `source` is in the written files once, in its
    shape; host memory holds one shard. Files have the mode that the umask gives. Raises ValueError for weights that are
    not those of `source`, OSError where it cannot be written; an earlier folder is then still there.
    """
    beside, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.removing")
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir(parents=True)
    _copy_descriptions(source, beside)
    try:
        _write_shards(beside, buckets(weights, shard_bytes))
    except SafetensorError as error:
        raise OSError(f"cannot write the trained model to {folder}: {error}") from error
    written: dict[str, tuple[int, ...]] = {}
    for file in weight_files(beside):
        written |= read_shapes(file)
    check_weights(written, expected_weights(source))
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _copy_descriptions(source: Path, folder: Path) -> None:
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)


def _write_shards(folder: Path, shards: Iterable[dict[str, Tensor]]) -> None:
    """model.safetensors, or numbered files with an index where there are several."""
    from safetensors.torch import save_file  # with torch, which a serving node's agent has no other use for

    files: list[Path] = []
    names: list[list[str]] = []
    total = 0
    for number, shard in enumerate(shards, start=1):
        files.append(folder / f"model-{number:05d}.safetensors")
        names.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, files[-1], metadata={"format": "pt"})
        shard.clear()  # before the next one fills
        shutil.copymode(folder / "config.json", files[-1])  # safetensors makes it private
    if len(files) == 1:
        files[0].rename(folder / SINGLE)
        return
    finals = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, final in zip(files, finals, strict=True):
        file.rename(folder / final)
    weight_map = {name: final for final, held in zip(finals, names, strict=True) for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
