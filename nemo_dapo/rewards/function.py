"""Reward functions by name, whatever their form, as one callable: (prompt, responses) -> verdicts.

A function's parameter names say what it takes; sync and async alike:
    def f(prompt, response)          one sample: Prompt and text    -> Verdict | bool | number
    def f(prompt, responses)         a whole group: Prompt and texts -> list of those, in order
    def f(response, ground_truth)    one sample, as the verifiers in this package
A bool is the verdict. A number is the score, and correct when above 0. An http(s) address is a reward service (`remote`).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from nemo_dapo.rewards.remote import RemoteReward
from nemo_dapo.types import Prompt, Verdict

GroupReward = Callable[[Prompt, Sequence[str]], list[Verdict]]


def is_group_function(spec: str) -> bool:
    """Whether `spec` scores a whole group in one call. Raises ValueError for what `load` refuses."""
    if is_remote(spec):
        return True
    return "responses" in _parameters(_import(spec))


def is_remote(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def load(spec: str, *, answer_patterns: Sequence[str] = (), timeout: float = 10.0) -> GroupReward:
    """The function named by `spec` (`package.module:name` or an http(s) address) in the common form.

    Raises ValueError with value, expectation and remedy for a name that cannot be used.
    """
    if is_remote(spec):
        return RemoteReward(spec, timeout=timeout)
    function = _import(spec)
    names = _parameters(function)
    options = {"answer_patterns": tuple(answer_patterns)} if answer_patterns and "answer_patterns" in names else {}
    if answer_patterns and not options:
        raise ValueError(
            f"reward.answer_patterns is set, but reward.function={spec!r} takes no `answer_patterns`; remove them"
        )
    if names[:2] == ["response", "ground_truth"]:
        return _each(lambda prompt, text: function(text, prompt.ground_truth, **options))
    if "responses" in names:
        return _whole(lambda prompt, texts: function(prompt, list(texts), **options))
    return _each(lambda prompt, text: function(prompt, text, **options))


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
    return replace(verdict, score=score)


def _import(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    expected = "expected package.module:name of an importable function, or an http(s) address"
    if not module_name or not name:
        raise ValueError(f"reward function {spec!r}: {expected}; write it as in my_package.rewards:my_function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        remedy = "put its folder on PYTHONPATH, or mend the import"
        raise ValueError(f"reward function {spec!r}: {type(error).__name__}: {error}; {expected}; {remedy}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward function {spec!r}: {module_name} has no function {name!r}; {expected}")
    return function


def _parameters(function: Callable[..., Any]) -> list[str]:
    names = list(inspect.signature(function).parameters)
    if len(names) < 2:
        raise ValueError(
            f"reward function {function!r} takes {names}; expected (prompt, response), (prompt, responses) for a group, "
            "or (response, ground_truth)"
        )
    return names


def _each(function: Callable[[Prompt, str], Any]) -> GroupReward:
    def score(prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        return [_guarded(lambda value: function(prompt, value), text) for text in responses]

    return score


def _whole(function: Callable[[Prompt, Sequence[str]], Any]) -> GroupReward:
    def score(prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        try:
            found = _finish(function(prompt, responses))
            if len(found) != len(responses):
                raise ValueError(f"{len(found)} verdicts for {len(responses)} responses; expected one each, in order")
        except (Exception, SystemExit) as error:
            return [_failure(error)] * len(responses)
        return [_guarded(lambda value: value, value) for value in found]

    return score


def _guarded(call: Callable[[Any], Any], argument: Any) -> Verdict:
    """A user's function may raise anything: that is an error of the verifier, never a wrong answer."""
    try:
        return to_verdict(_finish(call(argument)))
    except (Exception, SystemExit) as error:
        return _failure(error)


def _failure(error: BaseException) -> Verdict:
    kind = "memory" if isinstance(error, MemoryError) else "exception"
    return Verdict(correct=False, error=f"{kind}: {type(error).__name__}: {str(error)[:500]}")


def _finish(value: Any) -> Any:
    return asyncio.run(_await(value)) if inspect.isawaitable(value) else value


async def _await(value: Awaitable[Any]) -> Any:
    return await value


def to_verdict(value: Any) -> Verdict:
    """A Verdict from what a function returned; ValueError for anything but Verdict, bool or a finite number."""
    if isinstance(value, Verdict):
        return value
    if isinstance(value, bool):
        return Verdict(correct=value)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"the reward function returned {value!r:.100}; expected a Verdict, a bool or a finite number")
    return Verdict(correct=value > 0, score=float(value))
