"""A directory called `step_*` is a complete checkpoint, whenever the job was killed; a stub stands for the policy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_dapo import checkpoint


class StubPolicy:
    """Writes its one number; dies in the middle of `save` when told to."""

    def __init__(self, number: int = 0, dies: bool = False) -> None:
        self.number, self.dies = number, dies

    def save(self, path: Path) -> None:
        assert not list(path.iterdir()), "Megatron writes into an empty directory"
        (path / "half").write_text("")
        if self.dies:
            raise KeyboardInterrupt("killed")
        (path / "number").write_text(str(self.number))

    def load(self, path: Path) -> None:
        self.number = int((path / "number").read_text())


@pytest.fixture(autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: checkpoints are collective."""
    if dist.is_initialized():  # another test's
        yield
        return
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, step: int, number: int = 0, *, keep: int = 2, dies: bool = False) -> None:
    checkpoint.save(folder, step, StubPolicy(number, dies), {"answer": number}, keep=keep, group=None)  # type: ignore[arg-type]


def load(folder: Path, step: int) -> tuple[int, dict[str, object]]:
    policy = StubPolicy()
    state = checkpoint.load(folder, step, policy)  # type: ignore[arg-type]
    return policy.number, state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_no_directory_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 3, number=17)
    assert checkpoint.latest(tmp_path) == 3
    number, state = load(tmp_path, 3)
    assert number == 17
    assert (state["step"], state["answer"]) == (3, 17)


def test_a_kill_while_writing_leaves_the_last_complete_one(tmp_path: Path) -> None:
    save(tmp_path, 2, number=5)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4, dies=True)
    assert names(tmp_path) == [".step_000004.writing", "step_000002"]
    assert checkpoint.latest(tmp_path) == 2
    assert load(tmp_path, 2)[0] == 5


@pytest.mark.parametrize("next_step", [4, 5])
def test_what_a_kill_left_half_written_is_cleaned_by_the_next_checkpoint(tmp_path: Path, next_step: int) -> None:
    """Also that of another step: a run that resumes with another `checkpoint.every` never writes the same one again."""
    save(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4, dies=True)
    save(tmp_path, next_step, number=9)
    assert names(tmp_path) == ["step_000002", f"step_{next_step:06d}"]
    assert load(tmp_path, next_step)[0] == 9


@pytest.mark.parametrize("moment", ["the state is written", "the directory is renamed"])
def test_a_kill_after_the_policy_was_written_leaves_no_complete_looking_directory(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    if moment == "the state is written":
        monkeypatch.setattr(checkpoint, "_write_durably", killed)
    else:
        monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    assert checkpoint.latest(tmp_path) is None


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2, keep=1)

    remove = shutil.rmtree

    def killed_half_way(path: Path, **options: bool) -> None:
        if not (path / "state.json").exists():
            remove(path, **options)
            return
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4, keep=1)
    assert [name for name in names(tmp_path) if name.startswith("step_")] == ["step_000004"]
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step_000006"]


def test_checkpoints_of_an_earlier_run_are_set_aside_not_counted_or_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for number, step in ((1, 100), (2, 90)):
        save(folder, step, number)
        assert checkpoint.set_aside(folder) == tmp_path / f"checkpoints.previous{number}"
        assert load(tmp_path / f"checkpoints.previous{number}", step)[0] == number
    save(folder, 10, keep=1)
    assert checkpoint.latest(folder) == 10
    assert checkpoint.set_aside(tmp_path / "nowhere") is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 2, number=1)
    save(tmp_path, 2, number=2)
    assert load(tmp_path, 2)[0] == 2


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=keep)
    assert names(tmp_path) == [f"step_{step:06d}" for step in (2, 4, 10, 12)[-keep:]]


def test_steps_are_ordered_as_numbers_even_past_their_padding(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert checkpoint.latest(tmp_path) == 1_000_000


def test_other_names_are_neither_taken_for_checkpoints_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "step_best").mkdir()
    (tmp_path / "notes.txt").write_text("")
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["notes.txt", "step_000002", "step_best"]


def test_a_checkpoint_of_another_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path, 3)
    file = tmp_path / "step_000003" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match=r"format 99, expected 1.*checkpoint\.resume=never"):
        load(tmp_path, 3)
