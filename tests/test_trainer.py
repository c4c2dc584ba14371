"""The step around the algorithm: what the loop refuses, whom it names, and when servers sleep.

Policy and controller are stubs here; the real ones run under this loop in test_end_to_end.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nemo_dapo import checkpoint, window_file
from nemo_dapo import trainer as trainer_module
from nemo_dapo.batching import make_batch, pack
from nemo_dapo.checkpoint import CheckpointError
from nemo_dapo.config import (
    AlgorithmConfig,
    DecayStyle,
    EvaluationConfig,
    ModelConfig,
    OnFailedSave,
    OptimizerConfig,
    Precision,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
    Transport,
)
from nemo_dapo.controller import Rollout
from nemo_dapo.interfaces import NonFiniteGradientError
from nemo_dapo.mismatch import Mismatch
from nemo_dapo.rollout.host import node_name
from nemo_dapo.rollout.weights import direct
from nemo_dapo.rollout.weights.plan import Seat, Sent, UpdatePlan
from nemo_dapo.stages import check_order
from nemo_dapo.telemetry.metrics import Mean
from nemo_dapo.trainer import DAPOTrainer
from nemo_dapo.types import Group, Prompt, Sample, Stage, TrainBatch, Verdict, VersionSpan
from tests.stand_in_devices import HostMemory

N, G, R = 2, 2, 3  # prompts, samples a prompt, response tokens
OLDER_GAP = 0.01  # what a step has learned, in nats a token; rollout.max_logprob_gap is a tenth of it


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rollout_of(uids: list[str], reason: str = "stop", spans: tuple[VersionSpan, ...] = (), **options: Any) -> Rollout:
    sample = Sample((5, 6, 1), (-0.5,) * R, reason, spans)
    groups = tuple(
        Group(Prompt(uid, (3, 4), "", ""), (sample,) * G, (Verdict(True), Verdict(False)), i)
        for i, uid in enumerate(uids)
    )
    batch = make_batch(groups, torch.tensor([[1.0, -1.0]] * len(uids)), **options)
    return Rollout(batch, groups, {"rollout/accuracy": 0.5})


@dataclass
class TakenStub:
    """A policy's checkpoint: the number of its updates; written once `stub.may_write` is set."""

    stub: Stub
    path: Path
    updates: str

    def write(self) -> list[Path]:
        self.stub.may_write.wait(60)
        if self.stub.disk_full:
            raise OSError(28, "No space left on device", str(self.path))
        (self.path / "weights").write_text(self.updates)
        return [self.path / "weights"]

    def finish(self) -> list[Path]:
        return []


class Stub:
    """Policy, engine and controller in one, which write down what they were asked for."""

    def __init__(self, gap: float = 0.0, refuse: tuple[int, ...] = ()) -> None:
        self.engine = self
        self.calls: list[str] = []
        self.records: list[dict[str, float]] = []
        self.gap, self.refuse, self.updates = gap, refuse, 0
        self.saved, self.disk_full = 0, False
        self.scored: list[list[int]] = []  # sequences, a call
        self.olds: list[list[float] | None] = []  # theta_old's log-probabilities that came with each update
        self.taken: list[tuple[str, bool]] = []
        self.may_write = threading.Event()
        self.may_write.set()
        self.recorded_before_save: list[tuple[int, int]] = []

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", torch.zeros(1)

    def begin_update(self, version: int, seats: Any) -> UpdatePlan:
        assert seats == [Seat(node_name())]
        self.calls.append(f"weights {version}")
        return UpdatePlan(version, "float32", 9.0, "")

    def finish_update(self, everyone: Any) -> None:
        assert everyone == [Sent()]

    @property
    def must_repeat(self) -> bool:
        return False

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake_weights(self) -> None:
        self.calls.append("wake weights")

    def wake_up(self) -> None:
        self.calls.append("wake up")

    stage = Stage.train

    def enter(self, stage: Stage) -> None:
        check_order(self.stage, stage)
        self.stage = stage

    def memory_record(self) -> dict[str, Any]:
        return {}

    async def collect(self, step: int) -> Rollout:
        self.calls.append(f"collect {step}")
        return rollout_of(["first", "second"])

    replica = 0

    def owners(self, lengths: torch.Tensor, minibatches: Any) -> torch.Tensor:
        return torch.zeros_like(lengths)

    def logprobs(self, batch: TrainBatch, minibatches: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        self.calls.append("logprobs")
        chosen = torch.arange(batch.num_sequences) if minibatches is None else torch.cat(list(minibatches))
        self.scored.append(chosen.tolist())
        scores, tokens = torch.zeros_like(batch.rollout_logprobs), batch.token_indices(chosen)
        scores[tokens] = self.scores(batch)[tokens]
        return scores

    def reference_logprobs(self, batch: TrainBatch, minibatches: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        raise AssertionError("no run of these has a KL term, and so none a reference model")

    def scores(self, batch: TrainBatch) -> torch.Tensor:
        """[T] the trainer's: `gap` above the newest weights', and OLDER_GAP above those of older ones."""
        apart = torch.full_like(batch.rollout_logprobs, self.gap)
        if batch.newest is not None:
            apart[~batch.newest] = OLDER_GAP
        return torch.where(batch.rollout_logprobs == 0, 0.0, batch.rollout_logprobs + apart)

    def update(self, batch: Any, loss_fn: Any, old: Any, reference: Any = None) -> dict[str, Any]:
        self.calls.append("update")
        self.olds.append(None if old is None else old.tolist())
        self.updates += 1
        if self.updates in self.refuse:
            raise NonFiniteGradientError(math.inf, [3], [1])
        # As of a mini-batch whose loss sums to 1 over `updates` tokens: the step's mean must weigh by tokens.
        mismatch, micro = Mismatch(), pack(batch, range(batch.num_sequences), old_logprobs=self.scores(batch))
        assert micro.old_logprobs is not None
        mismatch.see(micro.old_logprobs, micro)
        return {"loss": Mean(1.0, self.updates)} | mismatch.metrics(lambda host, op: host, counts=True)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        self.records.append({"step": step, **metrics})
        self.recorded_before_save.append((step, self.saved))

    def take(self, path: Path, *, portable: bool, apart: bool) -> TakenStub:
        self.saved += 1
        self.taken.append((path.parent.name, apart))
        return TakenStub(self, path, str(self.updates))

    def load(self, path: Path) -> None:
        self.calls.append(f"load {path.parent.name}")

    def export_statistics(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": {}, "loader": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append("load controller")


class StoppedInTheRollout(Stub):
    """Rank 0 is signalled while it samples the second step, whose prompts have been drawn already."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self.stop, self.drawn = stop, 0

    async def collect(self, step: int) -> Rollout:
        self.drawn += 1
        if step == 2:
            self.stop.set()
            await asyncio.sleep(600)
        return await super().collect(step)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def take(self, path: Path, *, portable: bool, apart: bool) -> TakenStub:
        self.calls.append("save")
        return super().take(path, portable=portable, apart=apart)


def test_a_stop_in_the_rollout_saves_the_step_before_it_with_the_prompts_still_to_come(tmp_path: Path) -> None:
    stop = threading.Event()
    stub = StoppedInTheRollout(stop)
    made = trainer(stub, tmp_path)
    made.stop = stop
    made.fit()
    assert made.progress.rollout_steps == 1
    assert stub.calls[-1] == "save"
    (saved,) = (tmp_path / "checkpoints").glob("step_*")
    assert saved.name == "step_000001"
    assert json.loads((saved / "state.json").read_text())["drawn"] == 1


def test_a_stop_between_two_steps_saves_once(tmp_path: Path) -> None:
    stop = threading.Event()
    stub = StoppedInTheRollout(stop)
    made = trainer(stub, tmp_path)
    made.stop = stop

    def save_and_stop() -> None:
        made.save(made.state())
        stop.set()

    made.save_when_due = save_and_stop  # type: ignore[method-assign]
    made.fit()
    assert made.progress.rollout_steps == 1
    assert stub.calls.count("save") == 1


class ToDevices(Stub):
    """Of a run whose servers none live: what goes to devices is exported, and sent to nobody."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.calls.append("export")
        yield "weight", torch.zeros(self.size)

    def begin_update(self, version: int, seats: Any) -> UpdatePlan:
        assert seats == [Seat(node_name(), "GPU-0")]
        self.calls.append(f"weights {version}")
        return UpdatePlan(version, "bfloat16", 9.0, "", is_direct=True)


@pytest.fixture
def _host_memory_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "gpu_uuid", lambda: "GPU-0")
    monkeypatch.setattr(direct, "GPU", HostMemory)


@pytest.mark.usefixtures("_host_memory_for_devices")
def test_weights_for_devices_are_looked_at_once_before_any_server_is_told_of_them(tmp_path: Path) -> None:
    stub = ToDevices(4)
    made = trainer(stub, tmp_path, transport=Transport.device)
    for version in range(2):
        made.progress.rollout_steps, stub.stage = version, Stage.train
        made.sync_weights()
    assert [call for call in stub.calls if "wake" not in call] == [
        "export",
        "weights 0",
        "export",
        "weights 1",
        "export",
    ]

    stub = ToDevices(5)
    with pytest.raises(ValueError, match=r"weight \(5,\) instead of \(4,\).*nothing was replaced"):
        trainer(stub, tmp_path, transport=Transport.device).sync_weights()
    assert stub.calls[-1] == "export"


class DyingOfUpdates(ToDevices):
    """Its servers have the weights after the third time that they are sent."""

    @property
    def must_repeat(self) -> bool:
        return self.calls.count("weights 7") < 3


@pytest.mark.usefixtures("_host_memory_for_devices")
def test_weights_that_no_server_lived_to_take_are_sent_again_in_the_order_of_the_stages(tmp_path: Path) -> None:
    stub = DyingOfUpdates(4)
    made = trainer(stub, tmp_path, transport=Transport.device)
    made.progress.rollout_steps = 7
    made.sync_weights()
    once = ["wake weights", "weights 7", "export", "wake up"]
    looked = ["wake weights", "export", "weights 7", "export", "wake up"]
    assert stub.calls == [*looked, "sleep", *once, "sleep", *once]
    assert stub.stage is Stage.generate


def trainer(stub: Stub, folder: Path, transport: Transport = Transport.host, **algorithm: Any) -> DAPOTrainer:
    """On a model folder of one tensor."""
    config = RunConfig(
        model=ModelConfig(path=str(model_folder(folder))),
        algorithm=AlgorithmConfig(prompts_per_step=N, group_size=G, minibatch_size=G, **algorithm),
        trainer=TrainerConfig(max_steps=2),
        rollout=RolloutConfig(max_logprob_gap=1e-3, transport=transport),
        optimizer=OptimizerConfig(max_refused_updates=2),
        evaluation=EvaluationConfig(every=0),
    )
    controller: Any = stub
    return DAPOTrainer(config, folder, stub, controller, None)


def model_folder(folder: Path) -> Path:
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "config.json").write_text('{"hidden_size": 4}')
        (model / "tokenizer.json").write_text("{}")
        save_file({"weight": torch.zeros(4)}, model / "model.safetensors")
    return model


def test_servers_sleep_from_the_end_of_the_rollout_to_the_next_weights(tmp_path: Path) -> None:
    stub = Stub()
    trainer(stub, tmp_path).fit()
    step = ["sleep", "logprobs", "update", "update"]
    first, second, third = (["wake weights", f"weights {version}", "wake up"] for version in range(3))
    assert stub.calls == [*first, "collect 1", *step, *second, "collect 2", *step, *third]


def test_only_what_later_updates_need_is_scored_before_them(tmp_path: Path) -> None:
    stub = Stub()
    trainer(stub, tmp_path).fit()
    assert stub.scored == [[0, 1, 2, 3], [2, 3]]  # all where the pair is checked, then what the second update trains on
    response = [0.0, 0.0, -0.5, -0.5, -0.5]
    assert stub.olds == [None, 2 * response] * 2


def test_a_step_of_one_update_scores_nothing_before_it(tmp_path: Path) -> None:
    stub = Stub()
    made = trainer(stub, tmp_path)
    made.config.algorithm.minibatch_size = N * G
    made.fit()
    assert stub.scored == [[0, 1, 2, 3]]
    assert stub.olds == [None, None]


def test_routes_that_a_pass_records_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    stub = Stub()
    made = trainer(stub, tmp_path)
    made.config.model.replay_routes = True
    made.fit()
    assert stub.scored == [[0, 1, 2, 3]] * 2


def test_a_pair_that_drifts_apart_later_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub()
    made = trainer(stub, tmp_path)
    made.step()
    made.log()
    assert "differ" not in caplog.text
    stub.gap = 0.25
    made.step()
    made.log()
    assert "differ by 0.25 nats a token, above rollout.max_logprob_gap=0.001" in caplog.text
    assert [record["rollout/logprob_gap"] for record in stub.records] == [0.0, 0.25]
    assert stub.records[1]["rollout/logprob_gap_max"] == 0.25


class Windowed(Stub):
    """Of a window: in step s each answer's first `older[s]` tokens are of weights one push older than the newest.

    The newest weights' tokens are `gaps[s]` nats apart from the trainer's.
    """

    def __init__(self, older: dict[int, int], gaps: dict[int, float]) -> None:
        super().__init__()
        self.older, self.gaps = older, gaps

    async def collect(self, step: int) -> Rollout:
        cut, self.gap = self.older.get(step, 0), self.gaps.get(step, 0.0)
        spans = (VersionSpan(step - 2, 0, cut), VersionSpan(step - 1, cut, R))
        return rollout_of(["first", "second"], spans=tuple(s for s in spans if s.start < s.end), version=step - 1)


def test_weights_that_arrive_broken_in_mid_run_are_reported_once_whatever_older_tokens_show(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub = Windowed(older=dict.fromkeys(range(2, 7), 2), gaps={3: 0.25, 4: 0.25, 6: math.nan})
    made = trainer(stub, tmp_path)
    made.config.trainer.max_steps = 6
    made.fit()
    found = pytest.approx([0.0, 0.0, 0.25, 0.25, 0.0, math.nan], nan_ok=True)
    assert [record["rollout/logprob_gap"] for record in stub.records] == found
    assert [record["rollout/logprob_gap_max"] for record in stub.records] == found
    assert [record["train/gap"] for record in stub.records[:3]] == pytest.approx([0, 0.02 / 3, 0.27 / 3])
    said = [record.getMessage() for record in caplog.records if "differ" in record.message]
    assert [line.split(",")[0] for line in said] == [
        "trainer and vLLM differ by 0.25 nats a token",
        "trainer and vLLM differ by nan nats a token",
    ]


def test_a_batch_of_older_tokens_alone_is_trained_on_and_the_next_one_is_judged(tmp_path: Path) -> None:
    stub = Windowed(older={1: R, 2: 2}, gaps={2: 0.25})
    with pytest.raises(RuntimeError, match=r"by 0\.25 nats on average.*max_logprob_gap=0\.001"):
        trainer(stub, tmp_path).fit()
    assert stub.scored == [[2, 3], [0, 1, 2, 3]]
    (first,) = stub.records
    assert "rollout/logprob_gap" not in first
    assert first["train/gap"] == pytest.approx(OLDER_GAP, rel=1e-5)


class Filtered(Stub):
    """All of whose first step's answers were cut off, and are left out."""

    async def collect(self, step: int) -> Rollout:
        return rollout_of(["first", "second"], "length" if step == 1 else "stop", overlong_filter=True)


def test_a_first_batch_without_a_token_is_no_broken_pair(tmp_path: Path) -> None:
    stub = Filtered()
    trainer(stub, tmp_path).fit()
    assert [record["progress/optimizer_steps"] for record in stub.records] == [0, 2]
    assert stub.scored == [[2, 3], [0, 1, 2, 3]]


def test_a_steps_metrics_weigh_every_token_alike(tmp_path: Path) -> None:
    stub = Stub()
    trainer(stub, tmp_path).fit()
    assert stub.records[0]["train/loss"] == pytest.approx(2 / 3)  # (1 + 1) / (1 + 2), not the mean of 1 and 1/2
    assert stub.records[0]["rollout/accuracy"] == 0.5
    assert stub.records[0]["memory/host_gib"] > 0
    assert [record["progress/optimizer_steps"] for record in stub.records] == [2, 4]


@pytest.mark.parametrize("gap", [0.01, math.nan])
def test_a_pair_that_disagrees_in_the_first_step_is_not_trained_on(gap: float, tmp_path: Path) -> None:
    stub = Stub(gap=gap)
    with pytest.raises(RuntimeError, match=r"rollout\.max_logprob_gap=0\.001"):
        trainer(stub, tmp_path).fit()
    assert "update" not in stub.calls


def test_a_refused_update_names_its_prompts_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub = Stub(refuse=(2,))
    trainer(stub, tmp_path).fit()
    assert "update refused in step 1 (1 in a row, optimizer.max_refused_updates=2 end the run): " in caplog.text
    assert "non-finite gradient on ranks [3]" in caplog.text
    assert "prompts ['second']" in caplog.text  # sequence 1 of the second mini-batch
    assert [record["progress/refused_updates"] for record in stub.records] == [1, 1]
    assert [record["progress/optimizer_steps"] for record in stub.records] == [1, 3]


def test_refused_updates_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteGradientError):
        trainer(Stub(refuse=(2, 3)), tmp_path).fit()


def test_refused_updates_with_a_good_one_between_them_do_not(tmp_path: Path) -> None:
    stub = Stub(refuse=(1, 3))
    trainer(stub, tmp_path).fit()
    assert stub.records[-1]["progress/refused_updates"] == 2


# ------------------------------------------------------------------ checkpoints


def saving_trainer(stub: Stub, folder: Path, resumed: int | None = None, **optimizer: Any) -> DAPOTrainer:
    """One that writes a checkpoint after every step."""
    made = trainer(stub, folder)
    made.config.optimizer = OptimizerConfig(**optimizer)
    made.config.checkpoint.every = 1
    made.resumed, made.saves.last = resumed, resumed or 0
    return made


def test_a_steps_record_is_written_before_its_checkpoint(tmp_path: Path) -> None:
    stub = Stub()
    saving_trainer(stub, tmp_path).fit()
    assert stub.recorded_before_save == [(1, 0), (2, 1)]
    assert "time/save" not in stub.records[0]
    assert stub.records[1]["time/save"] > 0  # of the checkpoint of step 1


@pytest.mark.parametrize(("gap", "trains"), [(0.0, True), (0.01, False), (math.nan, False)])
def test_a_resumed_window_is_judged_by_its_newest_tokens(gap: float, trains: bool, tmp_path: Path) -> None:
    saving_trainer(Stub(), tmp_path).fit()
    stub = Windowed(older={3: 2}, gaps={3: gap})
    resumed = saving_trainer(stub, tmp_path, resumed=2)
    resumed.config.trainer.max_steps = 3
    with contextlib.nullcontext() if trains else pytest.raises(RuntimeError, match="max_logprob_gap"):
        resumed.fit()
    assert [record["step"] for record in stub.records] == [3] * trains


def test_a_full_disk_ends_the_run_and_names_the_last_checkpoint(tmp_path: Path) -> None:
    stub = Stub()
    saving_trainer(stub, tmp_path).fit()
    stub.disk_full, stub.stage = True, Stage.train  # as a policy is that was just built
    failing = saving_trainer(stub, tmp_path, resumed=2)
    failing.config.trainer.max_steps = 3
    with pytest.raises(CheckpointError, match=r"step_000003 was not written.*No space left.*is that of step 2"):
        failing.fit()


def test_a_full_disk_may_cost_no_more_than_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub()
    stub.disk_full = True
    going_on = saving_trainer(stub, tmp_path)
    going_on.config.checkpoint.on_failed_save = OnFailedSave.go_on
    going_on.fit()
    assert [record["step"] for record in stub.records] == [1, 2]
    assert "step_000001 was not written" in caplog.text
    assert "no checkpoint yet; the run goes on" in caplog.text


def test_a_run_asked_to_stop_saves_and_ends_after_its_step(tmp_path: Path) -> None:
    stub = Stub()
    stopped = saving_trainer(stub, tmp_path)
    stopped.config.checkpoint.every = 0
    sync = stopped.sync_weights

    def sync_and_ask() -> None:
        sync()
        if stopped.progress.rollout_steps == 1:
            stopped.stop.set()

    stopped.sync_weights = sync_and_ask  # type: ignore[method-assign]
    stopped.fit()
    assert [record["step"] for record in stub.records] == [1]
    assert checkpoint.latest(tmp_path / "checkpoints") == 1


class Held(Stub):
    """Whose checkpoints, taken apart, are not written before the training waits for one; `each_step` is done at its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each_step: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.each_step = each_step
        self.may_write.clear()
        awaited = checkpoint.Writing._awaited

        def released(writing: checkpoint.Writing, timeout: float | None) -> Any:
            self.may_write.set()
            return awaited(writing, timeout)

        monkeypatch.setattr(checkpoint.Writing, "_awaited", released)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        super().record(step, metrics)
        self.each_step(step)

    def take(self, path: Path, *, portable: bool, apart: bool) -> TakenStub:
        self.calls.append("save")
        return super().take(path, portable=portable, apart=apart)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": len(self.records)}


def asynchronous_trainer(stub: Stub, folder: Path, steps: int, every: int) -> DAPOTrainer:
    made = trainer(stub, folder)
    made.config.trainer.max_steps, made.config.checkpoint.every = steps, every
    made.config.checkpoint.asynchronous, made.config.checkpoint.keep = True, 0
    return made


def test_a_checkpoint_behind_the_training_is_of_its_step_and_counts_once_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, seen = tmp_path / "checkpoints", {}

    def look(step: int) -> None:
        seen[step] = sorted(p.name for p in folder.glob("*step_*"))
        if step == 5:  # nothing holds that of step 4: it is written before the run waits for it
            assert made.saves.writing is not None
            made.saves.writing.share.result(60)

    stub = Held(monkeypatch, look)
    made = asynchronous_trainer(stub, tmp_path, steps=5, every=2)
    made.fit()
    first = "step_000002"
    assert seen == {
        1: [],
        2: [],
        3: [f".{first}.writing"],
        4: [f".{first}.writing"],
        5: [".step_000004.writing", first],
    }
    assert stub.taken == [(f".{first}.writing", True), (".step_000004.writing", True), (".step_000005.writing", False)]
    assert made.saves.last == 5
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waited ")]
    assert [line.split(" s ")[1] for line in said] == ["until the checkpoint of step 2 was written"]
    for step in (2, 4, 5):
        assert checkpoint.verify(folder / f"step_{step:06d}", None) == []
        assert (folder / f"step_{step:06d}" / "policy" / "weights").read_text() == str(2 * step)
        state = checkpoint.read_state(folder, step)
        assert (state["drawn"], state["progress"]["optimizer_steps"]) == (step, 2 * step)


@pytest.mark.parametrize("action", OnFailedSave)
def test_what_fails_behind_the_training_is_said_at_the_end_of_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, action: OnFailedSave
) -> None:
    def fail_in_step_3(step: int) -> None:
        stub.disk_full = step <= 3
        if step == 3:
            assert made.saves.writing is not None
            stub.may_write.set()
            assert made.saves.writing.share.exception(60) is not None

    stub = Held(monkeypatch, fail_in_step_3)
    made = asynchronous_trainer(stub, tmp_path, steps=6, every=2)
    made.config.checkpoint.on_failed_save = action
    if action is OnFailedSave.stop:
        with pytest.raises(CheckpointError, match=r"step_000002 was not written.*No space left.*no checkpoint yet"):
            made.fit()
        assert [record["step"] for record in stub.records] == [1, 2, 3]
    else:
        made.fit()
        assert "step_000002 was not written" in caplog.text
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


def test_a_stop_waits_for_the_checkpoint_that_is_being_written_and_saves_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Held(monkeypatch, lambda step: made.stop.set() if step == 2 else None)
    made = asynchronous_trainer(stub, tmp_path, steps=5, every=2)
    made.fit()
    assert [record["step"] for record in stub.records] == [1, 2]
    assert stub.calls.count("save") == 1
    assert checkpoint.choose(tmp_path / "checkpoints", None) == made.saves.last == 2


def test_a_stop_later_saves_the_step_that_it_ends_after_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Held(monkeypatch, lambda step: made.stop.set() if step == 3 else None)
    made = asynchronous_trainer(stub, tmp_path, steps=5, every=2)
    made.fit()
    assert stub.taken == [(".step_000002.writing", True), (".step_000003.writing", False)]
    assert checkpoint.choose(tmp_path / "checkpoints", None) == made.saves.last == 3


def test_changed_optimizer_options_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving_trainer(Stub(), tmp_path).fit()
    capsys.readouterr()
    resumed = saving_trainer(Stub(), tmp_path, resumed=2, lr=5e-7, decay_style=DecayStyle.cosine, decay_steps=500)
    resumed.resume()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other options")]
    assert said == [
        "other options than the checkpoint's, used from here on: optimizer.lr 1e-06 -> 5e-07, optimizer.decay_steps 0 -> "
        "500, optimizer.decay_style constant -> cosine"
    ]
    saving_trainer(Stub(), tmp_path, resumed=2).resume()
    assert "other options" not in capsys.readouterr().out


def change_architecture(config: RunConfig) -> None:
    (Path(config.model.path) / "config.json").write_text('{"hidden_size": 8}')


def change_tokenizer(config: RunConfig) -> None:
    (Path(config.model.path) / "tokenizer.json").write_text('{"a": 1}')


def change_weights(config: RunConfig) -> None:
    save_file({"weight": torch.ones(4)}, Path(config.model.path) / "model.safetensors")


def change_precision(config: RunConfig) -> None:
    config.model.precision = Precision.fp32


def give_adapters(config: RunConfig) -> None:
    config.model.lora.rank = 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_architecture, "hidden_size 4 -> 8"),
        (change_tokenizer, r"tokenizer\.json differs"),
        (change_weights, "weights differ"),
        (change_precision, r"model\.precision bf16 -> fp32"),
        (give_adapters, r"model\.lora\.rank 0 -> 8"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_loaded(
    tmp_path: Path, change: Any, said: str
) -> None:
    saving_trainer(Stub(), tmp_path).fit()
    stub = Stub()
    resumed = saving_trainer(stub, tmp_path, resumed=2)
    change(resumed.config)
    with pytest.raises(ValueError, match=said):
        resumed.resume()
    assert stub.calls == []


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_reads_the_window(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving_trainer(Stub(), tmp_path).fit()
    window_file.write(tmp_path / "checkpoints" / "step_000002" / window_file.NAME, [])
    read: list[Path] = []
    monkeypatch.setattr(window_file, "read", read.append)
    stub = Stub()
    resumed = saving_trainer(stub, tmp_path, resumed=2)
    if rank:
        resumed.controller = None
        monkeypatch.setattr(trainer_module, "lead", lambda work, group: None)  # which rank 0 alone does
    resumed.resume()
    assert len(read) == (rank == 0)
    assert stub.calls[-1] == "load step_000002"
    assert resumed.progress.rollout_steps == 2


def test_a_moved_model_folder_is_the_same_model(tmp_path: Path) -> None:
    saving_trainer(Stub(), tmp_path).fit()
    stub = Stub()
    resumed = saving_trainer(stub, tmp_path, resumed=2)
    resumed.config.model.path = str((tmp_path / "model").rename(tmp_path / "elsewhere"))
    resumed.resume()
    assert stub.calls == ["load controller", "load step_000002"]
    assert resumed.progress.rollout_steps == 2


def test_a_checkpoint_of_weights_alone_is_where_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving_trainer(Stub(), tmp_path).fit()
    place = tmp_path / "checkpoints" / "step_000002" / "state.json"
    saved = json.loads(place.read_text())
    place.write_text(json.dumps({key: saved[key] for key in ("step", "model", "precision")} | {"weights_alone": True}))
    stub = Stub()
    begun = saving_trainer(stub, tmp_path, resumed=2)
    begun.resume()
    assert stub.calls == ["load step_000002"]
    assert begun.progress.rollout_steps == 0
    assert "all else is at its beginning" in capsys.readouterr().out
    change_precision(begun.config)
    with pytest.raises(ValueError, match=r"model\.precision bf16 -> fp32"):
        begun.resume()
