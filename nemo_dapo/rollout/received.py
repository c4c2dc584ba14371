"""The tokens of one sample as they come, in their final place: no frame outlives its arrival, nothing is joined at the end.

A step of the paper's size is 1.3 GB of them. Frames that waited to be joined would double that, and thousands of answers
that end together would block the event loop while they are copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_dapo.rollout.wire import Ids, Logprobs

WORTH_KEEPING = 0.75  # of the room, filled


class Received:
    """Up to `room` tokens; memory is taken as they come, because the kernel gives pages at their first use."""

    def __init__(self, room: int) -> None:
        self.room, self.size = room, 0
        self._token_ids, self._logprobs = np.empty(room, np.int32), np.empty(room, np.float32)

    @property
    def token_ids(self) -> Ids:
        """[size], until more comes."""
        return self._token_ids[: self.size]

    @property
    def logprobs(self) -> Logprobs:
        """[size], until more comes."""
        return self._logprobs[: self.size]

    def add(self, token_ids: Ids, logprobs: Logprobs) -> None:
        """Raises ValueError when there is no room, or not one log-probability a token."""
        end = self.size + len(token_ids)
        if end > self.room or len(logprobs) != len(token_ids):
            raise ValueError(
                f"{len(token_ids)} tokens and {len(logprobs)} log-probabilities, room for {self.room - self.size}"
            )
        self._token_ids[self.size : end], self._logprobs[self.size : end] = token_ids, logprobs
        self.size = end

    def cut(self, size: int) -> None:
        """Forget what lies beyond the first `size` tokens."""
        self.size = min(size, self.size)

    def take(self) -> tuple[Ids, Logprobs]:
        """Both arrays, [size] and read-only. Copies where most of the room was left, which would be kept with them."""
        copies = self.size < self.room * WORTH_KEEPING
        return _read_only(self.token_ids, copies), _read_only(self.logprobs, copies)


def _read_only(array: Any, copies: bool) -> Any:
    array = array.copy() if copies else array
    array.flags.writeable = False
    return array
