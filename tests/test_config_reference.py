"""The generated reference: every option once, with its default, its range and the comment that says what it means."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_dapo.config.ranges import number
from nemo_dapo.config.reference import comments, markdown, options
from tests.test_config_ranges import full, places

ROOT = Path(__file__).parents[1]
OPTIONS = {option.name: option for option in options()}


@dataclass
class Commented:
    beside: int = 1  # beside it
    # above it,
    # in two lines
    above: str = "# no comment"
    # first above
    both: float = number(1.0, at_least=0)  # then beside
    long: float = number(
        1.0,
        at_least=0,
        why="a call of several lines",  # inside
    )  # and after
    bare: bool = False


def test_a_comment_beside_or_above_an_option_is_its_meaning() -> None:
    assert comments(Commented) == {
        "beside": "beside it",
        "above": "above it, in two lines",
        "both": "first above then beside",
        "long": "inside and after",
        "bare": "",
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_meaning(name: str) -> None:
    assert len(OPTIONS[name].meaning) >= 3


def test_every_number_of_the_configuration_is_in_the_reference_with_its_range() -> None:
    for name, *_ in places(full()):
        listed = name.replace("train.mine", "train.<name>").replace("eval.held.out", "eval.<name>")
        option = OPTIONS[listed.replace("extra.style", "extra.<name>")]
        assert option.values, name
        assert "number" in option.kind


def test_an_option_is_told_with_kind_default_and_values() -> None:
    texts = {name: (o.kind, o.default, o.values) for name, o in OPTIONS.items()}
    assert texts["algorithm.group_size"] == (
        "whole number", "16", "at least 2 (Eq. 9 compares the samples of a group)",
    )  # fmt: skip
    assert texts["algorithm.dual_clip"][:2] == ("number or null", "null")
    assert texts["algorithm.kl_coeff"] == ("number", "0.0", "at least 0")
    assert texts["model.precision"] == ("choice", "bf16", "bf16, fp32")
    assert texts["model.path"] == ("text", "must be given", "")
    assert texts["data.exclude_eval"] == ("true or false", "true", "")
    assert texts["data.train"] == ("names with options", "{}", "")
    assert texts["rollout.vllm"] == ("keys with values", "{}", "")
    assert texts["reward.extra.<name>.weight"] == ("number", "1.0", "any")


def test_the_page_has_a_row_of_five_cells_for_each_option() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(OPTIONS)
    for row in rows:
        assert row.replace("\\|", "").count("|") == 6, row


@pytest.mark.slow
def test_the_module_writes_the_page() -> None:
    command = [sys.executable, "-m", "nemo_dapo.config.reference"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == markdown()
    assert done.stderr == ""
