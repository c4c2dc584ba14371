"""A value comes out of a file as it stands there, and what is wrong is named with file, line and column."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data import readers
from nemo_dapo.data.load import load_problems
from nemo_dapo.data.problem import LoadReport, Problem


def load(path: Path, **options: Any) -> tuple[list[Problem], LoadReport]:
    return load_problems("x", DataSetConfig(**({"format": "columns", "path": str(path)} | options)))


def answers(path: Path, *literals: str) -> list[str]:
    """The ground truths of rows whose answers are these JSON literals."""
    path.write_text("".join(f'{{"problem": "p{i}", "answer": {one}}}\n' for i, one in enumerate(literals)))
    return [problem.answer for problem in load(path)[0]]


@pytest.mark.parametrize("reverse", [False, True])
def test_texts_beside_numbers_in_a_column_stay_texts(tmp_path: Path, reverse: bool) -> None:
    cases = {
        "5": "5",
        r'"\\frac{1}{2}"': r"\frac{1}{2}",
        '"A"': "A",
        '"yes"': "yes",
        '"(1,2)"': "(1,2)",
        '"1,234"': "1,234",
        '"\\"quoted\\""': '"quoted"',
        r'"\\text{(B)}"': r"\text{(B)}",
        '"2024-01-05"': "2024-01-05",
        '"2024-01-05T10:00:00Z"': "2024-01-05T10:00:00Z",
        '"0012"': "0012",
        '"true"': "true",
        '"[2]"': "[2]",
        '"1e5"': "1e5",
        "-3": "-3",
    }
    items = list(cases.items())[:: -1 if reverse else 1]
    assert answers(tmp_path / "a.jsonl", *(literal for literal, _ in items)) == [text for _, text in items]


def test_the_problem_column_may_mix_types_too_and_a_late_change_of_type_is_none(tmp_path: Path) -> None:
    # 40,000 rows are several read blocks of a table reader.
    rows = [{"problem": f"{'x' * 100} {i}", "answer": i} for i in range(40_000)] + [{"problem": 17, "answer": r"\pi"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, report = load(tmp_path / "a.jsonl")
    assert (problems[-1].problem, problems[-1].answer) == ("17", r"\pi")
    assert report.kept == 40_001


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("12345678901234567890.0", "12345678901234567890"),
        ("-9007199254740993", "-9007199254740993"),
        ("0.1234567890123456789012345", "0.1234567890123456789012345"),
        ("1.50", "1.50"),
        ("27.0", "27"),
        ("-0.0", "0"),
        ("1e16", "10000000000000000"),
        ("1e300", "1E+300"),
    ],
)
def test_a_number_keeps_its_digits(tmp_path: Path, literal: str, text: str) -> None:
    assert answers(tmp_path / "a.jsonl", literal) == [text]
    (tmp_path / "b.json").write_text(f'[{{"problem": "p", "answer": {literal}}}]')
    assert load(tmp_path / "b.json")[0][0].answer == text


def test_a_missing_answer_is_dropped_and_counted_however_it_is_spelt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": NaN}\n{"problem": "q", "answer": null}\n'
                                      '{"problem": "r", "answer": 1}\n{"problem": NaN, "answer": 1}\n')  # fmt: skip
    assert load(tmp_path / "a.jsonl")[1].dropped == {"empty answer": 2, "empty problem": 1}
    table = pa.table({"problem": ["p", "q", "r"], "answer": pa.array([1.0, float("nan"), None], from_pandas=False)})
    pq.write_table(table, tmp_path / "a.parquet")
    problems, report = load(tmp_path / "a.parquet")
    assert ([problem.answer for problem in problems], report.dropped) == (["1"], {"empty answer": 2})


def test_parquet_decimals_keep_their_digits_and_large_floats_are_refused(tmp_path: Path) -> None:
    exact = pa.array([Decimal("123456789012345678901234567890"), Decimal("7")], pa.decimal128(38, 0))
    pq.write_table(pa.table({"problem": ["p", "q"], "answer": exact}), tmp_path / "a.parquet")
    assert [p.answer for p in load(tmp_path / "a.parquet")[0]] == ["123456789012345678901234567890", "7"]
    pq.write_table(pa.table({"problem": ["p", "q"], "answer": [1.0, 2.0**53 + 2]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"'answer' of .*b\.parquet', row 2 holds the float 9007199254740994\.0"):
        load(tmp_path / "b.parquet")


def test_metadata_is_plain_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": 1, "info": {"level": 2.50, "tags": [0.5, "x"]}}\n')
    columns = {"problem": "problem", "answer": "answer", "info": "info"}
    found = load(tmp_path / "a.jsonl", columns=columns)[0][0].metadata
    assert found == {"info": {"level": 2.5, "tags": [0.5, "x"]}}
    assert type(found["info"]["level"]) is float  # a Decimal is no JSON


GOOD = '{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD * 2 + '{"problem": oops}\n', r"a\.jsonl', line 3, character 13: Expecting value; each line must be"),
        (GOOD + "\n\n" + GOOD[:-4] + "\n", r"line 4, character \d+: "),
        (GOOD * 3 + '{"problem": "p", "answer": ["1"]}\n', r"'answer' of .*line 4 must hold text or numbers, got list"),
        (GOOD + '{"problem": "p", "answer": true}\n', r"'answer' of .*line 2 must hold text or numbers, got bool"),
        (GOOD + '{"problem": "p", "answer": Infinity}\n', r"line 2: ValueError: Infinity is no number"),
        (GOOD + '{"problem": "p"}\n', r"'answer' not found: .*line 2 has problem"),
        (GOOD + '"text"\n', r"line 2: a row must be an object with named columns, got 'text'"),
        (GOOD + '{"problem": "\\ud835", "answer": "1"}\n', r"'problem' of .*line 2 holds half a surrogate pair"),
        (GOOD + '{"problem": "p", "answer": ' + "9" * 5000 + "}\n", r"line 2: ValueError: Exceeds the limit"),
        (GOOD + '{"problem": ' + "[" * 200_000 + "\n", r"line 2: RecursionError"),
        ("", r"no problem is left to use; data x: 0 rows read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.jsonl")


def test_a_wrong_row_far_down_and_in_a_pattern_of_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(GOOD * 10)
    (tmp_path / "2.jsonl").write_text(GOOD * 99_999 + '{"problem": "p", "answer": {}}\n')
    with pytest.raises(ValueError, match=r"2\.jsonl', line 100,000 must hold text or numbers, got dict"):
        load(tmp_path / "*.jsonl")


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD.encode() + '{"problem": "é", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 2: byte 14 is not UTF-8"):
        load(tmp_path / "a.jsonl")


def test_a_list_of_objects_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"problem": f"p\u2028{i}", "answer": i} for i in range(3)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "\ufeff\n" + json.dumps(rows, ensure_ascii=False)):
        path.write_text(text, encoding="utf-8")
        assert [problem.answer for problem in load(path)[0]] == ["0", "1", "2"]
    path.write_text('[\n  {"problem": "p", "answer": 1},\n  {"problem": "q", "answer": 1,}\n]')
    with pytest.raises(ValueError, match=r"a\.json', line 3, character \d+"):
        load(path)
    path.write_text('[{"problem": "p", "answer": 1}, 7]')
    with pytest.raises(ValueError, match=r"item 2: a row must be an object with named columns, got '7'"):
        load(path)


def test_a_list_too_large_to_hold_says_how_to_make_lines_of_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(readers, "MAX_LIST_BYTES", 10)
    (tmp_path / "a.json").write_text('[{"problem": "p", "answer": 1}]')
    with pytest.raises(ValueError, match=r"held whole: write a line a row, `jq -c"):
        load(tmp_path / "a.json")


def test_names_with_brackets_are_files_and_unused_columns_may_disagree(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text('{"problem": "p1", "answer": 1, "extra": null}\n')
    (tmp_path / "b[1].jsonl").write_text('{"problem": "p2", "answer": "x", "extra": [1, {"y": 2}]}\n')
    assert len(load(tmp_path / "a[1].jsonl")[0]) == 1
    assert len(load(tmp_path / "*.jsonl")[0]) == 2
    for name, extra in (("a[2].parquet", pa.array([None])), ("b.parquet", pa.array([[1]]))):
        pq.write_table(pa.table({"problem": [name], "answer": ["1"], "extra": extra}), tmp_path / name)
    assert len(load(tmp_path / "a[2].parquet")[0]) == 1
    assert len(load(tmp_path / "*.parquet")[0]) == 2


def test_parquet_without_rows_or_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"problem": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match="no problem is left to use; data x: 0 rows read"):
        load(path)
    pq.write_table(pa.table({"problem": ["p"], "answer": ["1"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet' after 0 rows: .*; is it whole\?"):
        load(path)


# The hub


def test_without_network_the_error_names_the_way_around(monkeypatch: Any, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"cannot read 'nobody/none' \(test\): .*hf download .*`path` to DIR"):
        load(Path("nobody/none"), hub=True, split="test")


def test_a_benchmark_of_the_hub_takes_a_local_file_instead(tmp_path: Path) -> None:
    (tmp_path / "aime.jsonl").write_text('{"problem": "p", "answer": "073"}\n')
    # As conf/benchmark has it, with `path` alone overridden.
    assert load(tmp_path / "aime.jsonl", hub=True, split="test", subset="main")[0][0].answer == "073"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_downloaded_from_the_hub_is_read_by_split_and_mixed_columns_are_decoded(
    tmp_path: Path, monkeypatch: Any, streaming: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"problem": "p", "answer": 5}, {"problem": "q", "answer": r"\frac{1}{2}"}, {"problem": "r", "answer": "A"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems, _ = load(folder, hub=True, split="test", streaming=streaming)
    assert [problem.answer for problem in problems] == ["5", r"\frac{1}{2}", "A"]
    with pytest.raises(ValueError, match=r"set' \(train\): .*set `path` to a \.parquet or \.jsonl file in that folder"):
        load(folder, hub=True, split="train", streaming=streaming)
