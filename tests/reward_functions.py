"""A user's reward functions, well and badly behaved, for the pool's tests."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
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
        print("noise \x1b[2Jwipes", "the\u202e screen", flush=True)
    if response == "print from a child":
        subprocess.run(["printf", r"child \033]0;title\007"], check=True)
    if response == "read":
        return input() == "7"
    if response.startswith("leave "):
        return Verdict(True, extracted=leave(response.removeprefix("leave ").partition(" ")[0], "exits" in response))
    if response == "pid":
        return Verdict(correct=True, extracted=str(os.getpid()))
    return response == prompt.ground_truth


SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


def leave(kind: str, exits: bool) -> str:
    """Start a child of this kind that would live for ten minutes, and say its process id; the worker may end itself."""
    if kind == "popen":
        pid = subprocess.Popen(SLEEP).pid
    elif kind == "session":
        pid = subprocess.Popen(SLEEP, start_new_session=True, close_fds=False).pid
    elif kind == "fork":
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
    else:
        pid = daemon()
    with open(os.environ["LEFT_PIDS"], "a") as file:
        print(pid, file=file)
    if exits:
        os._exit(pid % 100)
    return str(pid)


def daemon() -> int:
    """A double fork: the child in between ends, so that its own is nobody's."""
    ours, theirs = os.pipe()
    if (between := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(theirs, str(os.getpid()).encode())
            time.sleep(600)
        os._exit(0)
    os.waitpid(between, 0)
    return int(os.read(ours, 16))


def not_enough() -> bool:
    return True


# Signatures


def swapped(ground_truth: str, response: str) -> bool:
    return response == ground_truth


def by_keyword(response: str, *, ground_truth: str, strict: bool = True) -> bool:
    return strict and response == ground_truth


def by_position(response: str, ground_truth: str, /) -> bool:
    return response == ground_truth


def responses_first(responses: Sequence[str], prompt: Prompt, **others: object) -> list[bool]:
    return [response == prompt.ground_truth for response in responses]


class Judge:
    def __init__(self, truth: str) -> None:
        self.truth = truth

    def __call__(self, prompt: Prompt, response: str, ground_truth: str = "") -> bool:
        return response == self.truth and ground_truth == ""

    async def later(self, prompt: Prompt, responses: Sequence[str]) -> list[bool]:
        return [response == self.truth for response in responses]


instance = Judge("7")
method = instance.later
partial = functools.partial(by_keyword, strict=True)
decorated = functools.lru_cache(by_position)


def other_names(response: str, answer: str) -> bool:
    return response == answer


def pred_gold(pred: str, gold: str) -> bool:
    return pred == gold


def three(prompt: Prompt, response: str, ground_truth: str) -> bool:
    return response == ground_truth


def anything(*args: object, **kwargs: object) -> bool:
    return True


def verl(data_source: str, solution_str: str, ground_truth: str, extra_info: object = None) -> float:
    return 1.0


def openrlhf(queries: list[str], prompts: list[str], labels: list[str]) -> list[float]:
    return [1.0]


def trl(completions: list[str], **kwargs: object) -> list[float]:
    return [1.0]


# Returned values


def numpy_scalars(prompt: Prompt, responses: Sequence[str]) -> list[object]:
    import numpy as np

    kinds: dict[str, object] = {"bool": np.bool_(True), "int": np.int64(3), "float": np.float32(0.5)}
    kinds["array"] = np.array(2.0)
    kinds["verdict"] = Verdict(np.bool_(False), score=np.float32(0.25))  # type: ignore[arg-type]
    kinds["two"] = np.array([1.0, 2.0])
    return [kinds[response] for response in responses]


def numpy_array(prompt: Prompt, responses: Sequence[str]) -> object:
    import numpy as np

    return np.array([response == prompt.ground_truth for response in responses])


def share(prompt: Prompt, response: str) -> float:
    """Partial credit."""
    return float(response)
