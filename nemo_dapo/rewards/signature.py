"""Which of the three forms a reward function has, by the names of its parameters; checked before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

ONE, GROUP, PLAIN = ("prompt", "response"), ("prompt", "responses"), ("response", "ground_truth")
FORMS = (ONE, GROUP, PLAIN)
EXPECTED = (
    "expected parameters by these names, others only with defaults: (prompt, response) or (response, ground_truth) for "
    "one sample, (prompt, responses) for a group"
)
# Names that give another library's form away, and how it becomes one of ours.
FOREIGN = (
    (
        {"solution_str", "ground_truth"},
        "this looks like verl's form; wrap it: def reward(prompt, response): "
        "return {name}(prompt.source, response, prompt.ground_truth)",
    ),
    (
        {"queries", "prompts", "labels"},
        "this looks like OpenRLHF's form; wrap it: def reward(prompt, response): "
        "return {name}([prompt.problem + response], [prompt.problem], [prompt.ground_truth])[0]",
    ),
    (
        {"completions"},
        "this looks like TRL's form; wrap it: def reward(prompt, responses): "
        "return {name}(completions=responses, ground_truth=[prompt.ground_truth] * len(responses))",
    ),
)


@dataclass(frozen=True)
class Signature:
    """How to call a function: `form` is one of FORMS, `by_position` the parameters that take no keyword, in order."""

    form: tuple[str, ...]
    by_position: tuple[str, ...]
    names: frozenset[str]

    def call(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """`function` on `arguments`, by keyword wherever it can be: the order of its parameters is its own affair."""
        positional = [arguments[name] for name in self.by_position]
        return function(*positional, **{k: v for k, v in arguments.items() if k not in self.by_position})


def read_signature(function: Callable[..., Any], spec: str) -> Signature:
    """The form of `function`, which the user named as `spec`. Raises ValueError when it has none of the three."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise ValueError(f"reward function {spec!r} has no signature to read ({error}); {EXPECTED}") from error
    named = {n: p for n, p in parameters.items() if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
    required = {name for name, parameter in named.items() if parameter.default is Parameter.empty}
    fitting = [form for form in FORMS if named.keys() >= set(form) >= required]
    if not fitting:
        shown = ", ".join(str(parameter).partition("=")[0].partition(":")[0] for parameter in parameters.values())
        raise ValueError(f"reward function {spec!r} takes ({shown}); {EXPECTED}{_hint(set(parameters), spec)}")
    form = max(fitting, key=lambda form: len(required & set(form)))  # the first of those that fit alike
    by_position = [name for name in form if named[name].kind is Parameter.POSITIONAL_ONLY]
    return Signature(form, tuple(sorted(by_position, key=list(named).index)), frozenset(named))


def _hint(names: set[str], spec: str) -> str:
    found = next((remedy for marks, remedy in FOREIGN if marks <= names), "")
    return "; " + found.format(name=spec.rpartition(":")[2]) if found else ""
