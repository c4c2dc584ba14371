"""What can be said of the data's options before anything slow is imported or read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from nemo_dapo.config import DataConfig, DataSetConfig
from nemo_dapo.data import formats
from nemo_dapo.data.readers import files, is_on_hub


def check_data(config: DataConfig) -> None:
    """Raises one ValueError that lists every format or file that does not exist, and every option that would do nothing."""
    found: list[str] = []
    for half, sets in (("train", config.train), ("eval", config.eval)):
        for name, chosen in sets.items():
            found += [f"data.{half}.{name}: {problem}" for problem in _check_set(chosen, half)]
    if found:
        raise ValueError("data:\n" + "\n".join(f"  - {problem}" for problem in found))


def _check_set(config: DataSetConfig, half: str) -> Iterator[str]:
    try:
        module = formats.find(config.format)
    except ValueError as error:
        yield str(error)
        return
    known: frozenset[str] = getattr(module, "OPTIONS", frozenset(field.name for field in fields(config)))
    ignored = changed(config) - known - formats.COMMON
    ignored |= changed(config) & {"train": {"samples"}, "eval": {"weight"}}[half]
    for name in sorted(ignored):
        value = getattr(config, name)
        yield f"{name}={value!r} does nothing in {half} data of format={config.format}: remove it{_hint(name)}"
    if "path" in getattr(module, "OPTIONS", ()) and not is_on_hub(config):
        try:
            files(config.path)
        except ValueError as error:
            yield str(error)


def changed(config: DataSetConfig) -> set[str]:
    """The options that differ from their defaults."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config)
    }
    return {name for name, default in defaults.items() if getattr(config, name) != default}


def _hint(option: str) -> str:
    return ", or set format=columns" if option == "columns" else ""
