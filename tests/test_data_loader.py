"""The stream of training prompts: endless, shuffled, mixed, and resumable at any row on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data import mixture
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
        config = DataSetConfig(format="columns", path=str(tmp_path / name))
        problems, report = load_problems("a", config)
        return PromptLoader([PromptSet("a", tuple(map(prompt, problems)), report)], seed=0)

    once = loader("once.jsonl", rows)
    state, stream = once.state_dict(), take(once, 100)
    for repeated in (rows * 100, [row for row in reversed(rows) for _ in range(100)]):
        many = loader("many.jsonl", repeated)
        many.load_state_dict(state)
        assert take(many, 100) == stream


def test_a_state_of_other_data_is_refused_with_all_that_differs() -> None:
    state = PromptLoader([make_set("a", 10)], seed=0, rendering={"template": "{problem}"}).state_dict()
    cases = [
        (
            [make_set("a", 11)],
            0,
            r"'a' has content \(sha256\) \w+ of 11 problems, the checkpoint's had \w+ of 10; 11 rows",
        ),
        (
            [make_set("a", 10, answer="2")],
            0,
            r"'a' has content \(sha256\) \w+ of 10 problems, the checkpoint's had \w+ of 10$",
        ),
        ([make_set("a", 10, weight=2.0)], 0, r"'a' has weight 2.0, the checkpoint's had 1.0"),
        ([make_set("a", 10)], 1, r"has seed 0, this run 1"),
        ([make_set("b", 10)], 0, r"training sets are a, this run's b"),
    ]
    for sets, seed, message in cases:
        with pytest.raises(ValueError, match=f"(?m){message}") as caught:
            PromptLoader(sets, seed, rendering={"template": "{problem}"}).load_state_dict(state)
        assert "data.accept_changed=true" in str(caught.value)
    every = PromptLoader([make_set("a", 12, weight=3.0)], seed=5, rendering={"template": "{problem} Think."})
    with pytest.raises(ValueError, match=r"(?s)seed 0.*the template is '{problem} Think\.'.*weight 3\.0.*content"):
        every.load_state_dict(state)


def test_an_evaluation_set_that_shortened_the_training_set_is_named_as_the_cause() -> None:
    before, after = make_set("a", 10), make_set("a", 9)
    report = replace(after.report, rows_read=10, dropped={"in an evaluation set": 1, "empty answer": 0})
    state = through_json(PromptLoader([before], seed=0).state_dict())
    with pytest.raises(
        ValueError, match=r"dropped for 'in an evaluation set': 1, not 0 \(the evaluation sets changed"
    ) as e:
        PromptLoader([replace(after, report=report)], seed=0).load_state_dict(state)
    assert "rows were read" not in str(e.value)
    assert "data.exclude_eval=false" in str(e.value)


def test_accepted_changes_are_said_and_the_epoch_goes_on_with_what_it_has_not_passed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = PromptLoader([make_set("a", 30)], seed=4)
    passed = take(before, 45)[30:]  # half of the second epoch
    state = through_json(before.state_dict())
    sets = [make_set("a", 40), make_set("new", 20)]
    more = PromptLoader(sets, seed=4, accept_changed=True)
    with caplog.at_level(logging.WARNING):
        more.load_state_dict(state)
    assert "training sets are a, this run's a, new" in caplog.text
    assert "40 problems" in caplog.text
    drawn = take(more, 200)
    ours = [name for name in drawn if name.startswith("a ")]
    rest = next(i for i, name in enumerate(ours) if name in passed)  # the third epoch begins here, or later
    assert not set(ours[:rest]) & set(passed)
    assert {f"a {i}" for i in range(30)} - set(passed) <= set(ours[:rest])
    # A set that is new to the run is not drawn ahead of the others to catch up.
    assert Counter(name.split()[0] for name in drawn) == {"a": 100, "new": 100}


def test_an_accepted_seed_starts_the_next_epoch() -> None:
    before = PromptLoader([make_set("a", 10)], seed=0)
    take(before, 15)
    other = PromptLoader([make_set("a", 10)], seed=1, accept_changed=True)
    other.load_state_dict(through_json(before.state_dict()))
    assert sorted(take(other, 10)) == sorted(p.problem for p in other.sets[0].prompts)


@pytest.mark.parametrize(
    ("key", "value"), [("epoch", -3), ("epoch", "x"), ("epoch", True), ("drawn", 1.5), ("after", "x"), ("after", None)]
)
def test_a_state_that_is_no_place_is_refused(key: str, value: Any) -> None:
    state = PromptLoader([make_set("a", 10)], seed=0).state_dict()
    state["sets"]["a"][key] = value
    for accept in (False, True):
        with pytest.raises(ValueError, match=r"of training set 'a' is|in training set 'a' is"):
            PromptLoader([make_set("a", 10)], seed=0, accept_changed=accept).load_state_dict(state)


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
        assert ("u" in curriculum.solved) is solved
    curriculum.record("u", 0, 0)  # nothing but verifier errors: says nothing
    assert curriculum.solved == {"u"}
    assert (curriculum.statistics["u"].attempts, curriculum.statistics["u"].correct) == (20, 19)
    never = Curriculum(0)
    never.record("u", 4, 4)
    assert not never.solved


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
    assert loader.solved == resumed.solved == 4


def test_resume_is_exact_while_problems_become_solved_and_unsolved() -> None:
    def visits(loader: PromptLoader, rng: random.Random, count: int) -> list[str]:
        """Draws, each recorded two draws later, as with groups in flight; some visits undo a solved problem."""
        seen: list[str] = []
        for _ in range(count):
            seen.append(loader.next().uid)
            loader.record(seen[max(0, len(seen) - 3)], rng.choice((1, 2)), 2)
        return seen

    for cut in range(60):
        rng = random.Random(cut)
        whole = PromptLoader([make_set("a", 7), make_set("b", 4)], seed=1, curriculum=Curriculum(1))
        visits(whole, rng, cut)
        resumed = PromptLoader([make_set("a", 7), make_set("b", 4)], seed=1, curriculum=Curriculum(1))
        resumed.load_state_dict(through_json(whole.state_dict()))
        later = rng.getstate()
        rest = visits(whole, rng, 40)
        rng.setstate(later)
        assert visits(resumed, rng, 40) == rest


def test_a_draw_costs_what_is_left_not_what_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = PromptLoader([make_set("a", 3000)], seed=0, curriculum=Curriculum(1))
    open_ = {p.uid for p in loader.sets[0].prompts[:5]}
    for p in loader.sets[0].prompts[5:]:
        loader.record(p.uid, 1, 1)
    hashed = 0

    def counted(data: bytes) -> Any:
        nonlocal hashed
        hashed += 1
        return hashlib.sha256(data)

    monkeypatch.setattr(mixture, "hashlib", SimpleNamespace(sha256=counted))
    drawn = Counter(loader.next().uid for _ in range(500))
    assert drawn == dict.fromkeys(open_, 100)
    assert hashed == 500  # one a draw


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
