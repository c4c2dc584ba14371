"""The endless stream of training prompts, and its place as a few numbers and a hash.

The stream is a function of (data, seed, solve statistics) alone: every rank that builds a loader gets the same one, so a
state saved by any number of ranks restores under any other. It needs to live on rank 0 only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from nemo_dapo.data.curriculum import Curriculum
from nemo_dapo.data.load import PromptSet
from nemo_dapo.data.mixture import Cursor, next_set
from nemo_dapo.data.resume import REMEDY, changes, check_place
from nemo_dapo.types import Prompt

logger = logging.getLogger(__name__)


class PromptLoader:
    """Seeded, reshuffled each epoch, mixed by weight; problems the curriculum calls solved are passed over.

    `rendering` is the fingerprint of how problems become prompts. A state of other data or another rendering is refused, or
    with `accept_changed` taken over as far as it has a meaning.
    """

    def __init__(
        self,
        sets: Sequence[PromptSet],
        seed: int,
        curriculum: Curriculum | None = None,
        *,
        rendering: Mapping[str, str] | None = None,
        accept_changed: bool = False,
    ) -> None:
        _check(sets)
        self.sets = tuple(sets)
        self.seed = seed
        self.curriculum = curriculum or Curriculum()
        self.rendering = dict(rendering or {})
        self.accept_changed = accept_changed
        self._uids = [frozenset(prompt.uid for prompt in chosen.prompts) for chosen in self.sets]
        self._cursors = [Cursor(chosen.prompts, seed) for chosen in self.sets]
        self._drawn = [0] * len(self.sets)
        self._warned: set[str] = set()

    @property
    def solved(self) -> int:
        """How many problems are passed over as solved."""
        return sum(len(uids & self.curriculum.solved) for uids in self._uids)

    @property
    def epoch(self) -> int:
        """Full passes over the set with the fewest."""
        return min(cursor.epoch for cursor in self._cursors)

    def next(self) -> Prompt:
        """The next prompt; when a set's problems are all solved it serves them all, and says so once."""
        index = next_set([chosen.weight for chosen in self.sets], self._drawn)
        self._drawn[index] += 1
        solved: AbstractSet[str] = self.curriculum.solved
        if all_solved := self._uids[index] <= solved:
            self._warn_all_solved(self.sets[index].name)
            solved = frozenset()
        return self._cursors[index].next(solved, (self.curriculum.reopened, all_solved))

    def record(self, uid: str, correct: int, attempts: int) -> None:
        """One visit of a problem: `correct` of `attempts` responses with a verdict were right."""
        self.curriculum.record(uid, correct, attempts)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, of which data, and what it learned of each problem: numbers and texts only."""
        sets = {
            chosen.name: {
                "sha256": chosen.report.sha256,
                "weight": chosen.weight,
                "rows_read": chosen.report.rows_read,
                "dropped": dict(chosen.report.dropped),
                "kept": chosen.report.kept,
                "epoch": cursor.epoch,
                "after": cursor.after,
                "drawn": drawn,
            }
            for chosen, cursor, drawn in zip(self.sets, self._cursors, self._drawn, strict=True)
        }
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "rendering": self.rendering,
            "sets": sets,
            "curriculum": self.curriculum.state_dict(),
        }

    def accepted_changes(self, state: Mapping[str, Any]) -> list[str]:
        """How `state` differs from this loader apart from its place, a line each; nothing is changed.

        Raises ValueError when it holds no place in a stream, and when it belongs to other data, weights, rendering or
        another seed, unless `accept_changed`.
        """
        check_place(state)
        differences = changes(state, self.state_dict())
        if differences and not self.accept_changed:
            raise ValueError(
                "the checkpoint was made on other data:\n" + "\n".join(f"  - {d}" for d in [*differences, REMEDY])
            )
        return differences

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at `state`; raises what `accepted_changes` does.

        What differs is logged; then a set that both have goes on in its epoch, a new one starts, and the shares of the
        draws count from here.
        """
        differences = self.accepted_changes(state)
        for difference in differences:
            logger.warning("data.accept_changed: %s", difference)
        same_seed = state["seed"] == self.seed
        for index, chosen in enumerate(self.sets):
            saved = state["sets"].get(chosen.name)
            if saved is not None:
                # Another seed orders the epoch anew: it starts with the next one.
                place = (saved["epoch"], saved["after"]) if same_seed else (saved["epoch"] + 1, "")
                self._cursors[index] = Cursor(chosen.prompts, self.seed, *place)
            self._drawn[index] = 0 if saved is None or differences else saved["drawn"]
        self.curriculum.load_state_dict(state["curriculum"])

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
