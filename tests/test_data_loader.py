"""The stream of training prompts: endless, shuffled, mixed, and resumable at any row on any number of ranks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_dapo.config import DataFormat, DataSetConfig
from nemo_dapo.data.curriculum import Curriculum
from nemo_dapo.data.load import PromptSet, load_problems
from nemo_dapo.data.loader import PromptLoader
from nemo_dapo.data.mixture import next_set
from nemo_dapo.data.problem import LoadReport, Problem, content_hash
from nemo_dapo.types import Prompt


def prompt(problem: Problem) -> Prompt:
    return Prompt(problem.uid, (1, 2), problem.problem, problem.answer)


def make_set(name: str, count: int, weight: float = 1.0, answer: str = "1") -> PromptSet:
    prompts = tuple(prompt(Problem(f"{name} {i}", answer)) for i in range(count))
    sha256 = content_hash(sorted(p.uid for p in prompts))
    return PromptSet(name, prompts, LoadReport(name, count, 0, {}, count, sha256), weight)


def take(loader: PromptLoader, count: int) -> list[str]:
    return [loader.next().problem for _ in range(count)]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def test_each_epoch_visits_every_problem_once_in_a_new_order() -> None:
    loader = PromptLoader([make_set("a", 20)], seed=0)
    first, second = take(loader, 20), take(loader, 20)
    assert sorted(first) == sorted(second) == sorted(p.problem for p in loader.sets[0].prompts)
    assert first != second
    assert loader.epoch == 2
    assert first != take(PromptLoader([make_set("a", 20)], seed=1), 20)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("resumed_ranks", [1, 2, 4])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_resume_around_the_epoch_boundary_visits_what_an_uninterrupted_run_does(
    ranks: int, resumed_ranks: int, offset: int
) -> None:
    size, after = 24, 50
    uninterrupted = take(PromptLoader([make_set("a", size)], seed=5), size + offset + after)

    # Every rank holds a loader and must see the same stream; any one's state restores all, under any number.
    before = [PromptLoader([make_set("a", size)], seed=5) for _ in range(ranks)]
    streams = [take(loader, size + offset) for loader in before]
    state = through_json(before[-1].state_dict())
    resumed = [PromptLoader([make_set("a", size)], seed=5) for _ in range(resumed_ranks)]
    for loader in resumed:
        loader.load_state_dict(state)
    streams_after = [take(loader, after) for loader in resumed]

    assert all(stream == uninterrupted[: size + offset] for stream in streams)
    assert all(stream == uninterrupted[size + offset :] for stream in streams_after)
    # Each rank taking every R-th prompt, as data parallelism would, sees no problem twice within an epoch.
    shares = [streams_after[rank][rank::resumed_ranks] for rank in range(resumed_ranks)]
    assert Counter(p for share in shares for p in share) == Counter(uninterrupted[size + offset :])


def test_resume_of_a_mixture_at_every_position_is_exact() -> None:
    def loader() -> PromptLoader:
        return PromptLoader([make_set("a", 5, 3.0), make_set("b", 3, 1.0)], seed=2)

    uninterrupted = take(loader(), 60)
    for position in range(40):
        start, resumed = loader(), loader()
        take(start, position)
        resumed.load_state_dict(through_json(start.state_dict()))
        assert take(resumed, 20) == uninterrupted[position : position + 20]


def test_a_mixture_keeps_its_weights_at_every_step() -> None:
    weights, drawn = [0.7, 0.2, 0.1], [0, 0, 0]
    for step in range(1, 1001):
        drawn[next_set(weights, drawn)] += 1
        assert all(abs(d - w * step) < 2 for d, w in zip(drawn, weights, strict=True))
    assert drawn == [700, 200, 100]


def test_a_hundred_repeats_train_as_none(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(30)]

    def loader(name: str, rows: list[dict[str, str]]) -> PromptLoader:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataSetConfig(format=DataFormat.columns, path=str(tmp_path / name))
        problems, report = load_problems("a", config)
        return PromptLoader([PromptSet("a", tuple(map(prompt, problems)), report)], seed=0)

    once = loader("once.jsonl", rows)
    state, stream = once.state_dict(), take(once, 100)
    for repeated in (rows * 100, [row for row in reversed(rows) for _ in range(100)]):
        many = loader("many.jsonl", repeated)
        assert many.state_dict() == state
        assert take(many, 100) == stream


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptLoader([make_set("a", 11)], seed=0), r"'a' has content \(sha256\) .*, the checkpoint's had"),
        (PromptLoader([make_set("a", 10, answer="2")], seed=0), r"'a' has content \(sha256\)"),
        (PromptLoader([make_set("a", 10, weight=2.0)], seed=0), r"'a' has weight 2.0, the checkpoint's had 1.0"),
        (PromptLoader([make_set("a", 10)], seed=1), r"has seed 0, this run 1"),
        (PromptLoader([make_set("b", 10)], seed=0), r"training sets are a, this run's b"),
    ],
)
def test_a_state_of_other_data_is_refused(other: PromptLoader, message: str) -> None:
    state = PromptLoader([make_set("a", 10)], seed=0).state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_sets_that_cannot_be_drawn_from_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        PromptLoader([], seed=0)
    with pytest.raises(ValueError, match=r"a\.weight=0\.0 must be positive"):
        PromptLoader([make_set("a", 3, weight=0.0)], seed=0)
    twice = make_set("a", 3)
    with pytest.raises(ValueError, match="holds a problem twice"):
        PromptLoader([PromptSet("a", twice.prompts * 2, twice.report)], seed=0)


# Curriculum


def test_a_problem_solved_in_its_last_k_visits_is_skipped_and_only_then() -> None:
    curriculum = Curriculum(skip_solved_visits=2)
    for correct, solved in [(4, False), (4, True), (3, False), (4, False), (4, True)]:
        curriculum.record("u", correct, 4)
        assert curriculum.is_solved("u") is solved
    curriculum.record("u", 0, 0)  # nothing but verifier errors: says nothing
    assert curriculum.is_solved("u")
    assert (curriculum.statistics["u"].attempts, curriculum.statistics["u"].correct) == (20, 19)
    assert not Curriculum(0).is_solved("u")


def test_solved_problems_leave_the_stream_and_resume_keeps_them_out() -> None:
    loader = PromptLoader([make_set("a", 10)], seed=3, curriculum=Curriculum(1))
    solved = {loader.next().uid for _ in range(4)}
    for uid in solved:
        loader.record(uid, 8, 8)
    resumed = PromptLoader([make_set("a", 10)], seed=3, curriculum=Curriculum(1))
    resumed.load_state_dict(through_json(loader.state_dict()))
    ours = [loader.next().uid for _ in range(18)]
    assert not solved & set(ours)
    assert Counter(ours).keys() == {p.uid for p in loader.sets[0].prompts} - solved
    assert [resumed.next().uid for _ in range(18)] == ours
    assert loader.skipped == resumed.skipped > 0


def test_when_all_problems_are_solved_they_are_served_again_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader = PromptLoader([make_set("a", 5)], seed=0, curriculum=Curriculum(1))
    for p in loader.sets[0].prompts:
        loader.record(p.uid, 1, 1)
    with caplog.at_level(logging.WARNING):
        assert len(set(take(loader, 5))) == 5
    assert len(caplog.records) == 1
    assert "every problem of training set 'a' was solved in its last 1 visits" in caplog.text


def test_statistics_are_exported_with_their_problems(tmp_path: Path) -> None:
    curriculum, chosen = Curriculum(), make_set("a", 2)
    curriculum.record(chosen.prompts[1].uid, 3, 8)
    curriculum.record(chosen.prompts[1].uid, 5, 8)
    curriculum.export(tmp_path / "s.jsonl", chosen.prompts)
    curriculum.export(tmp_path / "s.parquet", chosen.prompts)
    row = json.loads((tmp_path / "s.jsonl").read_text())
    assert (row["problem"], row["attempts"], row["correct"], row["visits"]) == ("a 1", 16, 8, 2)
    assert (row["pass_rate"], row["recent"]) == (0.5, [3 / 8, 5 / 8])
    assert pq.read_table(tmp_path / "s.parquet").to_pylist() == [row]
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.parquet"):
        curriculum.export(tmp_path / "s.csv")


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="correct=5 must lie between 0 and attempts=4"):
        Curriculum().record("u", 5, 4)
