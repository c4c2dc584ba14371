"""What the Dockerfile adds to NVIDIA's container is enough, and touches no engine; `make container` takes the steps."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Another version of one of these, and the container's torch, its extensions or Megatron no longer fit together.
ENGINES = {"torch", "triton", "numpy", "transformers", "megatron-core", "megatron-bridge", "transformer-engine", "apex"}


def required_by(name: str, extras: frozenset[str] = frozenset(), known: set[str] | None = None) -> set[str]:
    """Names of all that `name` requires, directly or not, as far as it is installed here."""
    known = set() if known is None else known
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return known
    for requirement in map(Requirement, lines):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        key = canonicalize_name(requirement.name)
        if wanted and key not in known:
            known.add(key)
            required_by(requirement.name, frozenset(requirement.extras), known)
    return known


@pytest.fixture(scope="module")
def listed() -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / "ngc.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.fixture(scope="module")
def in_container() -> set[str]:
    if (found := required_by("megatron-bridge")) == set():
        pytest.skip("Megatron-Bridge is not installed in this environment")
    return found


def test_what_the_trainer_depends_on_is_in_the_container_or_listed(
    listed: dict[str, Requirement], in_container: set[str]
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    missing = needed - in_container - listed.keys()
    assert not missing, "requirements/ngc.txt is to list them"


def test_the_list_is_closed_since_it_is_installed_without_dependencies(
    listed: dict[str, Requirement], in_container: set[str]
) -> None:
    for name in listed:
        missing = required_by(name) - in_container - listed.keys() - ENGINES
        assert not missing, f"{name} requires them, requirements/ngc.txt is to list them"


def test_no_engine_is_listed_and_what_is_tested_here_is_allowed(listed: dict[str, Requirement]) -> None:
    assert not listed.keys() & ENGINES
    for name, requirement in listed.items():
        assert requirement.specifier.contains(importlib.metadata.version(name)), requirement


def test_each_step_asks_uv_for_the_named_interpreter_whatever_pip_is_told(tmp_path: Path) -> None:
    """A stand-in for uv writes down its arguments; NVIDIA's variables for pip and uv must not reach what it installs."""
    said = tmp_path / "said"
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$UV_CONSTRAINT$UV_SYSTEM_PYTHON$@" >> {said}\n')
    uv.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/bin:/usr/bin", "UV_CONSTRAINT": "c", "UV_SYSTEM_PYTHON": "1"}
    dockerfile = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    steps = re.findall(r"sh (requirements/container\.sh .*?)(?: && |\n)", dockerfile)
    assert [step.split()[1] for step in steps] == ["vllm", "trainer", "package", "check", "check"]
    for step in steps[:3]:
        subprocess.run(["sh", *shlex.split(step)], cwd=ROOT, env=environment, check=True, timeout=60)
    vllm = "pip install --python /opt/vllm/bin/python"
    assert said.read_text().splitlines() == [
        "venv /opt/vllm",
        f"{vllm} vllm==0.32.0",
        "pip install --python /opt/venv/bin/python --no-deps --requirements requirements/../requirements/ngc.txt",
        "pip install --python /opt/venv/bin/python --no-deps --editable requirements/..",
        f"{vllm} --no-deps --editable requirements/..",
    ]


def test_a_module_that_cannot_be_imported_fails_the_check_by_name() -> None:
    command = ["sh", "requirements/container.sh", "check", sys.executable, "json", "no_such_module"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"container.sh: {sys.executable} cannot import no_such_module"
