"""A checksum of bytes that runs at the speed of memory, on the host and, with the same result, on a device.

Little-endian 64-bit words are summed a page at a time, and the pages' sums with odd weights that name their place, all
modulo 2^64: a changed bit, a shifted or an exchanged page change the result. It finds accidents, not forgers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD = 8  # bytes
PAGE = 512  # words
MODULUS = 1 << 64


def checksum(data: NDArray[np.uint8]) -> int:
    """Of contiguous bytes [n], as an unsigned number of 64 bits."""
    words = data[: len(data) // WORD * WORD].view("<i8")
    pages = len(words) // PAGE
    sums = words[: pages * PAGE].reshape(pages, PAGE).sum(axis=1)
    return combine(sums, int(words[pages * PAGE :].sum()), bytes(data[len(words) * WORD :]))


def combine(sums: NDArray[np.int64], rest: int, tail: bytes) -> int:
    """From the sums of whole pages, the sum of the words after them, and the bytes after those."""
    weights = 2 * np.arange(len(sums), dtype=np.int64) + 1
    last = rest + 2 * int.from_bytes(tail, "little")
    return (int((sums * weights).sum()) + last * (2 * len(sums) + 1)) % MODULUS
