"""What no record of a run may hold: keys, tokens, passwords. Whatever leaves the process as options passes through here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SECRET_NAME = re.compile(
    r"(^|[._-])(api_?key|access_?key|private_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE
)
CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")  # https://user:password@host
SECRET_IN_QUERY = re.compile(r"(?<=[?&])([\w.-]*(?:key|token|secret|password|signature))=[^&#\s]+", re.IGNORECASE)


def redacted(value: Any, name: str = "") -> Any:
    """`value`, options as plain dicts and lists, without what is secret by its name: such a text becomes ''.

    Credentials within an address are cut out of it.
    """
    if isinstance(value, Mapping):
        return {key: redacted(one, str(key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(one, name) for one in value]
    if not isinstance(value, str):
        return value
    return "" if SECRET_NAME.search(name) else _without_credentials(value)


def redacted_command(arguments: Sequence[str]) -> list[str]:
    """A command line, `key=value` arguments among others, without the values of secret keys."""
    return [_redacted_argument(argument) for argument in arguments]


def secrets_in(arguments: Sequence[str]) -> list[str]:
    """Keys of the arguments that carry a secret: a command line is public on its machine."""
    pairs = [argument.partition("=") for argument in arguments]
    return [key.lstrip("+") for key, _, value in pairs if value and SECRET_NAME.search(key)]


def _redacted_argument(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if value and SECRET_NAME.search(key):
        return f"{key}{equals}…"
    # Hydra takes mappings as well: rollout.vllm={hf_token: …}
    nested = re.sub(
        r"([\w.-]+)(\s*:\s*)([^,{}\s]+)",
        lambda found: f"{found[1]}{found[2]}…" if SECRET_NAME.search(found[1]) else found[0],
        argument,
    )
    return _without_credentials(nested)


def _without_credentials(text: str) -> str:
    return SECRET_IN_QUERY.sub(r"\1=…", CREDENTIALS_IN_URL.sub("…@", text))
