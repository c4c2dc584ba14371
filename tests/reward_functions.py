"""A user's reward functions, well and badly behaved, for the pool's tests."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence

from nemo_dapo.types import Prompt, Verdict


def matches(prompt: Prompt, response: str) -> bool:
    return response == prompt.ground_truth


async def matches_later(prompt: Prompt, response: str) -> bool:
    await asyncio.sleep(0)
    return response == prompt.ground_truth


def length(prompt: Prompt, response: str) -> float:
    return float(len(response))


def rank(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """A whole group: each response's rank by length."""
    return [float(sum(len(other) < len(one) for other in responses)) for one in responses]


def too_few(prompt: Prompt, responses: Sequence[str]) -> list[float]:
    return [1.0]


def nonsense(prompt: Prompt, response: str) -> object:
    return "perhaps"


def misbehave(prompt: Prompt, response: str) -> Verdict | bool:
    """What `response` says; anything else is compared with the truth."""
    if response == "hang":
        time.sleep(1000)
    if response == "spin without signals":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
        9**9**9
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "exit":
        os._exit(3)
    if response == "memory":
        bytearray(1 << 40)
    if response == "raise":
        raise KeyError("missing")
    if response == "print":
        print("noise", flush=True)
    if response == "pid":
        return Verdict(correct=True, extracted=str(os.getpid()))
    return response == prompt.ground_truth


def not_enough() -> bool:
    return True
