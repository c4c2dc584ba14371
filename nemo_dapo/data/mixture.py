"""The order in which problems are drawn: within a set, a new shuffle each epoch; between sets, by weight.

Both are pure functions of the seed and of how many were drawn, so a position in the stream is a few integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemo_dapo.types import Prompt


def epoch_order(uids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Indices of `uids`, shuffled: sorted by a hash of seed, epoch and uid.

    The order follows from content alone: the rows' order in their file, and the version of a generator, do not matter.
    """
    return sorted(range(len(uids)), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{uids[i]}".encode()).digest())


def next_set(weights: Sequence[float], drawn: Sequence[int]) -> int:
    """The set to draw from: the one furthest behind its share, so that after any number of draws each set is within one
    of weight / sum of weights (up to rounding, and for many sets a few)."""
    total, upcoming = sum(weights), sum(drawn) + 1
    return max(range(len(weights)), key=lambda i: weights[i] / total * upcoming - drawn[i])


@dataclass
class Cursor:
    """A place in the endless stream of one set: `position` counts problems passed since the start of the run."""

    prompts: Sequence[Prompt]
    seed: int
    position: int = 0
    skipped: int = 0
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)  # epoch and its order

    @property
    def epoch(self) -> int:
        """Full passes behind this place."""
        return self.position // len(self.prompts)

    def next(self, skip: Callable[[str], bool]) -> Prompt | None:
        """The next problem whose uid is not to be skipped; None, and no move, when every problem is."""
        prompt = self._peek()
        if skip(prompt.uid) and all(skip(other.uid) for other in self.prompts):
            return None
        while skip(prompt.uid):
            self.position += 1
            self.skipped += 1
            prompt = self._peek()
        self.position += 1
        return prompt

    def _peek(self) -> Prompt:
        if self._order[0] != self.epoch:
            self._order = self.epoch, epoch_order([prompt.uid for prompt in self.prompts], self.seed, self.epoch)
        return self.prompts[self._order[1][self.position % len(self.prompts)]]
