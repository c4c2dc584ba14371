"""What is wrong with the data's options is said before anything is loaded; a schema of one's own is one module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from examples.evaluate import unused
from nemo_dapo import config as schema
from nemo_dapo import entry
from nemo_dapo.config import DataConfig, DataSetConfig
from nemo_dapo.data.check import check_data
from nemo_dapo.data.load import load_problems


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    return str(tmp_path / "a.jsonl")


def check(half: str = "train", **options: Any) -> None:
    sets: dict[str, Any] = {half: {"mine": DataSetConfig(**options)}}
    check_data(DataConfig(**sets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "gms8k"},
            r"data\.train\.mine: format='gms8k' is none of arithmetic, columns, dapo_math, gsm8k; did you",
        ),
        ({"format": "csv"}, r"is none of .*, and the module csv has no function problems\(config\)"),
        ({"format": "no_such.module"}, r"is none of .*, and Python finds no module 'no_such'.*PYTHONPATH"),
        ({"format": "columns", "path": "nowhere/a.jsonl"}, r"data file 'nowhere/a\.jsonl' not found"),
        ({"format": "columns"}, r"a data set needs `path`"),
    ],
)
def test_a_format_or_file_that_does_not_exist_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**options)


@pytest.mark.parametrize(
    ("format", "half", "options", "name"),
    [
        ("gsm8k", "train", {"columns": {"problem": "q", "answer": "a"}}, "columns"),
        ("dapo_math", "train", {"columns": {"problem": "q", "answer": "a"}}, "columns"),
        ("columns", "train", {"num_problems": 10}, "num_problems"),
        ("columns", "train", {"options": {"x": 1}}, "options"),
        ("columns", "train", {"samples": 4}, "samples"),
        ("columns", "eval", {"weight": 2.0}, "weight"),
    ],
)
def test_an_option_that_does_nothing_is_refused(
    format: str, half: str, options: dict[str, Any], name: str, path: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.{half}\.mine: {name}=.* does nothing in {half} data of format={format}"
    ):
        check(half, format=format, path=path, **options)


def test_generated_sums_take_no_file() -> None:
    check(format="arithmetic", num_problems=5, max_digits=2, seed=3, split="eval")
    with pytest.raises(ValueError, match=r"path='a\.jsonl' does nothing .* hub=True|hub=True does nothing"):
        check(format="arithmetic", num_problems=5, path="a.jsonl", hub=True)


def test_a_name_on_the_hub_is_not_looked_for_as_a_file(path: str) -> None:
    check("eval", format="columns", path="org/name", hub=True, split="test", samples=4)
    check("eval", format="columns", path=path, hub=True, split="test")
    with pytest.raises(ValueError, match="not found"):
        check("eval", format="columns", path="org/name.jsonl", hub=True)


def test_a_schema_of_ones_own_is_one_module_with_options_of_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_sums.py").write_text(
        "from nemo_dapo.data.problem import Problem\n"
        "def problems(config):\n"
        "    for n in range(config.num_problems):\n"
        "        yield Problem(f'{n}+{config.options[\"plus\"]}=?', str(n + config.options['plus']))\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sums.py").write_text((tmp_path / "my_sums.py").read_text() + "OPTIONS = {'options'}\n")
    (tmp_path / "mine" / "broken.py").write_text("import no_such_library\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name in ("my_sums", "mine.sums"):
        free = DataSetConfig(format=name, num_problems=2, options={"plus": 7})
        assert [problem.answer for problem in load_problems("x", free)[0]] == ["7", "8"]
    with pytest.raises(ValueError, match="num_problems=2 does nothing"):
        check_data(DataConfig(train={"x": free}))
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        check(format="mine.broken")


CONF = Path(__file__).parents[1] / "conf"


def compose(name: str, *arguments: str) -> DataConfig:
    schema.register()
    run = entry.composed(CONF / f"{name}.yaml", ["model.path=somewhere", *arguments])
    assert run is not None
    return run.data


def test_the_experiment_for_own_data_needs_a_path_alone_and_takes_other_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train\.mine: a data set needs `path`"):
        check_data(compose("config", "experiment=own_data"))
    (tmp_path / "mine.jsonl").write_text('{"question": "p", "truth": {"value": 3}}\n')
    data = compose(
        "config",
        "experiment=own_data",
        f"data.train.mine.path={tmp_path / 'mine.jsonl'}",
        "data.train.mine.columns.problem=question",
        "data.train.mine.columns.answer=truth.value",
    )
    check_data(data)
    assert [(p.problem, p.answer) for p in load_problems("mine", data.train["mine"])[0]] == [("p", "3")]


@pytest.mark.parametrize("name", ["config", "evaluate"])
@pytest.mark.parametrize("benchmark", sorted(path.stem for path in (CONF / "benchmark").glob("*.yaml")))
def test_every_benchmark_takes_a_local_path_and_nothing_else(name: str, benchmark: str, tmp_path: Path) -> None:
    row = '{"problem": "p", "question": "p", "answer": "x #### 7", "subject": "s", "level": 1}\n'
    (tmp_path / "set.jsonl").write_text(row)
    data = compose(name, f"benchmark=[{benchmark}]", f"data.eval.{benchmark}.path={tmp_path / 'set.jsonl'}")
    check_data(data)
    assert load_problems("x", data.eval[benchmark])[0][0].problem == "p"


def test_a_second_evaluation_leaves_the_first_alone(tmp_path: Path) -> None:
    assert unused(tmp_path / "evaluate") == tmp_path / "evaluate"
    for name in ("evaluate", "evaluate_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").touch()
    assert unused(tmp_path / "evaluate") == tmp_path / "evaluate_3"
    assert unused(tmp_path / "other") == tmp_path / "other"
