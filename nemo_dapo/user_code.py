"""Functions of the user's own, by the name that an option gives: `package.module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def user_module(name: str) -> ModuleType:
    """The module `name`, found where Python looks or, last so that it hides nothing, in the folder the run was started in:
    the path of a script lacks it. Raises whatever its import does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def user_function(spec: str, role: str, otherwise: str = "") -> Callable[..., Any]:
    """The function that `spec` names; `role` is what it is for, `otherwise` what else the option takes.

    Raises ValueError with value, expectation and remedy for a name that cannot be used.
    """
    module_name, _, name = spec.partition(":")
    expected = f"expected package.module:name of an importable function{otherwise}"
    if not module_name or not name:
        raise ValueError(f"{role} {spec!r}: {expected}; write it as in my_package.my_module:my_function")
    try:
        module = user_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        remedy = "put its folder on PYTHONPATH, or mend the import"
        raise ValueError(f"{role} {spec!r}: {type(error).__name__}: {error}; {expected}; {remedy}") from error
    function: object = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{role} {spec!r}: {module_name} has no function {name!r}; {expected}")
    return function
