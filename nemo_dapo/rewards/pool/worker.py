"""The process that runs reward functions: `python -m nemo_dapo.rewards.pool.worker TRAINER LOG`, JSON lines in and out.

    first line in    {"function", "answer_patterns", "timeout", "memory_mb", "extra", "correct", "incorrect",
                      "correct_above", "warm", "tail": how many characters of the end to decode, null = all}, and what
                      `decoding` adds where token ids are to be scored
    first line out   {"ready": pid, "group": whether one call scores a whole group} or {"refused": why}
    then             [[prompt, [response, …]], …]  ->  one line of verdicts a unit, as soon as it is done

A response is a text, or the number of its token ids: those follow the line, int32, back to back.

Everything runs on the main thread, so that alarms inside libraries work. The process ends when its input does, and with the
thread that started it, even while a function runs: `keeper` sees to that.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, TextIO

import numpy as np

from nemo_dapo.detokenizer import Ids
from nemo_dapo.rewards.function import GroupReward, is_group_function, load, with_terms
from nemo_dapo.rewards.pool.decoding import inherited
from nemo_dapo.rewards.pool.keeper import become_worker
from nemo_dapo.types import Prompt, Verdict

ID_BYTES = 4
_MAX_DIGITS = 4300  # of an integer turned into text or read from one: Python's own default against quadratic time


def main() -> None:
    become_worker(int(sys.argv[1]), sys.argv[2])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a function reads must not be a request
    os.dup2(2, 1)  # what it prints must not become a verdict
    line = requests.readline()
    if not line:
        return
    setup = json.loads(line)
    _limit(setup["memory_mb"])
    try:
        score, decode = _build(setup), _decoder(setup)
    except ValueError as error:
        print(json.dumps({"refused": str(error)}), file=replies)
        return
    print(json.dumps({"ready": os.getpid(), "group": _scores_groups(setup)}), file=replies)
    serve(score, decode, requests, replies)


def serve(score: GroupReward, decode: Callable[[Ids], str] | None, requests: BinaryIO, replies: TextIO) -> None:
    """Answer units until the input ends."""
    for line in requests:
        # The whole message is read before anything is scored: whoever writes it must not wait for that.
        units = [(prompt, [_received(r, requests) for r in responses]) for prompt, responses in json.loads(line)]
        for prompt, responses in units:
            verdicts = _score(score, decode, Prompt(token_ids=(), **prompt), responses)
            replies.write(json.dumps([_packed(verdict) for verdict in verdicts]) + "\n")


def _received(response: str | int, requests: BinaryIO) -> str | Ids:
    return response if isinstance(response, str) else np.frombuffer(requests.read(ID_BYTES * response), np.int32)


def _score(
    score: GroupReward, decode: Callable[[Ids], str] | None, prompt: Prompt, responses: list[str | Ids]
) -> list[Verdict]:
    try:
        return score(prompt, [_text(response, decode) for response in responses])
    except MemoryError:
        return [Verdict(correct=False, error="memory: the limit reward.memory_mb was reached")] * len(responses)


def _text(response: str | Ids, decode: Callable[[Ids], str] | None) -> str:
    if isinstance(response, str):
        return response
    assert decode, "token ids came, and nothing to decode them"
    return decode(response)


def _packed(verdict: Verdict) -> list[Any]:
    return [verdict.correct, verdict.extracted, verdict.error, verdict.score]


def _build(setup: dict[str, Any]) -> GroupReward:
    options = {"timeout": setup["timeout"], "correct_above": setup["correct_above"]}
    decide = load(setup["function"], answer_patterns=setup["answer_patterns"], **options)
    terms = [(name, weight, load(function, **options)) for name, function, weight in setup["extra"]]
    if setup["warm"]:
        _warm_up()
    return with_terms(decide, terms, setup["correct"], setup["incorrect"])


def _decoder(setup: dict[str, Any]) -> Callable[[Ids], str] | None:
    detokenizer = inherited(setup)
    if detokenizer is None:
        return None
    return partial(detokenizer.tail, characters=setup["tail"]) if setup["tail"] else detokenizer.text


def _scores_groups(setup: dict[str, Any]) -> bool:
    return any(
        is_group_function(spec) for spec in [setup["function"], *(function for _, function, _ in setup["extra"])]
    )


def _warm_up() -> None:
    """Pay for mpmath's import here, not within the first item's time limit."""
    from nemo_dapo.rewards.math.compare import equal

    equal(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}")


def _limit(memory_mb: int) -> None:
    if memory_mb:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(_MAX_DIGITS)


if __name__ == "__main__":
    main()
