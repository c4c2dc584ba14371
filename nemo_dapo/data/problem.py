"""One row of a data set, and the account of what loading it kept and dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One turn of a chat: {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class Problem:
    """A problem with its answer, before any template. `messages` is set when the row brings a chat of its own, already
    templated; `problem` is then the text of its last turn."""

    problem: str
    answer: str
    source: str = ""
    messages: tuple[Message, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return content_hash([squeeze(self.problem), squeeze(self.answer)])[:16]


@dataclass(frozen=True)
class LoadReport:
    """What became of every row of one data set. `sha256` is over the content that was kept, whatever its order."""

    name: str
    rows_read: int
    repeats_removed: int
    dropped: dict[str, int]  # reason -> rows
    kept: int
    sha256: str
    overlaps: dict[str, int] = field(default_factory=dict)  # another training set -> problems that it holds too

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.dropped.items()))
        shared = "".join(f", {count:,} of them also in {name!r}" for name, count in self.overlaps.items())
        return (
            f"data {self.name}: {self.rows_read:,} rows read, {self.repeats_removed:,} repeats removed, "
            f"{sum(self.dropped.values()):,} dropped{f' ({reasons})' if reasons else ''}, "
            f"{self.kept:,} kept{shared}, sha256 {self.sha256[:12]}"
        )


def squeeze(text: str) -> str:
    """`text` with every run of white space as one space: two problems that differ only there are the same."""
    return " ".join(text.split())


def content_hash(parts: Iterable[str]) -> str:
    """sha256 of a list of texts; the lengths keep ["ab", "c"] and ["a", "bc"] apart."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
