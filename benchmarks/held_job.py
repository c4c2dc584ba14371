"""The job of rank_faults.py: examples/train_dapo.py itself, lingering in one phase, with an engine that needs no server.

    held_job.py FOLDER PHASE SECONDS scripted|real [options of train_dapo.py]

Every rank that enters PHASE of step 2 leaves a file `FOLDER/held_RANK` and stays SECONDS before it goes on.
"""

from nemo_dapo.launcher import end_with_launcher

end_with_launcher()

import os
import random
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nemo_dapo.phase import Phase
from nemo_dapo.rollout.weights.plan import Seat, UpdatePlan
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams
from tests.fakes import FakeEngine

FOLDER, PHASE, SECONDS, ENGINE = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_dapo.py"
STEP = 2


class ScriptedEngine(FakeEngine):
    """Random byte tokens at log-probability 0: what is sampled does not matter here."""

    version = 0
    servers = ()
    door = None

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        return [self._sample(random.randrange(4, 17)) for _ in range(n)]

    @staticmethod
    def _sample(length: int) -> Sample:
        tokens = np.array([random.randrange(2, 250) for _ in range(length)], np.int32)
        return Sample(tokens, np.zeros(length, np.float32), "length")

    def begin_update(self, version: int, seats: Sequence[Seat]) -> UpdatePlan:
        self.version = version
        return UpdatePlan(version, "float32", 0.0, "")

    def close(self) -> None: ...


def linger() -> None:
    enter = Phase.enter

    @contextmanager
    def held(self: Phase, name: str) -> Iterator[None]:
        with enter(self, name):
            if name == PHASE and self.step == STEP and not (FOLDER / f"held_{os.environ['RANK']}").exists():
                time.sleep(1.0)  # for the heartbeat to tell
                (FOLDER / f"held_{os.environ['RANK']}").touch()
                time.sleep(SECONDS)
            yield

    Phase.enter = held  # type: ignore[method-assign]


if __name__ == "__main__":
    linger()
    if ENGINE == "scripted":
        from nemo_dapo.rollout.engine import VLLMEngine

        VLLMEngine.prepare = lambda *_, **__: ScriptedEngine()  # type: ignore[method-assign, assignment]
    sys.argv = [str(SCRIPT), *sys.argv[5:]]
    runpy.run_path(str(SCRIPT), run_name="__main__")
