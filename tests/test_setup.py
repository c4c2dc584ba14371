"""`make` on machines of all kinds: which Python it starts from, and what it says where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FINDER = ROOT / "requirements" / "find_python.sh"
# What stands in for an interpreter is asked one thing: to print its own path if it is a 3.11 that makes environments.
GOOD, OTHER_VERSION, BROKEN_SHIM = (
    "#!/bin/sh\necho $0\n",
    "#!/bin/sh\n",
    "#!/bin/sh\necho not installed >&2\nexit 127\n",
)


class Machine:
    """An empty PATH beside the shell's own tools, and an empty home."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, [root / "tools"]
        (root / "tools").mkdir()
        for tool in ("sh", "ls", "tr", "grep"):
            found = next(folder for folder in ("/bin", "/usr/bin") if Path(folder, tool).exists())
            (root / "tools" / tool).symlink_to(Path(found, tool))

    def program(self, place: str, text: str, *, on_path: bool = True) -> Path:
        file = self.root / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        if on_path:
            self.path.append(file.parent)
        return file

    def find(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": ":".join(map(str, self.path)), "HOME": str(self.root / "home")}
        command = ["/bin/sh", str(FINDER), *arguments]
        return subprocess.run(command, env=environment, cwd=self.root, capture_output=True, text=True, timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_3_11_is_found_behind_a_newer_python_3(machine: Machine) -> None:
    machine.program("newer/python3", OTHER_VERSION)
    good = machine.program("with space/python3.11", GOOD)
    found = machine.find()
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{good}\n", "")


def test_a_shim_that_refuses_does_not_hide_the_interpreter_behind_it(machine: Machine) -> None:
    machine.program("shims/python3.11", BROKEN_SHIM)
    good = machine.program("usr/python3", GOOD)
    assert machine.find().stdout == f"{good}\n"


@pytest.mark.parametrize(
    "place",
    [
        "home/.pyenv/versions/3.11.9/bin/python",
        "home/.local/share/uv/python/cpython-3.11.13-linux-x86_64-gnu/bin/python",
    ],
)
def test_interpreters_of_pyenv_and_uv_are_found_off_path(machine: Machine, place: str) -> None:
    machine.program("newer/python3", OTHER_VERSION)
    good = machine.program(place, GOOD, on_path=False)
    assert machine.find().stdout == f"{good}\n"


def test_where_there_is_none_uv_fetches_one_and_that_is_said(machine: Machine) -> None:
    machine.program("newer/python3", OTHER_VERSION)
    good = machine.program("fetched/python", GOOD, on_path=False)
    machine.program("bin/uv", f'#!/bin/sh\n[ "$2" = install ] || echo "{good}"\n')
    found = machine.find()
    assert found.stdout == f"{good}\n"
    assert "uv python install 3.11" in found.stderr


def test_where_none_can_be_fetched_one_line_says_what_to_do(machine: Machine) -> None:
    machine.program("newer/python3", OTHER_VERSION)
    machine.program("bin/uv", "#!/bin/sh\nexit 2\n")
    found = machine.find()
    assert (found.returncode, found.stdout) == (1, "")
    assert "install one" in found.stderr.splitlines()[-1]
    assert "make PYTHON=" in found.stderr.splitlines()[-1]


def test_an_interpreter_that_is_named_is_the_only_one_looked_at(machine: Machine) -> None:
    wrong = machine.program("newer/python3.12", OTHER_VERSION)
    good = machine.program("usr/python3.11", GOOD)
    assert machine.find(str(good)).stdout == f"{good}\n"
    refused = machine.find(str(wrong))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"PYTHON={wrong}" in refused.stderr
    assert machine.find("no-such-python").returncode == 1


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the interpreter of these tests is no 3.11")
def test_a_real_interpreter_answers_as_the_stand_ins_do() -> None:
    found = subprocess.run(
        ["sh", str(FINDER), sys.executable], env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert Path(found.stdout.strip()).samefile(sys.executable)


def test_what_make_starts_keeps_its_compiled_modules() -> None:
    """Containers often forbid it; then each process compiles torch, Megatron or vLLM anew, for 8 s of 16."""
    asked = ["make", "--eval", "environment: ; @env", "environment"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run(
        asked, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "OMP_NUM_THREADS=" in said
    assert "PYTHONDONTWRITEBYTECODE" not in said
