"""The stand-in server as a process that is started, asked and ended as vLLM's is: for tests of what is around it alone.

`interpreter` writes the program that stands for rollout.python.
"""

from __future__ import annotations

import os
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_dapo.rollout.challenge import NONCE_PARAMETER, proof
from nemo_dapo.rollout.weights import verify
from tests.stand_in_server import Handler, StandIn, frames, say

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """#!/bin/sh
export PYTHONPATH={root}
case "$*" in
  *nemo_dapo.rollout.probe*) {probe} ;;
  *) exec {python} -m {module} "$@" ;;
esac
"""


def interpreter(path: Path, probe: str = "", module: str = "tests.stand_in_vllm") -> str:
    """A program that says what versions it has, or does `probe` instead, and otherwise runs a stand-in server, `module`."""
    probe = probe or f'exec {sys.executable} "$@"'
    path.write_text(SCRIPT.format(root=ROOT, python=sys.executable, probe=probe, module=module))
    path.chmod(0o755)
    return str(path)


def damage(version: int, folder: str, digest: str) -> str:
    """What is wrong with the weights in `folder`; '' where they are right."""
    try:
        verify.require_whole(Path(folder), version, digest)
        return ""
    except (ValueError, RuntimeError) as problem:
        return str(problem)


class Server(StandIn):
    """On the port of vLLM's command line."""

    def __init__(self) -> None:
        super().__init__(current, port=int(sys.argv[sys.argv.index("--port") + 1]))

    def control(self, handler: Handler) -> None:
        where = urllib.parse.urlsplit(handler.path)
        if where.path == "/health":
            nonce = urllib.parse.parse_qs(where.query)[NONCE_PARAMETER][0]
            say(handler, proof(os.environ["VLLM_API_KEY"], nonce, self.server_address[1]))
        elif where.path == verify.ROUTE and (wrong := damage(**handler.body)):
            say(handler, wrong.encode(), 422)
        elif where.path == "/update_weights" and self.refuses(handler.body["update_info"]):
            say(handler, b"", 500)
        else:
            super().control(handler)

    def refuses(self, info: Mapping[str, Any]) -> bool:
        return bool(damage(info["version"], info["folder"], info["digest"]))


def current(handler: Handler) -> None:
    """A good answer under the weights that the server was given last."""
    say(handler, frames(version=int(handler.server.version)))


if __name__ == "__main__":
    Server().thread.join()
