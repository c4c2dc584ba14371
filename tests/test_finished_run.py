"""A run that has taken all its steps and written its model is not begun again."""

from __future__ import annotations

from pathlib import Path

from examples import train_dapo
from nemo_dapo.config import Resume, RunConfig


def run_at(folder: Path, step: int | None, *, trained: bool = True) -> RunConfig:
    config = RunConfig(output_dir=str(folder))
    config.trainer.max_steps = 7
    if step is not None:
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    if trained:
        (folder / "trained").mkdir(parents=True)
    return config


def test_a_finished_run_says_so_and_what_goes_on(tmp_path: Path) -> None:
    line = train_dapo.finished(run_at(tmp_path, 7))
    assert line == f"nothing to do: {tmp_path} is at step 7 of trainer.max_steps=7; raise it to go on from there"


def test_a_run_with_something_left_to_do_is_begun(tmp_path: Path) -> None:
    for name, config in {
        "steps": run_at(tmp_path / "a", 6),
        "the start": run_at(tmp_path / "b", None),
        "the export": run_at(tmp_path / "c", 7, trained=False),
    }.items():
        assert train_dapo.finished(config) is None, name
    anew = run_at(tmp_path / "d", 7)
    anew.checkpoint.resume = Resume.never
    assert train_dapo.finished(anew) is None


def test_a_run_without_an_export_is_finished_without_one(tmp_path: Path) -> None:
    config = run_at(tmp_path, 9, trained=False)
    config.checkpoint.export = False
    assert train_dapo.finished(config) is not None
