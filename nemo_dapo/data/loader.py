"""The endless stream of training prompts, and its place as a few integers.

The stream is a function of (data, seed, solve statistics) alone: every rank that builds a loader gets the same one, so a
state saved by any number of ranks restores under any other. It needs to live on rank 0 only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nemo_dapo.data.curriculum import Curriculum
from nemo_dapo.data.load import PromptSet
from nemo_dapo.data.mixture import Cursor, next_set
from nemo_dapo.types import Prompt

logger = logging.getLogger(__name__)


class PromptLoader:
    """Seeded, reshuffled each epoch, mixed by weight; problems the curriculum calls solved are passed over."""

    def __init__(self, sets: Sequence[PromptSet], seed: int, curriculum: Curriculum | None = None) -> None:
        _check(sets)
        self.sets = tuple(sets)
        self.seed = seed
        self.curriculum = curriculum or Curriculum()
        self._cursors = [Cursor(chosen.prompts, seed) for chosen in self.sets]
        self._drawn = [0] * len(self.sets)
        self._warned: set[str] = set()

    @property
    def skipped(self) -> int:
        """Prompts passed over as solved since the start of the run."""
        return sum(cursor.skipped for cursor in self._cursors)

    @property
    def epoch(self) -> int:
        """Full passes over the set with the fewest."""
        return min(cursor.epoch for cursor in self._cursors)

    def next(self) -> Prompt:
        """The next prompt; when a set's problems are all solved it serves them all, and says so once."""
        index = next_set([chosen.weight for chosen in self.sets], self._drawn)
        self._drawn[index] += 1
        cursor = self._cursors[index]
        prompt = cursor.next(self.curriculum.is_solved)
        if prompt is not None:
            return prompt
        self._warn_all_solved(self.sets[index].name)
        prompt = cursor.next(lambda uid: False)
        assert prompt is not None
        return prompt

    def record(self, uid: str, correct: int, attempts: int) -> None:
        """One visit of a problem: `correct` of `attempts` responses with a verdict were right."""
        self.curriculum.record(uid, correct, attempts)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and what it learned of each problem: numbers and texts only."""
        sets = {
            chosen.name: {
                "sha256": chosen.report.sha256,
                "weight": chosen.weight,
                "position": cursor.position,
                "skipped": cursor.skipped,
                "drawn": drawn,
            }
            for chosen, cursor, drawn in zip(self.sets, self._cursors, self._drawn, strict=True)
        }
        return {"seed": self.seed, "epoch": self.epoch, "sets": sets, "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`. Raises ValueError when it belongs to other data, weights or another seed."""
        self._check_same_stream(state)
        saved = [state["sets"][chosen.name] for chosen in self.sets]
        self._cursors = [
            Cursor(chosen.prompts, self.seed, one["position"], one["skipped"])
            for chosen, one in zip(self.sets, saved, strict=True)
        ]
        self._drawn = [one["drawn"] for one in saved]
        self.curriculum.load_state_dict(state["curriculum"])

    def _check_same_stream(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        remedy = "restore the data and seed the checkpoint was made with, or start a new run (checkpoint.resume=never)"
        if state["seed"] != now["seed"]:
            raise ValueError(f"the checkpoint's data order has seed {state['seed']}, this run {now['seed']}: {remedy}")
        if list(state["sets"]) != list(now["sets"]):
            raise ValueError(
                f"the checkpoint's training sets are {', '.join(state['sets'])}, this run's {', '.join(now['sets'])}: "
                f"{remedy}"
            )
        for name, one in now["sets"].items():
            for key, what in (("sha256", "content (sha256)"), ("weight", "weight")):
                if state["sets"][name][key] != one[key]:
                    raise ValueError(
                        f"training set {name!r} has {what} {one[key]}, the checkpoint's had "
                        f"{state['sets'][name][key]}: {remedy}"
                    )

    def _warn_all_solved(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "every problem of training set %r was solved in its last %d visits: skipping would leave none, so all "
                "are served again; add harder data or set data.skip_solved_visits=0",
                name,
                self.curriculum.skip_solved_visits,
            )


def _check(sets: Sequence[PromptSet]) -> None:
    if not sets:
        raise ValueError("data.train is empty: name at least one training set")
    for chosen in sets:
        if not chosen.weight > 0:
            raise ValueError(
                f"data.train.{chosen.name}.weight={chosen.weight} must be positive: remove the set instead"
            )
        if not chosen.prompts:
            raise ValueError(f"training set {chosen.name!r} has no prompts: {chosen.report}")
        if len({prompt.uid for prompt in chosen.prompts}) < len(chosen.prompts):
            raise ValueError(f"training set {chosen.name!r} holds a problem twice: load it with load_prompt_set")
