"""The order in which problems are drawn: within a set, a new shuffle each epoch; between sets, by weight.

Both are pure functions of the seed and of what was drawn, so a place in the stream is a few numbers and a hash.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from operator import itemgetter

from nemo_dapo.types import Prompt


def next_set(weights: Sequence[float], drawn: Sequence[int]) -> int:
    """The set to draw from: the one furthest behind its share, so that after any number of draws each set is within one
    of weight / sum of weights (up to rounding, and for many sets a few)."""
    total, upcoming = sum(weights), sum(drawn) + 1
    return max(range(len(weights)), key=lambda i: weights[i] / total * upcoming - drawn[i])


@dataclass
class Cursor:
    """A place in the endless stream of one set: full passes behind it, and the key of the last problem passed in this one.

    Within an epoch problems come in the order of their keys, a hash of seed, epoch and uid. So the order follows from
    content alone, whatever the rows' order in their file or the version of a generator, and a place keeps its meaning when
    problems are added or taken away: what lies behind it was passed, what lies before it is still to come.
    """

    prompts: Sequence[Prompt]
    seed: int
    epoch: int = 0
    after: str = ""
    _ahead: deque[tuple[str, Prompt]] = field(default_factory=deque, repr=False)  # of this epoch, without those skipped
    _era: Hashable = field(default=None, repr=False)  # of `_ahead`

    def next(self, skip: AbstractSet[str], era: Hashable) -> Prompt:
        """The next problem whose uid is not in `skip`, which must leave one.

        `era` changes whenever a uid has left `skip`: until then, what was passed over in this epoch need not be looked at
        again, and a draw costs as much with most problems solved as with none.
        """
        if self._era != era or not self._ahead:
            self._look_ahead(skip, era)
        while True:
            while self._ahead:
                key, prompt = self._ahead.popleft()
                if prompt.uid not in skip:
                    self._pass(key)
                    return prompt
            self._turn()
            self._look_ahead(skip, era)

    def _pass(self, key: str) -> None:
        self.after = key
        if not self._ahead:
            self._turn()

    def _turn(self) -> None:
        self.epoch, self.after = self.epoch + 1, ""

    def _look_ahead(self, skip: AbstractSet[str], era: Hashable) -> None:
        prefix = f"{self.seed}/{self.epoch}/"
        keyed = (
            (hashlib.sha256((prefix + prompt.uid).encode()).hexdigest(), prompt)
            for prompt in self.prompts
            if prompt.uid not in skip
        )
        self._ahead = deque(sorted((one for one in keyed if one[0] > self.after), key=itemgetter(0)))
        self._era = era
