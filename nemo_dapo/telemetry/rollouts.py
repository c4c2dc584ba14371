"""Every rollout of a step as a Parquet file: prompts, responses, verdicts, rewards, advantages, versions, to be browsed.

One row a sample, in submission order; N groups of G samples, advantages and rewards [N, G]. With token ids and
log-probabilities the record is complete: `rollout/replay.py` plays it back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_dapo.files import replacing
from nemo_dapo.types import Group, Sample, Verdict, VersionSpan

if TYPE_CHECKING:
    from nemo_dapo.detokenizer import Decode

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),  # submission order within the run
        ("sample", pa.int32()),  # within the group
        ("uid", pa.string()),
        ("source", pa.string()),
        ("problem", pa.string()),
        ("ground_truth", pa.string()),
        ("response", pa.string()),
        ("correct", pa.bool_()),  # null where the verifier failed
        ("extracted", pa.string()),
        ("error", pa.string()),
        ("score", pa.float64()),  # before shaping; null = reward.correct or reward.incorrect
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("prompt_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("mean_logprob", pa.float64()),  # nats a token, under the engine
        ("versions", pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int32()), ("end", pa.int32())]))),
    ]
)
# On request: what the trainer computes with. Four bytes each, as the batch has them.
TOKEN_SCHEMA = pa.schema(
    [
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
    ]
)
NUM_GROUPS = b"groups"  # in the file's metadata: how many were to be written
CHUNK_BYTES = 4 << 20  # of uncompressed rows in one row group


NOT_JUDGED = Verdict(correct=False, error="not judged: the engine aborted the group")


@dataclass(frozen=True)
class RolloutDump:
    """What one dump holds. `groups_left_out` did not fit within the bound."""

    path: Path
    groups_written: int
    groups_left_out: int


@dataclass(frozen=True)
class RecordedGroup:
    """G samples as they were recorded, by the prompt's `uid` and token ids; `index` is the submission order."""

    index: int
    uid: str
    prompt_token_ids: tuple[int, ...]
    samples: tuple[Sample, ...]


def rollouts_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.parquet"


def write_rollouts(
    path: Path,
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
    *,
    decode: Decode,
    step: int,
    max_mb: int,
    tokens: bool = False,
) -> RolloutDump:
    """Writes the samples of `groups` to `path`, whole or not at all, in at most `max_mb` MiB.

    `decode` makes the texts, a group at a time. Groups are written whole and in order; those that would pass the bound are
    left out. Tensors serve as rewards and advantages after `.tolist()`. `tokens` adds token ids and log-probabilities.
    """
    if not len(groups) == len(rewards) == len(advantages):
        raise ValueError(
            f"{len(groups)} groups need as many rows of rewards and advantages, got {len(rewards)} and {len(advantages)}"
        )
    schema = (pa.unify_schemas([SCHEMA, TOKEN_SCHEMA]) if tokens else SCHEMA).with_metadata(
        {NUM_GROUPS: str(len(groups))}
    )
    tables = (_table(schema, step, decode, *row) for row in zip(groups, rewards, advantages, strict=True))
    # Parquet's footer grows by some kB a row group: a 32nd of the bound, and 64 kB, are kept for it.
    budget = max_mb * 2**20 * 31 // 32 - 2**16
    written = 0
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for chunk in _chunks(tables):
            # Compression never makes a chunk larger than it is in memory, so this cannot overshoot.
            fitting = _fitting(chunk, budget - file.tell())
            if fitting:
                writer.write_table(pa.concat_tables(fitting))
            written += len(fitting)
            if len(fitting) < len(chunk):
                break
    return RolloutDump(path, written, len(groups) - written)


def read_rollouts(path: Path) -> list[RecordedGroup]:
    """The groups of a step in submission order, from a file written with `tokens`.

    Raises ValueError for one without, or one whose bound left groups out.
    """
    file = pq.ParquetFile(path)
    if missing := set(TOKEN_SCHEMA.names) - set(file.schema_arrow.names):
        raise ValueError(f"{path} lacks {sorted(missing)}: record with logger.rollout_tokens=true")
    names = ["group", "uid", "finish_reason", "versions", *TOKEN_SCHEMA.names]
    rows = file.read(columns=names).to_pylist()
    groups = [_recorded(list(same)) for _, same in itertools.groupby(rows, key=lambda row: row["group"])]
    expected = int((file.schema_arrow.metadata or {})[NUM_GROUPS])
    if len(groups) != expected:
        raise ValueError(
            f"{path} holds {len(groups)} of the step's {expected} groups: record with logger.rollout_max_mb raised"
        )
    return groups


def _recorded(rows: list[dict[str, Any]]) -> RecordedGroup:
    samples = tuple(
        Sample(
            token_ids=np.array(row["token_ids"], np.int32),
            logprobs=np.array(row["logprobs"], np.float32),
            finish_reason=row["finish_reason"],
            versions=tuple(VersionSpan(**span) for span in row["versions"]),
        )
        for row in rows
    )
    return RecordedGroup(rows[0]["group"], rows[0]["uid"], tuple(rows[0]["prompt_token_ids"]), samples)


def _chunks(tables: Iterator[pa.Table]) -> Iterator[list[pa.Table]]:
    chunk: list[pa.Table] = []
    for table in tables:
        chunk.append(table)
        if sum(one.nbytes for one in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _fitting(tables: list[pa.Table], room: int) -> list[pa.Table]:
    """The first of `tables` that together take at most `room` bytes."""
    kept = []
    for table in tables:
        room -= table.nbytes
        if room < 0:
            break
        kept.append(table)
    return kept


def _table(
    schema: pa.Schema,
    step: int,
    decode: Decode,
    group: Group,
    rewards: Sequence[float],
    advantages: Sequence[float],
) -> pa.Table:
    shared = {
        "step": step,
        "group": group.index,
        "uid": group.prompt.uid,
        "source": _clean(group.prompt.source),
        "problem": _clean(group.prompt.problem),
        "ground_truth": _clean(group.prompt.ground_truth),
        "prompt_tokens": len(group.prompt.token_ids),
        "prompt_token_ids": group.prompt.token_ids,
    }
    verdicts = group.verdicts or [NOT_JUDGED] * len(group.samples)  # of an aborted group there are none
    texts = decode([sample.token_ids for sample in group.samples])
    judged = zip(group.samples, texts, verdicts, rewards, advantages, strict=True)
    rows = [
        shared
        | _sample(sample)
        | {
            "sample": number,
            "response": _clean(text),
            "correct": None if verdict.error is not None else verdict.correct,
            "extracted": _clean(verdict.extracted),
            "error": _clean(verdict.error),
            "score": verdict.score,
            "reward": reward,
            "advantage": advantage,
        }
        for number, (sample, text, verdict, reward, advantage) in enumerate(judged)
    ]
    return pa.Table.from_pylist(rows, schema)


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "response_tokens": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "token_ids": sample.token_ids,
        "logprobs": sample.logprobs,
        "mean_logprob": float(sample.logprobs.mean(dtype="float64")) if len(sample.logprobs) else None,
        "versions": [{"version": v.version, "start": v.start, "end": v.end} for v in sample.versions],
    }


def _clean(text: str | None) -> str | None:
    """Lone surrogates, which a model's text may hold and Parquet refuses, as question marks."""
    return None if text is None else text.encode("utf-8", "replace").decode()
