"""The job of node_jobs.py: examples/train_dapo.py itself, looked at after each sync, held up where asked.

$NODES_FOLDER/syncs/N.safetensors   the policy's weights of step N
$NODES_FOLDER/syncs/N.json          of each server, by its index, ids and log-probabilities of a greedy answer with them,
                                    and the digest of its parameters (digest_worker.py)
$NODES_FOLDER/cue                   `rollout`, `sync` or `update`: the next such phase moves it to `in_<phase>`, and is long
"""

from nemo_dapo.launcher import end_with_launcher

end_with_launcher()

import asyncio
import contextlib
import functools
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from safetensors.torch import save_file
from torch import Tensor

from nemo_dapo.phase import Phase
from nemo_dapo.rollout import client
from nemo_dapo.rollout.answers import Expected
from nemo_dapo.rollout.received import Received
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.trainer import DAPOTrainer
from nemo_dapo.types import Prompt, SamplingParams

FOLDER = Path(os.environ["NODES_FOLDER"])
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_dapo.py"
PROMPT = tuple(range(20, 28))
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
PIECE_BYTES = 1 << 18
UPDATE_SECONDS, TENSOR_SECONDS = 10.0, 0.4  # of a long update, and for each of the 26 tensors of a long export


async def greedy(url: str, headers: dict[str, str]) -> dict[str, Any]:
    """One server's answer to PROMPT."""
    prompt = Prompt(uid="greedy", token_ids=PROMPT, problem="", ground_truth="")
    body, received = client.request_body(prompt, GREEDY, [1]), Received(GREEDY.max_tokens)
    async with client.session(headers) as http:
        expected = Expected("greedy", GREEDY.max_tokens, frozenset([1]))
        await client.sample(http, client.Server(url), body, expected, received.add)
        async with http.post(f"{url}/collective_rpc", json={"method": "parameter_digest"}) as reply:
            reply.raise_for_status()
            digests = (await reply.json())["results"]
    return {"ids": received.token_ids.tolist(), "logprobs": received.logprobs.tolist(), "digests": digests}


def ask_all(engine: Any) -> dict[int, dict[str, Any]]:
    """The answers of every server that answers."""
    answers = {}
    for server in engine.servers.servers:
        with contextlib.suppress(OSError, aiohttp.ClientError, ValueError):  # a fault was set: it is not there
            answers[server.index] = asyncio.run(greedy(server.url, engine.servers.headers))
    return answers


def look_after_each_sync() -> None:
    sync = DAPOTrainer.sync_weights

    def watched(self: DAPOTrainer) -> None:
        policy: Any = self.policy
        weights: dict[str, Tensor] = {}
        seconds = TENSOR_SECONDS if cued("sync") else 0.0
        policy.export_weights = functools.partial(exported, policy.export_weights, weights, seconds)
        sync(self)
        del policy.export_weights
        if (FOLDER / "faults").exists():
            return
        if self.controller is not None and hasattr(self.controller.engine, "servers"):
            place = FOLDER / "syncs" / str(self.progress.rollout_steps)
            place.parent.mkdir(exist_ok=True)
            save_file(weights, place.with_suffix(".safetensors"))
            place.with_suffix(".json").write_text(json.dumps(ask_all(self.controller.engine)))

    DAPOTrainer.sync_weights = watched  # type: ignore[method-assign]


def cued(phase: str) -> bool:
    """Whether this phase is the one that is asked for; it then is no more."""
    cue = FOLDER / "cue"
    if os.environ["RANK"] != "0" or not cue.exists() or cue.read_text() != phase:
        return False
    cue.rename(FOLDER / f"in_{phase}")
    return True


def hold_up_where_asked() -> None:
    enter = Phase.enter

    @contextmanager
    def held(self: Phase, name: str) -> Iterator[None]:
        with enter(self, name):
            if name in ("rollout", "update") and cued(name):
                time.sleep(UPDATE_SECONDS if name == "update" else 0)
            yield

    Phase.enter = held  # type: ignore[method-assign]


def exported(
    export: Callable[[], Iterator[tuple[str, Tensor]]], copies: dict[str, Tensor], seconds: float
) -> Iterator[tuple[str, Tensor]]:
    """What is exported, copied on its way; each tensor takes `seconds` longer."""
    for name, tensor in export():
        time.sleep(seconds)
        copies[name] = tensor.detach().cpu().clone().contiguous()
        yield name, tensor


if __name__ == "__main__":
    in_pieces: Any = functools.partialmethod(Sender.__init__, piece_bytes=PIECE_BYTES)  # of a tiny model
    Sender.__init__ = in_pieces  # type: ignore[method-assign]
    look_after_each_sync()
    hold_up_where_asked()
    sys.argv = [str(SCRIPT), *sys.argv[1:]]
    runpy.run_path(str(SCRIPT), run_name="__main__")
