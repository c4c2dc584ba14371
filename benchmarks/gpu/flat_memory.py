"""Memory of the scores, forward and backward, for more and more tokens: all of a vocabulary's logits are never there."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from benchmarks.gpu.line import MIB, Line, peak_bytes
from benchmarks.gpu.models import one_rank
from benchmarks.gpu.scorer import forward_backward, inputs

HIDDEN, VOCAB = {"cpu": 16, "cuda": 1024}, {"cpu": 1000, "cuda": 151936}
TOKENS = {"cpu": (64, 128), "cuda": (4096, 8192, 16384, 32768, 65536)}


def measure(device: str) -> Iterator[Line]:
    """Beyond the inputs and the gradients of the hidden states, which must be there."""
    peaks = []
    with one_rank(device) as group:
        for tokens in TOKENS[device]:
            states, weight, targets = inputs(tokens, HIDDEN[device], VOCAB[device], device)
            work = functools.partial(forward_backward, states, weight, targets, group)
            work()
            peaks.append((peak_bytes(work, device) - states.nbytes) / MIB)
            yield Line(f"{tokens} tokens", peaks[-1], "MiB")
    logits = 4 * TOKENS[device][-1] * VOCAB[device] / MIB
    yield Line("all logits of the last would be, in fp32", logits, "MiB")
    # A few numbers a token are kept, of 4 bytes each; a twentieth of all logits would be far more.
    most = logits / 20 if device == "cuda" else None
    yield Line("growth from the first to the last", peaks[-1] - peaks[0], "MiB", most=most)
