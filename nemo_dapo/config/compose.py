"""From a command line and YAML files to the typed configuration, with every misspelt key and wrong type named."""

from __future__ import annotations

import argparse
import difflib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dapo.config.schema import DataConfig, ModelConfig, RewardConfig, RunConfig


@dataclass
class OpenDataConfig(DataConfig):
    """Hydra cannot add a key to a dict of dataclasses on the command line: here it may; `typed` checks it after."""

    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


@dataclass
class OpenRewardConfig(RewardConfig):
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class OpenRunConfig(RunConfig):
    data: DataConfig = field(default_factory=OpenDataConfig)
    reward: RewardConfig = field(default_factory=OpenRewardConfig)


OPEN = re.compile(r"\bOpen(?=(Run|Data|Reward)Config\b)")  # users know the classes of schema.py


def register() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of every top-level YAML's defaults list.

    Its free dicts (sets of data, reward terms, options of Megatron-core and vLLM) take new keys without Hydra's `+`.
    """
    node = OmegaConf.structured(OpenRunConfig)
    _open_dicts(node)
    ConfigStore.instance().store(name="schema", node=node)


def _open_dicts(node: DictConfig) -> None:
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            if is_dataclass(OmegaConf.get_type(child)):
                _open_dicts(child)
            else:
                OmegaConf.set_struct(child, False)


def compose_file(config: Path, overrides: list[str]) -> DictConfig:
    """What the YAML file `config` and the `overrides` of a command line compose to, neither resolved nor complete.

    Raises ValueError in one line that names the key and its remedy.
    """
    try:
        with initialize_config_dir(str(config.parent), version_base="1.1"):
            return compose(config.stem, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error


def asked_to_print(config: Path, arguments: list[str]) -> str | None:
    """The text that `--help` or `--cfg job` asks for; None for a run. Hydra's own way to it takes NeMo's slow imports.

    Raises ValueError for a multirun, which would start every run from another folder.
    """
    asked = get_args_parser().parse_args(arguments)
    if asked.multirun:
        raise ValueError(
            "-m (--multirun) is not supported here; start one command for each run, each with its own name="
        )
    if asked.help:
        return _help(config)
    if asked.cfg != "job" or asked.config_name or asked.config_path or asked.config_dir:
        return None
    return _yaml(compose_file(config, asked.overrides), asked)


def _yaml(composed: DictConfig, asked: argparse.Namespace) -> str:
    try:
        chosen = OmegaConf.select(composed, asked.package) if asked.package else composed
        if not isinstance(chosen, DictConfig):
            raise ValueError(f"--package {asked.package} must name a group of options, such as algorithm")
        return OmegaConf.to_yaml(chosen, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error


def _help(config: Path) -> str:
    groups: dict[str, list[str]] = {}
    for file in sorted(config.parent.glob("*/**/*.yaml")):
        group, *name = file.relative_to(config.parent).with_suffix("").parts
        groups.setdefault(group, []).append("/".join(name))
    lines = [
        "Options are key=value, such as algorithm.group_size=8; groups of them are chosen by group=name:",
        "",
        *(f"  {group:<12} {', '.join(names)}" for group, names in groups.items()),
        "",
        "  --cfg job    prints all options as this command line resolves them (with --package algorithm, those below it)",
        "  python -m nemo_dapo.config.reference    prints the meaning, type, range and default of each",
        "",
        f"{config} names the defaults.",
    ]
    return "\n".join(lines) + "\n"


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


def saved_model(file: Path) -> ModelConfig:
    """The options of the model in `file`, a run's config.yaml. Raises ValueError that names the key it does not know."""
    try:
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file).model))
    except OmegaConfBaseException as error:
        raise ValueError(f"{file}: model.{explain(error)}") from error
    assert isinstance(model, ModelConfig)
    return model


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf found wrong: the key, the reason and, for a misspelt key, the nearest one."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        reason = OPEN.sub("", str(cause).splitlines()[0])
        return f"{cause.full_key or 'configuration'}: {reason}{_nearest(cause)}"
    reason = str(error).partition("Config search path")[0]  # where Hydra looked does not help: conf/ is the only place
    where = getattr(error, "override", None) or "configuration"  # of an argument that Hydra cannot parse
    return f"{where}: {' '.join(reason.split())}"


def _nearest(error: OmegaConfBaseException) -> str:
    names = [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
    near = [] if error.key in names else difflib.get_close_matches(str(error.key), names)
    return f"; did you mean {near[0]}?" if near else ""
