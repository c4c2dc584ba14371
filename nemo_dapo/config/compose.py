"""From a command line and YAML files to the typed configuration, with every misspelt key and wrong type named."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dapo.config.schema import DataConfig, RunConfig


@dataclass
class OpenDataConfig(DataConfig):
    """Hydra cannot add a key to a dict of dataclasses on the command line: here it may; `typed` checks it after."""

    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


@dataclass
class OpenRunConfig(RunConfig):
    data: DataConfig = field(default_factory=OpenDataConfig)


def register() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of every top-level YAML's defaults list."""
    ConfigStore.instance().store(name="schema", node=OpenRunConfig)


def typed(config: DictConfig) -> RunConfig:
    """Plain typed objects of a composed configuration. Raises ValueError that names the key and, for a misspelt one, what
    it may have meant."""
    try:
        plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=True))
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    assert isinstance(run, RunConfig)
    return run


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf found wrong: the key, the reason and, for a misspelt key, the nearest one."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause).splitlines()[0].replace(OpenRunConfig.__name__, RunConfig.__name__)
        return f"{cause.full_key or 'configuration'}: {reason}{_nearest(cause)}"
    reason = str(error).partition("Config search path")[0]  # where Hydra looked does not help: conf/ is the only place
    where = getattr(error, "override", None) or "configuration"  # of an argument that Hydra cannot parse
    return f"{where}: {' '.join(reason.split())}"


def _nearest(error: OmegaConfBaseException) -> str:
    names = [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
    near = [] if error.key in names else difflib.get_close_matches(str(error.key), names)
    return f"; did you mean {near[0]}?" if near else ""
