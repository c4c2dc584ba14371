"""Reward functions by name, whatever their form, as one callable: (prompt, responses) -> verdicts.

The names of a function's parameters say what it takes, in any order; others need defaults. Sync and async alike:
    def f(prompt, response)          one sample: Prompt and text    -> Verdict | bool | number
    def f(prompt, responses)         a whole group: Prompt and texts -> list of those, in order
    def f(response, ground_truth)    one sample, as the verifiers in this package
A bool is the verdict. A number is the score, and correct when above `reward.correct_above` (0): with partial credit, where
nearly every answer earns a little, set that, or groups count as all right and are dropped. An http(s) address is a reward
service (`remote`). What a function prints goes to the run's `rewards.log`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from nemo_dapo.rewards.signature import GROUP, PLAIN, read_signature
from nemo_dapo.rewards.verdict import make_verdict, to_verdict
from nemo_dapo.telemetry.escape import printable
from nemo_dapo.types import Prompt, Verdict
from nemo_dapo.user_code import user_function

MAX_ERROR = 500  # characters of an exception's text

GroupReward = Callable[[Prompt, Sequence[str]], list[Verdict]]


def is_group_function(spec: str) -> bool:
    """Whether `spec` scores a whole group in one call. Raises ValueError for what `load` refuses."""
    return is_remote(spec) or read_signature(_import(spec), spec).form == GROUP


def is_remote(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def load(
    spec: str, *, answer_patterns: Sequence[str] = (), timeout: float = 10.0, correct_above: float = 0.0
) -> GroupReward:
    """The function named by `spec` (`package.module:name` or an http(s) address) in the common form.

    Raises ValueError with value, expectation and remedy for a name or an address that cannot be used, or a function that
    has none of the three forms.
    """
    if is_remote(spec):
        from nemo_dapo.rewards.remote import RemoteReward  # here: an HTTP client takes time and memory of each worker

        return RemoteReward(spec, timeout=timeout)
    function = _import(spec)
    signature = read_signature(function, spec)
    options = {"answer_patterns": tuple(answer_patterns)} if answer_patterns else {}
    if not options.keys() <= signature.names:
        raise ValueError(
            f"reward.answer_patterns is set, but reward.function={spec!r} takes no `answer_patterns`; remove them"
        )

    def call(prompt: Prompt, value: str | list[str]) -> Any:
        if signature.form == PLAIN:
            return signature.call(function, {"response": value, "ground_truth": prompt.ground_truth, **options})
        return signature.call(function, {"prompt": prompt, signature.form[1]: value, **options})

    def judge(value: Any) -> Verdict:
        return to_verdict(value, correct_above=correct_above)

    return _whole(call, judge) if signature.form == GROUP else _each(call, judge)


def with_terms(
    decide: GroupReward, terms: Sequence[tuple[str, float, GroupReward]], correct: float, incorrect: float
) -> GroupReward:
    """`decide`, with the weighted scores of `terms` (name, weight, function) added to its score, never to its verdict."""
    if not terms:
        return decide

    def score(prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        verdicts = decide(prompt, responses)
        extras = [(name, weight, term(prompt, responses)) for name, weight, term in terms]
        return [
            _add(verdict, [(name, weight, found[i]) for name, weight, found in extras], correct, incorrect)
            for i, verdict in enumerate(verdicts)
        ]

    return score


def _add(verdict: Verdict, extras: list[tuple[str, float, Verdict]], correct: float, incorrect: float) -> Verdict:
    if verdict.error is not None:
        return verdict
    score = verdict.score if verdict.score is not None else (correct if verdict.correct else incorrect)
    for name, weight, term in extras:
        if term.error is not None:
            return replace(verdict, error=f"reward.extra.{name}: {term.error}")
        score += weight * (term.score if term.score is not None else float(term.correct))
    try:
        return make_verdict(verdict.correct, verdict.extracted, None, score)
    except ValueError as problem:
        return replace(verdict, error=f"reward.extra: the sum of all terms: {problem}")


def _import(spec: str) -> Callable[..., Any]:
    return user_function(spec, "reward function", ", or an http(s) address")


def _each(call: Callable[[Prompt, str], Any], judge: Callable[[Any], Verdict]) -> GroupReward:
    def score(prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        return [_guarded(lambda text: judge(_finish(call(prompt, text))), text) for text in responses]

    return score


def _whole(call: Callable[[Prompt, list[str]], Any], judge: Callable[[Any], Verdict]) -> GroupReward:
    def score(prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        try:
            found = _finish(call(prompt, list(responses)))
            if len(found) != len(responses):
                raise ValueError(f"{len(found)} verdicts for {len(responses)} responses; expected one each, in order")
        except (Exception, SystemExit) as error:
            return [_failure(error)] * len(responses)
        return [_guarded(judge, value) for value in found]

    return score


def _guarded(call: Callable[[Any], Verdict], argument: Any) -> Verdict:
    """A user's function may raise anything: that is an error of the verifier, never a wrong answer."""
    try:
        return call(argument)
    except (Exception, SystemExit) as error:
        return _failure(error)


def _failure(error: BaseException) -> Verdict:
    kind = "memory" if isinstance(error, MemoryError) else "exception"
    return Verdict(correct=False, error=f"{kind}: {type(error).__name__}: {printable(str(error), MAX_ERROR)}")


def _finish(value: Any) -> Any:
    return asyncio.run(_await(value)) if inspect.isawaitable(value) else value


async def _await(value: Awaitable[Any]) -> Any:
    return await value
