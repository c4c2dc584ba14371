"""What stands for the servers and for the data where a test is about neither: see `nemo_dapo.interfaces`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan
from nemo_dapo.types import Prompt


class FakeEngine:
    """A RolloutEngine but for `generate`, which each test writes: no server is updated, put to sleep or asked."""

    must_repeat = False

    def begin_update(self, version: int, seats: Sequence[Seat]) -> UpdatePlan:
        return UpdatePlan(version, "", 0.0, "")

    def finish_update(self, everyone: Sequence[Sent]) -> None: ...

    def sleep(self) -> None: ...

    def wake_weights(self) -> None: ...

    def wake_up(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass
class FakeLoader:
    """A PromptLoader of problems that are counted from 0, problem i with uid `p<i>`; it keeps no statistics."""

    position: int = 0

    def next(self) -> Prompt:
        self.position += 1
        return self.prompt(self.position - 1)

    def prompt(self, i: int) -> Prompt:
        return Prompt(uid=f"p{i}", token_ids=(i, i + 1), problem=f"problem {i}", ground_truth=str(i), metadata={"i": i})

    def record(self, uid: str, correct: int, attempts: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
