"""The groups of the window on disk: arrays as arrays, eight bytes a token, the rest as the bytes of a JSON text.

R tokens of all samples back to back: `token_ids` [R] int32, `logprobs` [R] float32. The text is `groups` [bytes] uint8, not
the file's metadata: safetensors refuses a header beyond 100 MB, which a few thousand long prompts exceed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from nemo_dapo.types import Group, OpenGroup, Prompt, Sample, Verdict, VersionSpan

NAME = "window.safetensors"


def write(path: Path, window: Sequence[OpenGroup]) -> None:
    samples = [sample for one in window for sample in one.samples]
    described = json.dumps([_described(one) for one in window]).encode()
    arrays = {
        "groups": np.frombuffer(described, np.uint8),
        "token_ids": np.concatenate([sample.token_ids for sample in samples] or [np.empty(0, np.int32)]),
        "logprobs": np.concatenate([sample.logprobs for sample in samples] or [np.empty(0, np.float32)]),
    }
    save_file(arrays, path)


def read(path: Path) -> list[OpenGroup]:
    with safe_open(path, framework="numpy") as file:
        described = json.loads(file.get_tensor("groups").tobytes())
        token_ids, logprobs = file.get_tensor("token_ids"), file.get_tensor("logprobs")
    # Read-only, or each sample would copy its part.
    token_ids.flags.writeable = logprobs.flags.writeable = False
    ends = np.cumsum([sample["tokens"] for one in described for sample in one["samples"]], dtype=np.int64)
    pieces = zip(np.split(token_ids, ends[:-1]), np.split(logprobs, ends[:-1]), strict=True)
    return [_group(one, pieces) for one in described]


def _described(one: OpenGroup) -> dict[str, Any]:
    """Everything but the arrays."""
    samples = [
        {"tokens": len(s.token_ids), "finish_reason": s.finish_reason, "versions": [asdict(v) for v in s.versions]}
        for s in one.samples
    ]
    verdicts = [asdict(verdict) for verdict in one.group.verdicts] if one.group else None
    return {"index": one.index, "prompt": asdict(one.prompt), "samples": samples, "verdicts": verdicts}


def _group(described: dict[str, Any], pieces: Iterator[tuple[Any, Any]]) -> OpenGroup:
    fields = described["prompt"]
    prompt = Prompt(**fields | {"token_ids": tuple(fields["token_ids"])})
    samples = tuple(
        Sample(*next(pieces), said["finish_reason"], tuple(VersionSpan(**span) for span in said["versions"]))
        for said in described["samples"]
    )
    if described["verdicts"] is None:
        return OpenGroup(described["index"], prompt, None, samples)
    verdicts = tuple(Verdict(**one) for one in described["verdicts"])
    return OpenGroup(described["index"], prompt, Group(prompt, samples, verdicts, described["index"]))
