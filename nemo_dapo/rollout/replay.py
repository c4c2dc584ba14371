"""The rollouts of an earlier run, played back in the real one: same rollouts, same weights, checked by whoever doubts it.

A run with `logger.rollout_every=1 logger.rollout_tokens=true` records, step by step and in submission order, every group
that decided the step: kept, dropped or aborted. `rollout.replay=<its rollouts folder>` puts this engine in place of the
servers; everything else is the real run. Verdicts are not replayed: the run's own rewarder judges the tokens again.
The sampler asks in submission order, so the k-th request of a step is the k-th recorded group; whatever it asks for beyond
them is surplus, which it cancels.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan
from nemo_dapo.telemetry.rollouts import RecordedGroup, read_rollouts, rollouts_path
from nemo_dapo.types import Draft, Prompt, Sample, SamplingParams

SURPLUS_SECONDS = 300.0  # until the recorded groups of a step have been judged; a surplus request waits so long
SAME = "replay with the options, the data, the reward and the model of the recorded run"


class ReplayEngine:
    """Implements `nemo_dapo.interfaces.RolloutEngine` by the Parquet files in `folder`.

    Raises ValueError for a folder without any, and later for a step that is missing or was not recorded whole; RuntimeError
    where the run takes another course than the recorded one.
    """

    must_repeat = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 1
        self._groups: list[RecordedGroup] | None = None  # of `step`, once asked for
        self._handed_out = 0
        if not recorded_steps(folder):
            raise ValueError(
                f"rollout.replay={folder} holds no step_*.parquet; name the rollouts/ folder of a recorded run"
            )

    async def generate(
        self, prompt: Prompt, n: int, params: SamplingParams, drafts: Sequence[Draft] = ()
    ) -> list[Sample]:
        """The next recorded group, which must be of `prompt`; waits to be cancelled where the step has no more."""
        if self._groups is None:
            self._groups = self._read()
        if self._handed_out < len(self._groups):
            group = self._groups[self._handed_out]
            self._handed_out += 1
            self._compare(group, prompt, n)
            return list(group.samples)
        await asyncio.sleep(SURPLUS_SECONDS)
        raise RuntimeError(
            f"step {self.step} needs more than the {len(self._groups)} groups recorded in {self.folder}: the verdicts are "
            f"not those of the recorded run; {SAME}"
        )

    def begin_update(self, version: int, seats: Sequence[Seat] = ()) -> UpdatePlan:
        """The next step is `version` + 1; nobody is sent anything."""
        if self._groups is not None and self._handed_out < len(self._groups):
            raise RuntimeError(
                f"step {self.step} used {self._handed_out} of the {len(self._groups)} groups recorded in {self.folder}: "
                f"the verdicts are not those of the recorded run; {SAME}"
            )
        self.step, self._groups, self._handed_out = version + 1, None, 0
        return UpdatePlan(version, "", 0.0, "")

    def finish_update(self, everyone: Sequence[Sent]) -> None:
        """Nothing was sent."""

    def sleep(self) -> None:
        """There is no server to put to sleep."""

    def wake_weights(self) -> None:
        """Nor one to wake."""

    def wake_up(self) -> None:
        """Nor one to wake."""

    def metrics(self) -> dict[str, float]:
        """Nothing happens at servers that are not there."""
        return {}

    def close(self) -> None:
        """Nor one to end."""

    def _read(self) -> list[RecordedGroup]:
        path = rollouts_path(self.folder, self.step)
        if not path.exists():
            steps = recorded_steps(self.folder)
            raise ValueError(
                f"{path} is missing: recorded are steps {steps[0]} to {steps[-1]} ({len(steps)} of them); set "
                "trainer.max_steps accordingly, and record with logger.rollout_every=1"
            )
        return read_rollouts(path)

    def _compare(self, group: RecordedGroup, prompt: Prompt, n: int) -> None:
        where = f"step {self.step}, group {group.index}"
        if (group.uid, group.prompt_token_ids) != (prompt.uid, prompt.token_ids):
            raise RuntimeError(f"{where} was of prompt {group.uid}, the run asks for {prompt.uid}; {SAME}")
        if len(group.samples) != n:
            raise RuntimeError(f"{where} has {len(group.samples)} samples, the run asks for {n}; {SAME}")


def recorded_steps(folder: Path) -> list[int]:
    """Steps that `folder` holds a file of, in order."""
    found = [re.fullmatch(r"step_(\d+)\.parquet", path.name) for path in folder.glob("step_*.parquet")]
    return sorted(int(match.group(1)) for match in found if match)
