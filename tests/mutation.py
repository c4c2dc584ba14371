"""Equations broken on purpose: a mutant replaces text of a module, so it never tests what that no longer says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType


def mutant(source: str, name: str, correct: str, broken: str) -> ModuleType:
    """The module of `source` with `correct`, which must stand there once, replaced by `broken`."""
    assert source.count(correct) == 1, f"{correct!r} occurs {source.count(correct)} times, expected once"
    module = ModuleType(f"mutant ({name})")
    exec(compile(source.replace(correct, broken), module.__name__, "exec", dont_inherit=True), module.__dict__)
    return module


def noticed_by(checks: Mapping[str, Callable[[ModuleType], None]], module: ModuleType) -> set[str]:
    """The checks that notice the mutant. Only a failed assertion counts: a crash would prove nothing about the check."""
    found = set()
    for name, check in checks.items():
        try:
            check(module)
        except AssertionError:
            found.add(name)
    return found
