"""How a script under `examples/` starts: what is missing or wrong is said within seconds, before the slow imports.

Megatron takes some twenty seconds to import. The options are therefore composed and checked with Hydra alone first, and
then once more on the way through NeMo's `hydra_runner`, or without NeMo as it does, which calls the script's `main`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.types import TaskFunction
from omegaconf import DictConfig

from nemo_dapo import config as schema
from nemo_dapo.config import RunConfig
from nemo_dapo.ending import Ending
from nemo_dapo.environment import rank_variables
from nemo_dapo.lock import RunLock
from nemo_dapo.redaction import secrets_in

ENVIRONMENT = "run `make setup` in the checkout and start with .venv/bin/python (see README.md)"
# No folder `.hydra`, no log file, no other working directory: a run's records are the trainer's own (nemo.core.config).
NEMO_HYDRA_SETTINGS = ["hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.run.dir=."]
QUIET = {"megatron": logging.WARNING, "httpx": logging.WARNING, "nv_one_logger": logging.ERROR}
INSTALL = {
    "torch": ENVIRONMENT,
    "transformers": ENVIRONMENT,
    "megatron.core": f"{ENVIRONMENT}, or start in NVIDIA's NeMo container, which holds it",
    "megatron.bridge": f"{ENVIRONMENT}, or start in NVIDIA's NeMo container, which holds it",
    "vllm": (
        f"{ENVIRONMENT}, or make it one of its own by `sh requirements/container.sh vllm /opt/vllm` and set "
        "rollout.python=/opt/vllm/bin/python"
    ),
}


def start(
    main: Callable[[DictConfig, Ending], None], config: Path, needs: tuple[str, ...], check: Callable[[RunConfig], None]
) -> None:
    """Run `main` on the options that the YAML file `config` and the command line compose to, with `run_by_hydra`.

    Before that: `needs`, modules of this interpreter, must be there, `check` must accept the options, and no other run may
    be at work in the folder. Otherwise a line on standard error says so, and every rank exits with 2.
    """
    ending = Ending()
    schema.register()
    with ExitStack() as stack, ending.ends_the_process():
        if (text := schema.asked_to_print(config, sys.argv[1:])) is not None:
            print(text if is_rank_zero() else "", end="", flush=True)
            return
        require(*needs)
        run = composed(config, sys.argv[1:])
        if run is not None:
            refuse_secrets(sys.argv[1:])
            check(run)
            require_vllm(run)
            os.environ.update(rank_variables(os.environ, run.model.precision))
            if is_rank_zero():
                stack.enter_context(RunLock(Path(run.output_dir)))
                for remark in schema.remarks(run):
                    print(f"note: {remark}", file=sys.stderr, flush=True)
                print("importing Megatron (about 20 s)", flush=True)
        quiet_libraries()

        def run_main(cfg: DictConfig) -> None:
            main(cfg, ending)

        run_by_hydra(run_main, config)


def run_by_hydra(task: TaskFunction, config: Path) -> None:
    """Call `task` with what Hydra composes of `config` and the command line, by NeMo's `hydra_runner`.

    That needs Lightning, which NVIDIA's containers block, and through it ten more packages; where it cannot be imported,
    Hydra is called as it calls it.
    """
    if is_installed("nemo.core.config.hydra_runner"):
        runner = importlib.import_module("nemo.core.config").hydra_runner
        runner(config_path=str(config.parent), config_name=config.stem)(task)()
        return
    parser = get_args_parser()
    arguments = parser.parse_args()
    arguments.overrides += NEMO_HYDRA_SETTINGS
    _run_hydra(arguments, parser, task, config_path=str(config.parent), config_name=config.stem)


def refuse_secrets(arguments: list[str]) -> None:
    """Raises ValueError for a secret on the command line, which every user of the machine can read."""
    if found := secrets_in(arguments):
        raise ValueError(
            f"{', '.join(found)}: a command line is public on its machine; for the servers' key set the variable "
            "NEMO_DAPO_API_KEY or name a file in rollout.api_key_file, others in a YAML file"
        )


def quiet_libraries() -> None:
    """Leave out hundreds of lines a rank that say nothing of the run, and date the others that warn; call it before the
    libraries are imported, and once more after NeMo has set logging up."""
    os.environ.setdefault("MEGATRON_SUPPRESS_FUSION_WARNINGS", "1")
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    for name in ("configuration_utils", "modeling_utils"):
        logging.getLogger(f"transformers.{name}").addFilter(is_no_deprecation)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Dated())


class Dated(logging.Formatter):
    """Says of a warning or an error when it was and by which rank, which Hydra's format leaves out."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{self.formatTime(record, '%F %T')} rank {os.environ.get('RANK', '0')}: {text}"


def is_no_deprecation(record: logging.LogRecord) -> bool:
    """Megatron-Bridge calls transformers by names that are deprecated there: nothing that a user could change."""
    return "is deprecated!" not in str(record.msg)


def is_rank_zero() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """How many ranks the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def composed(config: Path, arguments: list[str]) -> RunConfig | None:
    """The typed options of a command line; None where it asks Hydra for something other than one run of `config`.

    Raises ValueError in one line that names the key and its remedy.
    """
    parsed = get_args_parser().parse_args(arguments)
    if parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        return None
    if parsed.config_name or parsed.config_path or parsed.config_dir:
        return None
    return schema.typed(schema.compose_file(config, parsed.overrides))


def require(*modules: str) -> None:
    """Raises ValueError that names every missing module and the command that installs it."""
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        lines = "\n".join(f"  - {module}: {INSTALL[module]}" for module in missing)
        raise ValueError(f"{sys.executable} lacks what this script needs:\n{lines}")


def require_vllm(config: RunConfig) -> None:
    """Where rank 0's host serves, the servers run in `rollout.python` or this interpreter, which then must have vLLM."""
    python = config.rollout.python
    serves = config.rollout.placement in (schema.Placement.local, schema.Placement.colocated)
    if not is_rank_zero() or config.rollout.replay or not serves:
        return
    if not python:
        require("vllm")
    elif shutil.which(python) is None:
        raise ValueError(
            f"rollout.python={python!r} is no program; name the interpreter of the environment with vLLM, or leave it "
            "empty for this one"
        )


def is_installed(module: str) -> bool:
    """Whether `module` can be found; its parents are imported, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing
        return False
