"""Which of many errors are worth a line: the first of each kind."""

from __future__ import annotations

import re

MAX_KINDS = 20


class Kinds:
    """A kind is a text without its numbers; after `MAX_KINDS` nothing is new. Not to be shared between threads."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def is_new(self, text: str) -> bool:
        kind = re.sub(r"\d+", "0", text)
        if kind in self._seen or len(self._seen) >= MAX_KINDS:
            return False
        self._seen.add(kind)
        return True
