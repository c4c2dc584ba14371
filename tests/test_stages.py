"""The order of stages, and who moves first at each of them: the trainer or the servers."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_dapo.stages import Stages, check_order
from nemo_dapo.types import Stage

SCORE, TRAIN, SYNC, GENERATE = Stage.score, Stage.train, Stage.sync, Stage.generate
POSSIBLE = {(SCORE, TRAIN), (SCORE, SYNC), (TRAIN, SCORE), (TRAIN, SYNC), (SYNC, GENERATE), (GENERATE, SCORE)}


class Both:
    """Policy and engine in one, which write down what moves."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.moves: list[str] = []

    def enter(self, stage: Stage) -> None:
        self.moves.append(f"policy to {stage.value}")
        self.stage = stage

    def sleep(self) -> None:
        self.moves.append("servers sleep")

    def wake_weights(self) -> None:
        self.moves.append("room for weights")

    def wake_up(self) -> None:
        self.moves.append("room for all")


def stages_of(both: Any) -> Stages:
    return Stages(both, both)


@pytest.mark.parametrize("then", Stage)
@pytest.mark.parametrize("now", Stage)
def test_any_other_order_than_that_of_a_step_is_refused(now: Stage, then: Stage) -> None:
    if (now, then) in POSSIBLE:
        check_order(now, then)
        return
    with pytest.raises(RuntimeError, match=rf"stage {then.value} cannot follow {now.value}, only .* can"):
        check_order(now, then)


def test_the_trainer_leaves_before_servers_wake_and_servers_sleep_before_it_comes_back() -> None:
    both = Both(TRAIN)
    for stage in (SYNC, GENERATE, SCORE, TRAIN):
        for _ in range(2):  # the second time nothing moves
            stages_of(both).enter(stage)
    assert both.moves == [
        "policy to sync",
        "room for weights",
        "policy to generate",
        "room for all",
        "servers sleep",
        "policy to score",
        "policy to train",
    ]


@pytest.mark.parametrize(("now", "then"), [(TRAIN, GENERATE), (GENERATE, TRAIN), (SYNC, SCORE)])
def test_a_wrong_order_moves_neither_policy_nor_servers(now: Stage, then: Stage) -> None:
    both = Both(now)
    with pytest.raises(RuntimeError, match="cannot follow"):
        stages_of(both).enter(then)
    assert (both.stage, both.moves) == (now, [])
