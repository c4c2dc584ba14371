"""A directory called `step_*` is a complete checkpoint, whenever the job was killed; a stub stands for the policy."""

from __future__ import annotations

import copy
import datetime
import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_dapo import checkpoint, digests, window_file
from nemo_dapo.types import OpenGroup, Prompt, Sample, VersionSpan


class StubPolicy:
    """Writes its one number; dies, or finds the disk full, in the middle of it when told to. What is taken is another one
    of these, or itself where it need not be apart."""

    def __init__(self, number: int = 0, dies: bool = False, fails: bool = False) -> None:
        self.number, self.dies, self.fails = number, dies, fails
        self.may_write = threading.Event()
        self.may_write.set()

    def take(self, path: Path, *, portable: bool, apart: bool) -> StubPolicy:
        assert not list(path.iterdir()), "Megatron writes into an empty directory"
        taken = copy.copy(self) if apart else self
        taken.path = path
        return taken

    path: Path

    def write(self) -> list[Path]:
        self.may_write.wait(60)
        (self.path / "half").write_text(f"half of {self.number}")
        if self.dies:
            raise KeyboardInterrupt("killed")
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "number"))
        (self.path / "number").write_text(f"{self.number} {'.' * 1000}")
        return [self.path / "half", self.path / "number"]

    def finish(self) -> list[Path]:
        return []

    def load(self, path: Path) -> None:
        self.number = int((path / "number").read_text().split()[0])


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
    checkpoint.save(folder, step, StubPolicy(number, dies), {"answer": number}, keep=keep, group=None)


def load(folder: Path, step: int) -> tuple[int, dict[str, object]]:
    policy = StubPolicy()
    checkpoint.load(folder, step, policy)  # type: ignore[arg-type]
    return policy.number, checkpoint.read_state(folder, step)


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

    def killed_half_way(path: Path, **options: Any) -> None:
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


STEPS_OF_A_SAVE = ("os.replace", "os.fsync", "shutil.rmtree")


def killed_before(call: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> bool:
    """Do `work`, killed right before the `call`-th of the calls that change the disk; False when it has fewer."""
    left = iter(range(call))

    def or_killed(original: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **options: object) -> object:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*args, **options)

        return run

    with monkeypatch.context() as patched:
        for name in STEPS_OF_A_SAVE:
            module, _, function = name.partition(".")
            patched.setattr(name, or_killed(getattr({"os": os, "shutil": shutil}[module], function)))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


def test_killed_before_any_change_of_the_disk_the_run_goes_on_from_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `keep=1`, where the one before is removed: at each instant the old one or the new one is there, and whole."""
    chosen = []
    for call in itertools.count():
        folder = tmp_path / str(call)
        save(folder, 2, number=2, keep=1)
        killed = killed_before(call, monkeypatch, lambda at=folder: save(at, 4, number=4, keep=1))  # type: ignore[misc]
        step = checkpoint.choose(folder, None)
        assert step in (2, 4)
        assert load(folder, step)[0] == step
        chosen.append(step)
        save(folder, 6, number=6, keep=1)
        assert names(folder) == ["step_000006"]
        if not killed:
            break
    assert chosen == sorted(chosen)
    assert len(chosen) > 8
    assert {2, 4} == set(chosen)


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


# ------------------------------------------------------------------ damage


def two_checkpoints(folder: Path) -> Path:
    """Steps 4 and 8, with number 4 and 8; the place of the newest."""
    save(folder, 4, number=4)
    save(folder, 8, number=8)
    return folder / "step_000008"


FILES = ["policy/number", "policy/half", "state.json", "manifest.json"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def replace_by_the_one_before(file: Path) -> None:
    shutil.copyfile(Path(str(file).replace("step_000008", "step_000004")), file)


DAMAGES: list[Callable[[Path], None]] = [truncate, empty, Path.unlink, flip_a_bit, replace_by_the_one_before]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_in_one_line_and_the_checkpoint_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None]
) -> None:
    damage(two_checkpoints(tmp_path) / name)
    assert checkpoint.choose(tmp_path, None) == 4
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    named = "state.json" if name == "manifest.json" and damage is replace_by_the_one_before else name
    for part in ("step_000008 is damaged", named, "going on from step_000004", "step_000008.damaged"):
        assert part in said[0]
    assert load(tmp_path, 4)[0] == 4
    assert checkpoint.choose(tmp_path, None) == 4  # and silently from now on
    assert capsys.readouterr().out == ""


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    place = two_checkpoints(tmp_path)
    chance = random.Random(0)
    bits = [(name, bit) for name in FILES for bit in range(8 * (place / name).stat().st_size)]
    for name, bit in chance.sample(bits, 300):
        whole = (place / name).read_bytes()
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        (place / name).write_bytes(flipped)
        assert checkpoint.verify(place, None), f"bit {bit} of {name}"
        (place / name).write_bytes(whole)
    assert checkpoint.verify(place, None) == []


def test_where_none_is_whole_each_is_named_and_none_is_touched(tmp_path: Path) -> None:
    flip_a_bit(two_checkpoints(tmp_path) / "policy" / "number")
    (tmp_path / "step_000004" / "state.json").unlink()
    with pytest.raises(RuntimeError, match=r"step_000008: policy/number.*step_000004: state\.json.*resume=never"):
        checkpoint.choose(tmp_path, None)
    assert names(tmp_path) == ["step_000004", "step_000008"]


def test_damaged_ones_are_not_counted_by_keep(tmp_path: Path) -> None:
    flip_a_bit(two_checkpoints(tmp_path) / "policy" / "number")
    assert checkpoint.choose(tmp_path, None) == 4
    save(tmp_path, 6)
    assert names(tmp_path) == ["step_000004", "step_000006", "step_000008.damaged"]


def test_a_file_that_is_no_part_of_it_is_named_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two_checkpoints(tmp_path) / "policy" / "notes.txt").write_text("mine")
    assert checkpoint.choose(tmp_path, None) == 8
    assert "policy/notes.txt is no part of the checkpoint" in capsys.readouterr().out


def test_an_empty_directory_of_that_name_is_no_checkpoint(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    (tmp_path / "step_000013").mkdir()
    assert checkpoint.choose(tmp_path, None) == 8


def test_a_whole_checkpoint_under_another_name_is_not_taken_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_checkpoints(tmp_path).rename(tmp_path / "step_000012")
    assert checkpoint.choose(tmp_path, None) == 4
    assert "state.json is of step 8" in capsys.readouterr().out


def test_a_checkpoint_of_another_format_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    with pytest.raises(ValueError, match=r"format 2, expected 99.*checkpoint\.resume=never"):
        checkpoint.choose(tmp_path, None)


def test_files_are_spread_over_ranks_by_their_bytes() -> None:
    sizes = {"a": 60, "b": 50, "c": 40, "d": 30, "e": 0}
    dealt = digests.shares({name: digests.FileDigest(size, "") for name, size in sizes.items()}, 2)
    assert [set(one) for one in dealt] == [{"a", "d"}, {"b", "c", "e"}] or [set(one) for one in dealt] == [
        {"a", "d", "e"},
        {"b", "c"},
    ]


# ------------------------------------------------------------------ failures while writing


def test_a_full_disk_is_named_and_leaves_nothing_but_the_last_one(tmp_path: Path) -> None:
    save(tmp_path, 4, number=4)
    with pytest.raises(checkpoint.CheckpointError, match=r"step_000008 was not written.*No space left.*number"):
        checkpoint.save(tmp_path, 8, StubPolicy(fails=True), {}, keep=1, group=None)
    assert names(tmp_path) == ["step_000004"]
    assert checkpoint.choose(tmp_path, None) == 4


def test_an_old_one_that_cannot_be_removed_does_not_cost_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 4)
    replace = os.replace

    def refused(source: Path, target: Path) -> None:
        if str(target).endswith(".removing"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr("os.replace", refused)
    save(tmp_path, 8, keep=1)
    assert checkpoint.choose(tmp_path, None) == 8
    assert "could not be removed: [Errno 13] Permission denied" in caplog.text


# ------------------------------------------------------------------ behind the training


def behind(folder: Path, step: int, policy: StubPolicy, state: dict[str, object]) -> checkpoint.Writing:
    return checkpoint.save_behind(folder, step, policy, state, group=None, portable=True)


def held_policy(number: int, *, fails: bool = False) -> StubPolicy:
    """One whose writing waits for `may_write`."""
    policy = StubPolicy(number, fails=fails)
    policy.may_write.clear()
    return policy


def test_what_is_saved_behind_the_training_is_all_of_its_own_step(tmp_path: Path) -> None:
    policy, state = held_policy(4), {"answer": 4, "sampler": {"drawn": [1, 2]}}
    writing = behind(tmp_path, 4, policy, state)
    policy.number = 5
    state["answer"] = 5
    state["sampler"]["drawn"].append(3)  # type: ignore[index]
    assert not writing.is_over()
    policy.may_write.set()
    assert writing.finish(keep=2) == tmp_path / "step_000004"
    number, read = load(tmp_path, 4)
    assert (number, read["answer"], read["sampler"]) == (4, 4, {"drawn": [1, 2]})
    assert checkpoint.verify(tmp_path / "step_000004", None) == []


def test_it_counts_and_costs_an_old_one_only_when_it_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 2, number=2)
    policy = held_policy(4)
    writing = behind(tmp_path, 4, policy, {})
    policy.may_write.set()
    writing.share.result(60)  # written, but not finished
    assert names(tmp_path) == [".step_000004.writing", "step_000002"]
    assert checkpoint.choose(tmp_path, None) == 2
    writing.finish(keep=1)
    assert names(tmp_path) == ["step_000004"]


@pytest.mark.parametrize("has_written", [False, True])
def test_a_kill_while_it_is_written_leaves_the_one_before_and_what_the_next_one_cleans(
    tmp_path: Path, has_written: bool
) -> None:
    save(tmp_path, 2, number=2)
    policy = held_policy(4)
    writing = behind(tmp_path, 4, policy, {})
    if has_written:
        policy.may_write.set()
        writing.share.result(60)
    assert checkpoint.choose(tmp_path, None) == 2  # as the next start does
    save(tmp_path, 6, number=6, keep=1)
    assert names(tmp_path) == ["step_000006"]
    policy.may_write.set()  # its thread ends


def of_tokens(*token_ids: int) -> OpenGroup:
    sample = Sample(token_ids, [-0.5] * len(token_ids), "abort", (VersionSpan(1, 0, len(token_ids)),))
    return OpenGroup(token_ids[0], Prompt("u", (3,), "1+1", "2"), None, (sample,))


def on_the_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files and folders that are waited for, or renamed, from now on."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        sync(descriptor)
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def replaced(old: Path, new: Path) -> None:
        replace(old, new)
        done.append(f"to {Path(new).name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return done


def test_the_window_is_written_behind_the_training_and_is_on_the_disk_before_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    writers, may_write, write, done = [], threading.Event(), window_file.write, on_the_disk(monkeypatch)

    def held(path: Path, window: Sequence[OpenGroup]) -> None:
        writers.append(threading.current_thread().name)
        may_write.wait(20)
        write(path, window)

    monkeypatch.setattr(window_file, "write", held)
    window = [of_tokens(5, 6, 7), of_tokens(8)]
    writing = behind(tmp_path, 4, StubPolicy(4), {"window": window, "answer": 4})
    taken = list(window)
    window.clear()  # the training goes on
    assert not writing.is_over()
    assert checkpoint.choose(tmp_path, None) == 2
    may_write.set()
    writing.finish(keep=2)
    assert writers == ["checkpoint"]
    assert checkpoint.read_state(tmp_path, 4) == {"step": 4, "answer": 4, "window": taken}
    assert checkpoint.verify(tmp_path / "step_000004", None) == []
    counts = done.index("to step_000004")
    assert {window_file.NAME, "state.json", "number", digests.NAME} <= set(done[:counts])


def test_a_window_that_finds_no_room_costs_the_new_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, window: Sequence[OpenGroup]) -> None:
        raise OSError(28, "No space left on device", str(path))

    save(tmp_path, 2)
    monkeypatch.setattr(window_file, "write", full)
    writing = behind(tmp_path, 4, StubPolicy(4), {"window": [of_tokens(5)]})
    with pytest.raises(checkpoint.CheckpointError, match=r"step_000004 was not written.*window.safetensors"):
        writing.finish(keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_what_fails_behind_the_training_is_said_when_it_is_finished(tmp_path: Path) -> None:
    save(tmp_path, 2)
    writing = behind(tmp_path, 4, StubPolicy(fails=True), {})
    with pytest.raises(OSError, match="No space left"):
        writing.share.result(60)
    assert writing.is_over()
    with pytest.raises(checkpoint.CheckpointError, match=r"step_000004 was not written.*rank 0.*No space left"):
        writing.finish(keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_it_is_not_waited_for_without_end(tmp_path: Path) -> None:
    policy = held_policy(4)
    writing = behind(tmp_path, 4, policy, {})
    with pytest.raises(checkpoint.CheckpointError, match=r"its share was not written within 0 s"):
        writing.finish(keep=1, timeout=0.01)
    policy.may_write.set()


# ------------------------------------------------------------------ two ranks


class RankPolicy(StubPolicy):
    """One of two ranks; each writes a file of its own."""

    def write(self) -> list[Path]:
        self.may_write.wait(60)
        if self.fails:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self.path))
        file = self.path / f"rank_{dist.get_rank()}"
        file.write_text(str(self.number) * 1000)
        return [file]


def outcome(work: Callable[[], object]) -> str:
    try:
        work()
        return "written"
    except checkpoint.CheckpointError as error:
        return str(error)


def two_ranks(rank: int, folder: Path, results: Path) -> None:
    """Failed saves of rank 1 and good ones, before and behind the training; damage; all seen from either rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{results}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    lines = []
    for step, fails in ((2, True), (4, False)):
        policy, state = RankPolicy(step, fails=fails and rank == 1), {"of": rank} if rank == 0 else None
        lines.append(outcome(lambda p=policy, s=state, n=step: checkpoint.save(folder, n, p, s, keep=0, group=None)))  # type: ignore[misc]
    for step, fails in ((10, True), (8, False)):  # behind the training; rank 1 is late
        policy = RankPolicy(step, fails=fails and rank == 1)
        if rank == 1:
            policy.may_write.clear()
        writing = behind(folder, step, policy, {})
        if rank == 0:
            writing.share.result(60)
        lines.append(f"over: {writing.is_over()}")
        policy.may_write.set()
        lines.append(outcome(lambda one=writing: one.finish(keep=0)))  # type: ignore[misc]
    if rank == 0:
        flip_a_bit(folder / "step_000008" / "policy" / "rank_1")
    dist.barrier()
    lines.append(str(checkpoint.choose(folder, None)))
    (results / f"rank_{rank}").write_text("\n".join(lines))
    dist.destroy_process_group()


def test_two_ranks_decide_alike(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    mp.spawn(two_ranks, (folder, tmp_path), nprocs=2)
    first, second = ((tmp_path / f"rank_{rank}").read_text().splitlines() for rank in range(2))
    assert first == second
    assert "rank 1: OSError: [Errno 27] File too large" in first[0]
    assert first[1:3] == ["written", "over: False"]
    assert "step_000010 was not written: rank 1: OSError: [Errno 27] File too large" in first[3]
    assert first[4:] == ["over: False", "written", "4"]
    assert sorted(digests.parse((folder / "step_000004" / "manifest.json").read_text())[1]) == [
        "policy/rank_0",
        "policy/rank_1",
        "state.json",
    ]
