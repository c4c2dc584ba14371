"""A checkpoint is one directory: the policy's shards, `state.json` with everything else a run needs to go on, a manifest;
and, where groups are sampled ahead, those of the window as arrays (`window_file`).

It is written beside its place and renamed into it, so a directory called `step_*` was complete when it was named, whenever
the job was killed. Whether it still is, the manifest's digests tell: they are checked before anything is read. Ranks write,
hash and check their shares, and act as one: on what one of them finds, all of them decide alike.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from nemo_dapo import digests, hf_folder, window_file
from nemo_dapo.collectives import gather_json
from nemo_dapo.coordination import found_alike
from nemo_dapo.digests import FileDigest
from nemo_dapo.files import set_aside as number_aside
from nemo_dapo.interfaces import Policy, TakenPolicy
from nemo_dapo.types import OpenGroup

log = logging.getLogger(__name__)

FORMAT = 2
REMEDY = "restore one from a copy, or start anew with checkpoint.resume=never"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""


class Savable(Protocol):
    """The part of a policy that a checkpoint is made by; see `Policy.take`."""

    def take(self, path: Path, *, portable: bool, apart: bool) -> TakenPolicy: ...


def latest(directory: Path) -> int | None:
    """Rollout step of the newest checkpoint under `directory` by its name; None when there is none. See `choose`."""
    steps = _steps(directory)
    return steps[-1] if steps else None


# ---------------------------------------------------------------- writing


def save(
    directory: Path,
    step: int,
    policy: Savable,
    state: Mapping[str, Any] | None,
    *,
    keep: int,
    group: Any,
    portable: bool = True,
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep` (0: none). Collective; `state` is rank 0's.

    `state` is JSON, but for its `window`, a list of OpenGroup. `portable` as for `Policy.take`.

    Raises CheckpointError, on every rank, where one of them could not write; what was written of it is then removed.
    """
    writing = Writing(directory, step, group)
    writing.take(policy, state, portable=portable, apart=False)
    writing.write()
    return writing.finish(keep)


def save_behind(
    directory: Path, step: int, policy: Savable, state: Mapping[str, Any] | None, *, group: Any, portable: bool
) -> Writing:
    """As `save`, written by a thread while the policy trains on; complete, and counted, once `finish` was called.

    All of it is that of this moment. There is no other one under way in `directory`.
    """
    writing = Writing(directory, step, group)
    writing.take(policy, state, portable=portable, apart=True)
    threading.Thread(target=writing.write, name="checkpoint", daemon=True).start()
    return writing


class Writing:
    """A checkpoint on its way to the disk. Every method but `write` is collective.

    Until `finish` renames it, it is a folder with a leading dot: a run that is killed goes on from the one before, and the
    next checkpoint removes what was written.
    """

    def __init__(self, directory: Path, step: int, group: Any) -> None:
        self.directory, self.step, self.group = directory, step, group
        self.place, self.beside = directory / _name(step), directory / f".{_name(step)}.writing"
        self.leads = dist.get_rank() == 0
        self.own: list[Path] = []  # files beside the policy's
        self.window: Sequence[OpenGroup] = ()  # to be written to another
        self.share: Future[dict[str, Any]] = Future()  # digests of the files that this rank wrote, by name

    def take(self, policy: Savable, state: Mapping[str, Any] | None, *, portable: bool, apart: bool) -> None:
        """What is to be written; of the policy as in `Policy.take`, of the `state` all but the window at once."""

        def begin() -> None:
            if self.leads:
                _make_empty(self.directory, self.beside)
                own = {"step": self.step} | dict(state or {})
                self.window = tuple(own.pop("window", ()))  # its groups stay as they are, and are gigabytes
                self.own = [_write_state(self.beside, own)]

        def take() -> None:
            self.taken = policy.take(self.beside / "policy", portable=portable, apart=apart)

        with self._removed_where_it_fails():
            _on_every_rank(begin, self.group)
            _on_every_rank(take, self.group)

    def write(self) -> None:
        """This rank's share; what fails is raised by `finish`."""
        try:
            self.share.set_result(self._digests(self.own + self._write_window() + self.taken.write()))
        except Exception as error:
            self.share.set_exception(error)

    def _write_window(self) -> list[Path]:
        window, self.window = self.window, ()  # they are not needed for longer
        if not window:
            return []
        window_file.write(self.beside / window_file.NAME, window)
        return [self.beside / window_file.NAME]

    def is_over(self) -> bool:
        """Whether every rank has written its share, or one has failed to: `finish` waits for hardly anything."""
        is_done = self.share.done()
        has_failed = is_done and self.share.exception() is not None
        everyone = gather_json([is_done, has_failed], self.group)
        return all(done for done, _ in everyone) or any(failed for _, failed in everyone)

    def finish(self, keep: int, timeout: float | None = None) -> Path:
        """Complete it and remove all but the newest `keep`; waits `timeout` seconds for this rank's share.

        Raises CheckpointError, on every rank, where one of them could not write; what was written is then removed.
        """
        with self._removed_where_it_fails():
            parts = _on_every_rank(lambda: self._awaited(timeout), self.group)
            parts += _on_every_rank(lambda: self._digests(self.taken.finish()), self.group)
            files = {name: FileDigest(**one) for part in parts for name, one in part.items()}
            _on_every_rank(lambda: _complete(self.beside, self.place, files) if self.leads else None, self.group)
        if self.leads:
            _remove_old(self.directory, keep)
        dist.barrier(group=self.group)
        return self.place

    def _awaited(self, timeout: float | None) -> dict[str, Any]:
        try:
            return self.share.result(timeout)
        except TimeoutError as error:
            raise CheckpointError(f"its share was not written within {timeout:.0f} s") from error

    def _digests(self, files: Sequence[Path]) -> dict[str, Any]:
        for file in files:
            _sync(file)
        return {str(file.relative_to(self.beside)): asdict(digests.digest(file)) for file in files}

    @contextmanager
    def _removed_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if self.leads:
                shutil.rmtree(self.beside, ignore_errors=True)  # its space is needed
            raise CheckpointError(f"checkpoint {self.place} was not written: {error}") from error


def _on_every_rank(work: Callable[[], Any], group: Any) -> list[Any]:
    """What `work` returned on each rank. Raises CheckpointError on all of them when it failed on one."""
    value, problem = None, ""
    try:
        value = work()
    except Exception as error:  # told to the others, who would wait for this rank
        problem = f"{type(error).__name__}: {error}"
        log.debug("while writing a checkpoint", exc_info=True)
    everyone = gather_json([value, problem], group)
    failed = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(everyone) if problem]
    if failed:
        raise CheckpointError(digests.said(failed, most=1))
    return [value for value, _ in everyone]


def _make_empty(directory: Path, beside: Path) -> None:
    _clean(directory)
    (beside / "policy").mkdir(parents=True)


def _write_state(beside: Path, state: Mapping[str, Any]) -> Path:
    """What a run needs beside policy and window; returns the file. It is on the disk later, but `state` may change now."""
    (beside / "state.json").write_text(json.dumps(state))
    return beside / "state.json"


def _complete(beside: Path, place: Path, files: Mapping[str, FileDigest]) -> None:
    _write_durably(beside / digests.NAME, digests.render(FORMAT, files))
    _sync(beside / "policy")
    _sync(beside)
    if place.exists():
        os.replace(place, place.with_name(f".{place.name}.removing"))
    os.replace(beside, place)
    _sync(place.parent)


def _remove_old(directory: Path, keep: int) -> None:
    """All but the newest `keep`; where that fails, the new one is complete all the same."""
    try:
        for old in _steps(directory)[:-keep]:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
            os.replace(directory / _name(old), directory / f".{_name(old)}.removing")
        _clean(directory)
    except OSError as error:
        log.warning("an old checkpoint could not be removed: %s", error)


def set_aside(directory: Path) -> Path | None:
    """Move the checkpoints of an earlier run away, and say where to: `keep` would count them among the newest ones."""
    if latest(directory) is None:
        return None
    return directory.with_name(f"{directory.name}.previous{number_aside(directory)}")


# ---------------------------------------------------------------- reading


def choose(directory: Path, group: Any) -> int | None:
    """Rollout step of the newest whole checkpoint under `directory`, the same on every rank; None when there is none.

    Every file is read and compared with the manifest, its bytes spread over the ranks. A damaged one is named, with what is
    wrong, and becomes `step_*.damaged`; the one before it is taken. Raises RuntimeError where there are some and none is
    whole, ValueError for the format of another version. Collective.
    """
    steps = gather_json(_steps(directory) if dist.get_rank() == 0 else [], group)[0]  # one rank looks: file systems lag
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        problems = verify(directory / _name(step), group)
        if not problems:
            if dist.get_rank() == 0:
                _put_away(directory, damaged, step)
            dist.barrier(group=group)
            return step
        damaged[step] = digests.said(problems)
    if not damaged:
        return None
    found = "; ".join(f"{_name(step)}: {problem}" for step, problem in damaged.items())
    raise found_alike(RuntimeError(f"no checkpoint under {directory} is whole ({found}): {REMEDY}"))


def verify(place: Path, group: Any) -> list[str]:
    """What is wrong with the checkpoint `place`, one phrase a file, the same on every rank; empty when it is whole.

    Raises ValueError for the format of another version. Collective: each rank reads its share of the files.
    """
    files, problem = _manifest(place)
    mine = (
        [problem] if problem else digests.damage(place, digests.shares(files, dist.get_world_size())[dist.get_rank()])
    )
    found = sorted({problem for one in gather_json(mine, group) for problem in one})
    if not found and dist.get_rank() == 0:
        found = _wrong_step(place)
        for name in digests.unlisted(place, files):
            print(f"{place / name} is no part of the checkpoint and is ignored", flush=True)
    return list(gather_json(found, group)[0]) or found


def require_whole(place: Path, model: Path, group: Any) -> None:
    """Raises ValueError that says what is wrong with the checkpoint `place`, or how it is not one of the folder `model`."""
    if problems := verify(place, group):
        raise ValueError(f"checkpoint {place} is damaged ({digests.said(problems)}); restore it from a copy")
    state = json.loads((place / "state.json").read_text())
    if differing := hf_folder.differences(state["model"], hf_folder.fingerprint(model)):
        raise ValueError(f"checkpoint {place} is of another model than model.path={model}: {'; '.join(differing)}")


def read_state(directory: Path, step: int) -> dict[str, Any]:
    """The `state` that was saved at `step`, with `step` itself; `window` only where it held groups."""
    window = directory / _name(step) / window_file.NAME
    state = read_state_without_window(directory, step)
    return state | {"window": window_file.read(window)} if window.exists() else state


def read_state_without_window(directory: Path, step: int) -> dict[str, Any]:
    """As `read_state`, and small: what a resume is checked by."""
    state: dict[str, Any] = json.loads((directory / _name(step) / "state.json").read_text())
    return state


def has_weights_alone(state: Mapping[str, Any]) -> bool:
    """Whether a run begins with this checkpoint, made of a model folder, and does not go on from it."""
    return bool(state.get("weights_alone"))


def load(directory: Path, step: int, policy: Policy) -> None:
    """Restore the policy from the checkpoint of `step`. Collective."""
    policy.load(directory / _name(step) / "policy")


def _manifest(place: Path) -> tuple[dict[str, FileDigest], str]:
    """The files that make up `place`, or what is wrong with its manifest."""
    try:
        written, files = digests.parse((place / digests.NAME).read_text())
    except FileNotFoundError:
        return {}, f"{digests.NAME} is missing"
    except OSError as error:
        return {}, f"{digests.NAME} cannot be read ({error.strerror or error})"
    except ValueError:
        return {}, f"{digests.NAME} is not as it was written"
    if written != FORMAT:
        raise found_alike(
            ValueError(
                f"{place} has checkpoint format {written}, expected {FORMAT}; resume with the version that wrote it, or "
                "start anew with checkpoint.resume=never"
            )
        )
    return files, ""


def _wrong_step(place: Path) -> list[str]:
    """A whole checkpoint under another's name."""
    state = json.loads((place / "state.json").read_text())
    steps = {"step": state["step"], "progress": state.get("progress", {}).get("rollout_steps", state["step"])}
    return [f"state.json is of {what} {step}" for what, step in steps.items() if _name(step) != place.name]


def _put_away(directory: Path, damaged: Mapping[int, str], chosen: int) -> None:
    """Say what is wrong with each newer one, and rename it: it must neither be tried again nor counted by `keep`."""
    for step, problem in damaged.items():
        numbers = itertools.count(1)
        names = (f"{_name(step)}.damaged{'' if n == 1 else n}" for n in numbers)
        name = next(name for name in names if not (directory / name).exists())
        os.replace(directory / _name(step), directory / name)
        print(
            f"checkpoint {directory / _name(step)} is damaged ({problem}): going on from {_name(chosen)}; the damaged one "
            f"is now {name}",
            flush=True,
        )


# ---------------------------------------------------------------- names


def _clean(directory: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for left in directory.glob(".step_*"):
        shutil.rmtree(left)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _steps(directory: Path) -> list[int]:
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in directory.glob("step_*")]
    return sorted(int(match.group(1)) for match in found if match)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
