"""Metrics reduce in one way, sinks survive a kill, and the console line reads well."""

from __future__ import annotations

import json
import math
import string
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_dapo.telemetry.kinds import MAX_KINDS, Kinds
from nemo_dapo.telemetry.metrics import (
    EffectiveShare,
    Last,
    Max,
    Mean,
    Metric,
    Min,
    Record,
    Sum,
    merge,
    merge_across_ranks,
    values,
)
from nemo_dapo.telemetry.sinks import Console, MetricsJsonl, Sinks, TensorBoardSink, WandbSink, duration, start_anew

# Metrics


def test_each_type_reduces_in_its_own_way() -> None:
    records: list[dict[str, Metric]] = [
        {"m": Mean(6.0, 3), "s": Sum(1.0), "hi": Max(2.0), "lo": Min(2.0), "l": Last(0.1)},
        {"m": Mean(1.0, 1), "s": Sum(4.0), "hi": Max(5.0), "lo": Min(-3.0), "l": Last(0.2)},
        {"m": Mean(1.0, 4), "s": Sum(2.0), "hi": Max(4.0), "lo": Min(0.0), "l": Last(0.3)},
    ]
    assert values(merge(records)) == {"m": 1.0, "s": 7.0, "hi": 5.0, "lo": -3.0, "l": 0.3}


def test_the_way_micro_batches_are_cut_does_not_change_the_mean() -> None:
    tokens = [0.5, -1.0, 2.0, 4.0, 0.25, 8.0, -3.0]  # exact in binary: equality needs no tolerance
    for cuts in ([0, 7], [0, 1, 7], [0, 3, 3, 5, 7], list(range(8))):
        pieces = [{"x": Mean(sum(tokens[a:b]), b - a)} for a, b in pairwise(cuts)]
        assert values(merge(pieces)) == {"x": sum(tokens) / 7}


def test_an_effective_share_is_of_all_weights_together() -> None:
    parts = [{"x": EffectiveShare(4.0, 8.0, 2)}, {"x": EffectiveShare(2.0, 4.0, 2)}]
    assert values(merge(parts)) == {"x": 36 / (12 * 4)}  # the mean of 1 and 0.5, the parts' own, is another number
    assert math.isnan(EffectiveShare(0.0, 0.0, 0).value)


def test_a_rank_without_a_metric_does_not_count() -> None:
    assert values(merge([{"a": Mean(2.0, 2)}, {}, {"b": Sum(1.0)}, {"a": Mean(0.0, 0)}])) == {"a": 1.0, "b": 1.0}


def test_the_mean_of_nothing_is_nan() -> None:
    assert math.isnan(Mean(0.0, 0).value)


@pytest.mark.parametrize("kind", [Max, Min])
def test_nan_is_not_lost_among_extremes(kind: type[Max] | type[Min]) -> None:
    for order in ([math.nan, 1.0], [1.0, math.nan]):
        assert math.isnan(merge([{"x": kind(v)} for v in order])["x"].value)


def test_a_metric_of_two_types_is_refused() -> None:
    with pytest.raises(ValueError, match="metric 'x' is a Mean in one record and a Sum in another"):
        merge([{"x": Mean(1.0, 1)}, {"x": Sum(1.0)}])


def test_one_process_is_its_own_merge() -> None:
    record = {"x": Mean(3.0, 2)}
    assert merge_across_ranks(record) == record


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    record: Record = {"mean": Mean(10.0 * rank, 1 + rank), "max": Max(rank)}
    if rank == 1:
        record = {**record, "only": Sum(5.0)}
    Path(folder, f"{rank}.json").write_text(json.dumps(values(merge_across_ranks(record))))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_see_the_same_merged_record(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        expected = {"mean": 10 / 3, "max": 1.0, "only": 5.0}
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


# metrics.jsonl


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, steps: range) -> Path:
    sink = MetricsJsonl(path)
    for step in steps:
        sink.log(step, {"train/loss": step / 4})
    sink.close()
    return path


def test_every_step_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = MetricsJsonl(tmp_path / "deep" / "metrics.jsonl")
    for step in (1, 2):
        before = time.time()
        sink.log(step, {"train/loss": 0.5, "rollout/accuracy": 1.0})
        line = read(tmp_path / "deep" / "metrics.jsonl")[-1]
        assert before - 0.001 <= line.pop("wall_time") <= time.time() + 0.001  # to the millisecond
        assert line == {"step": step, "train/loss": 0.5, "rollout/accuracy": 1.0}
    sink.close()


def test_a_number_that_is_not_finite_is_null_and_the_line_stays_json(tmp_path: Path) -> None:
    sink = MetricsJsonl(tmp_path / "m.jsonl")
    sink.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    sink.close()
    (line,) = read(tmp_path / "m.jsonl")
    assert line == {"step": 1, "wall_time": line["wall_time"], "a": None, "b": None, "c": 1.0}


def test_resume_removes_the_steps_that_will_run_again(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", range(1, 8))
    sink = MetricsJsonl(path, resumed_step=4)
    sink.log(5, {"train/loss": 9.0})
    sink.close()
    assert [(line["step"], line["train/loss"]) for line in read(path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
        (4, 1.0),
        (5, 9.0),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl"]


def test_a_line_cut_short_by_a_kill_is_removed_on_resume(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", range(1, 4))
    path.write_text(path.read_text() + '{"step": 4, "train/l')
    sink = MetricsJsonl(path, resumed_step=10)
    sink.log(11, {})
    sink.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3, 11]


def test_a_broken_line_in_the_middle_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", range(1, 3))
    text = "oops\n" + path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"m.jsonl, line 1: expected an object with \"step\", got 'oops"):
        MetricsJsonl(path, resumed_step=1)
    assert path.read_text() == text


def test_a_run_that_starts_anew_sets_every_record_of_the_earlier_ones_aside_and_loses_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in (1, 2, 3):
        start_anew(tmp_path)
        written(tmp_path / "metrics.jsonl", range(1, 1 + run))
        curves = TensorBoardSink(tmp_path / "tensorboard")
        curves.log(run, {"train/loss": float(run)})
        curves.close()
        if run != 2:  # the number is common to all records of a run: the second leaves a gap
            (tmp_path / "wandb_id").write_text(f"id{run}")
    assert [len(read(tmp_path / f"metrics.jsonl{end}")) for end in (".previous1", ".previous2", "")] == [1, 2, 3]
    for end, run in ((".previous1", 1), (".previous2", 2), ("", 3)):
        assert curve(tmp_path / f"tensorboard{end}", "train/loss") == [(run, float(run))]
    assert sorted(p.name for p in tmp_path.glob("wandb_id*")) == ["wandb_id", "wandb_id.previous1"]
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in said] == ["*.previous1", "*.previous2"]


# Other sinks


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        first.log(step, {"train/loss": float(step)})
    first.close()
    second = TensorBoardSink(tmp_path, resumed_step=3)
    second.log(4, {"train/loss": -1.0})
    second.close()
    assert curve(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -1.0)]


def test_wandb_asked_for_and_missing_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` raise ImportError
    with pytest.raises(ValueError, match=r"logger.wandb_project='p' needs wandb.*pip install wandb"):
        WandbSink(project="p", name="n", directory=tmp_path, config={})


class FakeWandb:
    """Records what a wandb run is told: the service itself needs an account."""

    def __init__(self) -> None:
        self.inits: list[dict] = []
        self.logged: list[dict] = []
        self.finished = 0

    def init(self, **options: object) -> FakeWandb:
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metric = (name, step_metric)

    def log(self, record: dict) -> None:
        self.logged.append(record)

    def finish(self) -> None:
        self.finished += 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        sink = WandbSink(project="p", name="n", directory=tmp_path, config={"seed": 1})
        sink.log(step, {"train/loss": 0.5})
        sink.close()
    assert fake.inits[0] == fake.inits[1]
    assert fake.inits[0]["resume"] == "allow"
    assert fake.logged == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.5}]
    assert fake.finished == 2


@pytest.mark.slow
def test_wandb_itself_accepts_what_we_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional and not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink(project="p", name="n", directory=tmp_path, config={"seed": 1})
    sink.log(1, {"train/loss": 0.5})
    sink.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_sinks_pass_everything_on_and_none_is_fine(tmp_path: Path) -> None:
    Sinks().log(1, {"a": 1.0})
    Sinks().close()
    both = Sinks([MetricsJsonl(tmp_path / "a"), MetricsJsonl(tmp_path / "b")])
    both.log(1, {"x": 1.0})
    both.close()
    for name in ("a", "b"):
        (line,) = read(tmp_path / name)
        assert line == {"step": 1, "wall_time": line["wall_time"], "x": 1.0}
    with pytest.raises(ValueError, match="closed file"):
        both.log(2, {})


# The console line

STEP = {
    "rollout/accuracy": 0.634,
    "rollout/reward": 0.26,
    "rollout/groups_kept": 16.0,
    "rollout/groups_sampled": 24.0,
    "rollout/mean_length": 41.4,
    "train/entropy": 0.312,
    "train/lr": 1.5e-4,
    "train/loss": -0.0121,
    "train/grad_norm": 0.208,
    "rollout/logprob_gap": 2.9e-6,
    "rollout/tokens_per_second": 5012.3,
    "time/rollout": 1.94,
    "time/update": 0.82,
    "time/sync": 0.1,
    "time/step": 2.91,
}


def console_line(record: dict[str, float], *, step: int, max_steps: int) -> str:
    return Console(max_steps, clock=lambda: 0.0).line(step, record)


def test_the_line_says_everything_in_order() -> None:
    assert console_line(STEP, step=12, max_steps=200) == (
        "step 12/200 | acc 0.63 | reward 0.26 | kept 16/24 | len 41 | entropy 0.31 | grad 0.21 | lr 1.5e-4 | gap 3e-6 | "
        "5,012 tok/s | rollout 1.9s update 0.8s sync 0.1s | 2.9 s/step, 9 min left"
    )


@pytest.mark.parametrize("missing", [key for key in STEP if key != "train/loss"])
def test_what_is_missing_is_left_out(missing: str) -> None:
    whole = console_line(STEP, step=1, max_steps=2)
    line = console_line({k: v for k, v in STEP.items() if k != missing}, step=1, max_steps=2)
    assert len(line) < len(whole)
    assert set(line.split()) <= set(whole.split())


def test_a_step_without_an_update_still_has_a_line() -> None:
    assert console_line({"rollout/accuracy": 0.0}, step=1, max_steps=2) == "step 1/2 | acc 0.00"


def test_odd_numbers_are_shown_as_they_are() -> None:
    record = {"rollout/accuracy": math.nan, "train/grad_norm": math.inf, "rollout/logprob_gap": 0.0, "train/lr": 0.0}
    assert console_line(record, step=0, max_steps=2) == "step 0/2 | acc nan | grad inf | lr 0e+0 | gap 0e+0"


def test_trouble_is_said_when_there_is_some() -> None:
    quiet = {"rollout/verifier_errors": 0.0, "progress/refused_updates": 0.0}
    assert console_line(quiet, step=1, max_steps=2) == "step 1/2"
    loud = {"rollout/verifier_errors": 3.0, "progress/refused_updates": 1.0}
    assert console_line(loud, step=1, max_steps=2) == "step 1/2 | VERIFIER ERRORS 3 | REFUSED UPDATES 1"


def test_seconds_a_step_and_the_time_left_count_evaluation_and_saving() -> None:
    """The clock at each line: what passed since the last one is the step, whatever the trainer timed of it."""
    times = iter([100.0, 103.0, 110.0, 117.0])
    console = Console(10, clock=lambda: next(times))
    step = {"time/step": 2.0}
    assert console.line(0, {"eval/accuracy": 0.5}) == "step 0/10 | eval 0.500"
    assert console.line(1, step) == "step 1/10 | 3.0 s/step, 27 s left"
    assert console.line(2, step) == "step 2/10 | 7.0 s/step, 40 s left"  # 5 s on average
    assert console.line(10, step) == "step 10/10 | 7.0 s/step"


def test_a_duration_is_given_in_the_units_one_would_say() -> None:
    seconds = (0.4, 45, 119, 600, 3600 * 3 + 1200, 3600 * 52)
    assert [duration(s) for s in seconds] == ["0 s", "45 s", "2 min", "10 min", "3 h 20 min", "2 d 4 h"]


@pytest.mark.parametrize(("text", "is_new"), [("no token for 9 s", False), ("HTTP 500", True)])
def test_an_error_is_of_a_kind_by_its_text_without_numbers(text, is_new):
    kinds = Kinds()
    assert kinds.is_new("no token for 15 s")
    assert kinds.is_new(text) is is_new


def test_the_kinds_of_errors_that_are_said_have_an_end():
    kinds = Kinds()
    assert [kinds.is_new(letter) for letter in string.ascii_letters].count(True) == MAX_KINDS
