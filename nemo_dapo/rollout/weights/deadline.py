"""The moment by which one weight update must be over, for whoever waits for something in it."""

from __future__ import annotations

import time
from typing import NamedTuple


class Deadline(NamedTuple):
    """`at` is of time.monotonic(); `seconds` is the limit that ends there, `rollout.sync_timeout`."""

    at: float
    seconds: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds, seconds)

    def left(self, most: float, step: str) -> float:
        """Seconds that `step` may take, `most` at most; raises TimeoutError, which says what did not come to pass."""
        if (left := self.at - time.monotonic()) <= 0:
            raise TimeoutError(
                f"rollout.sync_timeout={self.seconds:.0f} s were over before {step}: raise it for large models, or see "
                "what is slow there"
            )
        return min(most, left)
