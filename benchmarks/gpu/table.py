"""Runs rows and prints their table: `python -m benchmarks.gpu.table [ROW…] [--device cpu] [--lines FILE]`.

On a GPU each row runs in a process of its own: what one leaves in memory is no matter of the next one's. Exit code 1 where
a row fails or a line is out of its bounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.line import Line

ROOT = Path(__file__).parents[2]
ROWS = ("scorer", "flat_memory", "transfer", "agreement", "gradients", "lifecycle", "update", "offload")
PACKAGES = ("torch", "megatron-core", "megatron-bridge", "transformer-engine", "transformers", "triton")
SECONDS_A_ROW = 300


def main() -> int:
    asked = arguments()
    if not asked.here:  # asking for the device's name takes memory there, which a row may want to measure
        print("\n".join(heading(asked.device)), flush=True)
    holds = True
    for row in asked.rows or ROWS:
        run = in_this_process if asked.device == "cpu" or asked.here else in_its_own
        for line in run(row, asked.device):
            print(render(row, line), flush=True)
            holds &= line.holds
            if asked.lines:
                with asked.lines.open("a") as file:
                    file.write(json.dumps({"row": row, "line": asdict(line)}) + "\n")
    return 0 if holds else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lines", type=Path, help="append every line to this file, as JSON")
    parser.add_argument("--here", action="store_true", help="in this process, as on a CPU, and without a heading")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu takes the same way at a tiny size")
    return asked


def in_this_process(row: str, device: str) -> Iterator[Line]:
    try:
        yield from importlib.import_module(f"benchmarks.gpu.{row}").measure(device)
    except Exception as error:  # the other rows are worth having; a line of no value does not hold
        traceback.print_exc()
        yield failed(type(error).__name__)


def in_its_own(row: str, device: str) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines")
        lines.touch()
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.table",
            row,
            "--device",
            device,
            "--here",
            "--lines",
            str(lines),
        ]
        started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            code = started.wait(SECONDS_A_ROW)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_session(started)
        said = [Line(**json.loads(text)["line"]) for text in lines.read_text().splitlines()]
    yield from said
    if code is None:
        yield failed(f"not done after {SECONDS_A_ROW} s")
    elif code and all(line.holds for line in said):
        yield failed(f"exit code {code}")


def failed(why: str) -> Line:
    return Line(f"failed: {why}", math.nan, most=0)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """What a row has left running, such as a receiver; the row itself has ended, or is late."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def heading(device: str) -> Iterator[str]:
    """What ran where, and the table's first two lines."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), dry: sizes are tiny"
    versions = ", ".join(f"{package} {found}" for package in PACKAGES if (found := installed(package)))
    yield f"{name}; Python {platform.python_version()}, CUDA {torch.version.cuda}, {versions}"
    yield ""
    yield "| row | what | measured | expected | |"
    yield "|---|---|---|---|---|"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def render(row: str, line: Line) -> str:
    mark = "" if not line.expected else "holds" if line.holds else "**does not hold**"
    return f"| {row} | {line.what} | {line.value:.4g} {line.unit} | {line.expected} | {mark} |"


if __name__ == "__main__":
    sys.exit(main())
