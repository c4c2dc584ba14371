"""Rows of every supported schema become problems; what is dropped is counted; what is wrong is named."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from nemo_dapo.config import DataConfig, DataSetConfig
from nemo_dapo.config.prompts import DAPO
from nemo_dapo.data.formats.arithmetic import Sum, generate, imperfect_solution, worked_solution
from nemo_dapo.data.load import load_problems, load_prompt_set, load_run_data
from nemo_dapo.data.template import PromptRenderer
from tests.tiny import save_tiny_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared test data is not at {SHARED}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dapo_row(problem: str, answer: str, index: str = "0") -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO.replace("{problem}", problem)}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_dapo(path: Path, rows: list[dict[str, Any]]) -> DataSetConfig:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return DataSetConfig(format="dapo_math", path=str(path))


def columns(path: str, **options: Any) -> DataSetConfig:
    return DataSetConfig(format="columns", path=path, **options)


# Arithmetic


def test_a_worked_solution_adds_column_by_column_and_carries() -> None:
    assert worked_solution(372, 4805) == "2+5+0=07\n7+0+0=07\n3+8+0=11\n0+4+1=05\nAnswer: 5177"
    assert worked_solution(9, 1) == "9+1+0=10\n0+0+1=01\nAnswer: 10"


def test_every_line_of_a_worked_solution_is_true_and_short() -> None:
    for item in generate(500, seed=3, max_digits=4):
        *steps, last = item.solution.split("\n")
        for step in steps:
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
        assert last == f"Answer: {item.a + item.b}"
        assert len(item.solution) <= 60


def test_a_learner_who_never_errs_writes_the_worked_solution() -> None:
    for item in generate(200, seed=1, max_digits=4):
        assert imperfect_solution(item.a, item.b, random.Random(0), forget_carry=0.0, miscount=0.0) == item.solution


def test_a_forgotten_carry_is_followed_through_to_the_answer() -> None:
    forgetful = imperfect_solution(378, 4805, random.Random(0), forget_carry=1.0, miscount=0.0)
    assert forgetful == "8+5+0=13\n7+0+0=07\n3+8+0=11\n0+4+0=04\nAnswer: 4173"
    assert imperfect_solution(9, 1, random.Random(0), forget_carry=1.0, miscount=0.0) == "9+1+0=10\nAnswer: 0"


def test_the_rates_of_lapses_are_those_asked_for() -> None:
    rng, forgotten, carries, miscounted, columns = random.Random(1), 0, 0, 0, 0
    for item in generate(2000, seed=0, max_digits=4):
        carry = 0
        text = imperfect_solution(item.a, item.b, rng, forget_carry=0.4, miscount=0.1)
        for left, right, used, total in re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", text):
            carries += carry
            forgotten += carry - int(used)
            columns += 1
            miscounted += int(total) != int(left) + int(right) + int(used)
            carry = int(total) // 10
    # About 1,500 carries and 6,000 columns: standard errors 0.013 and 0.004. A miscounted 0 - 1 stays 0, seldom.
    assert forgotten / carries == pytest.approx(0.4, abs=0.05)
    assert miscounted / columns == pytest.approx(0.1, abs=0.02)


def test_training_problems_of_any_seed_hold_no_evaluation_problem_even_commuted() -> None:
    held_out = {frozenset((s.a, s.b)) for s in generate(300, seed=0, max_digits=2, split="eval")}
    for seed in range(5):
        assert not held_out & {frozenset((s.a, s.b)) for s in generate(1500, seed=seed, max_digits=2)}


def test_generated_problems_are_all_different_mixed_and_repeatable() -> None:
    problems = generate(2000, seed=7, max_digits=4)
    assert len(set(problems)) == 2000
    assert problems == generate(2000, seed=7, max_digits=4) != generate(2000, seed=8, max_digits=4)
    lengths = {(len(str(p.a)), len(str(p.b))) for p in problems}
    assert lengths == {(i, j) for i in range(1, 5) for j in range(1, 5)}


def test_more_sums_than_there_are_is_an_error_that_says_how_many() -> None:
    with pytest.raises(ValueError, match=r"num_problems=500 .* max_digits=1 .* lower num_problems"):
        generate(500, seed=0, max_digits=1)
    with pytest.raises(ValueError, match=r"split='test'.*train or eval"):
        load_problems("sums", DataSetConfig(format="arithmetic", num_problems=3, split="test"))


def test_the_two_orders_of_a_sum_share_a_split() -> None:
    assert all(Sum(a, b).split == Sum(b, a).split for a in range(50) for b in range(50))


# DAPO-Math-17k


def test_repeats_of_dapo_math_are_removed_by_content_and_counted(tmp_path: Path) -> None:
    unique = [dapo_row(f"What is ${i}^2$?", str(i * i), index=f"uuid-{i}") for i in range(7)]
    problems, report = load_problems("dapo", write_dapo(tmp_path / "d.parquet", unique * 100))
    assert (report.rows_read, report.repeats_removed, report.kept, report.dropped) == (700, 693, 7, {})
    assert [p.problem for p in problems] == [f"What is ${i}^2$?" for i in range(7)]
    assert [p.answer for p in problems] == [str(i * i) for i in range(7)]
    assert problems[3].source == "math_dapo"
    assert problems[3].metadata == {"index": "uuid-3"}
    assert "700 rows read, 693 repeats removed, 0 dropped, 7 kept, sha256 " in str(report)


def test_the_content_hash_ignores_order_and_repeats_and_sees_a_changed_answer(tmp_path: Path) -> None:
    rows = [dapo_row(f"problem {i}", str(i)) for i in range(5)]

    def sha(rows: list[dict[str, Any]]) -> str:
        return load_problems("d", write_dapo(tmp_path / "d.parquet", rows))[1].sha256

    assert sha(rows) == sha(rows[::-1] * 3) != sha([*rows[:4], dapo_row("problem 4", "5")])


def test_a_templated_row_is_not_templated_twice(tmp_path: Path, tokenizer: Any) -> None:
    row = dapo_row(r"Find $\frac{1}{2}+x$ for $x=\{1\}$.", "3")
    problems, _ = load_problems("dapo", write_dapo(tmp_path / "d.parquet", [row]))
    renderer = PromptRenderer.from_config(DataConfig(), tokenizer)
    assert renderer.messages(problems[0]) == row["prompt"]
    prompt = renderer.prompt(problems[0])
    assert tokenizer.decode(prompt.token_ids) == row["prompt"][0]["content"]


def test_a_chat_of_another_template_is_kept_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    row = dapo_row("x", "1")
    row["prompt"] = [{"role": "user", "content": "Think hard: 1+0?"}]
    problems, _ = load_problems("dapo", write_dapo(tmp_path / "d.parquet", [row]))
    assert PromptRenderer.from_config(DataConfig(), tokenizer).messages(problems[0]) == row["prompt"]


def test_a_contradicting_repeat_is_dropped_under_its_own_reason(tmp_path: Path) -> None:
    rows = [dapo_row("p", "1"), dapo_row("p", "2"), dapo_row("p", "1")]
    problems, report = load_problems("d", write_dapo(tmp_path / "d.parquet", rows))
    assert [p.answer for p in problems] == ["1"]
    assert (report.repeats_removed, report.dropped) == (1, {"repeat with another answer": 1})


# Files with columns


def test_dotted_columns_reach_into_nested_ones_and_other_keys_become_metadata(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": " 1+1 ", "info": {"truth": {"value": 2.0}}, "level": 3}])
    chosen = {"problem": "q", "answer": "info.truth.value", "source": "level", "difficulty": "level"}
    problems, _ = load_problems("x", columns(path, columns=chosen))
    assert (problems[0].problem, problems[0].answer, problems[0].source) == ("1+1", "2", "3")
    assert problems[0].metadata == {"difficulty": 3}


def test_a_column_with_a_typo_names_the_columns_that_exist_and_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1", "answer": "2", "url": ""}])
    with pytest.raises(ValueError, match=r"'qeustion' not found.*has answer, question, url; did you mean 'question'"):
        load_problems("x", columns(path, columns={"problem": "qeustion", "answer": "answer"}))


def test_a_typo_inside_a_nested_column_names_its_fields(tmp_path: Path) -> None:
    config = write_dapo(tmp_path / "a.parquet", [dapo_row("p", "1")])
    config.format, config.columns = "columns", {"problem": "prompt", "answer": "reward_model.ground_turth"}
    with pytest.raises(ValueError, match=r"'reward_model' of .* has ground_truth, style; did you mean 'ground_truth'"):
        load_problems("x", config)


def test_a_file_of_another_schema_is_refused_by_dapo_and_gsm8k(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2"}])
    with pytest.raises(ValueError, match=r"'prompt' not found.*has answer, problem"):
        load_problems("x", DataSetConfig(format="dapo_math", path=path))
    with pytest.raises(ValueError, match=r"'question' not found.*has answer, problem"):
        load_problems("x", DataSetConfig(format="gsm8k", path=path))


def test_a_column_map_without_answer_says_what_to_write(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"p": "1"}])
    with pytest.raises(ValueError, match=r"must name answer, got anwser, problem: write columns"):
        load_problems("x", columns(path, columns={"problem": "p", "anwser": "p"}))


def test_an_answer_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p", "answer": ["1", "2"]}])
    with pytest.raises(ValueError, match=r"column 'answer' .* must hold text or numbers, got list"):
        load_problems("x", columns(path))


def test_a_file_that_is_not_json_is_named_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem": oops\n')
    with pytest.raises(ValueError, match=r"cannot read .*a\.jsonl', line 2, character 13"):
        load_problems("x", columns(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian.jsonl", r"'.*trian\.jsonl' not found in .*did you mean 'train\.jsonl'"),
        ("no/train.jsonl", r"not found: the folder .* does not exist"),
        ("", r"is a folder: give a file or a pattern"),
        ("train.txt", r"train\.txt' must end in one of \.parquet, \.jsonl, \.json"),
    ],
)
def test_a_path_that_cannot_be_read_says_why(tmp_path: Path, name: str, message: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"problem": "1", "answer": "1"}])
    (tmp_path / "train.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        load_problems("x", columns(str(tmp_path / name)))


def test_a_pattern_reads_all_its_files_in_order(tmp_path: Path) -> None:
    for part in range(3):
        write_jsonl(tmp_path / f"{part}.jsonl", [{"problem": f"p{part}", "answer": "1"}])
    problems, _ = load_problems("x", columns(str(tmp_path / "*.jsonl")))
    assert [p.problem for p in problems] == ["p0", "p1", "p2"]


def test_empty_and_overlong_rows_are_skipped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": "good", "answer": "1"},
        {"problem": "no answer", "answer": ""},
        {"problem": "blank answer", "answer": "  "},
        {"problem": "null answer", "answer": None},
        {"problem": "", "answer": "1"},
        {"problem": "long " * 20, "answer": "1"},
    ]
    config = columns(write_jsonl(tmp_path / "a.jsonl", rows))
    chosen = load_prompt_set("x", config, PromptRenderer(tokenizer, template="{problem}"), max_prompt_length=98)
    assert chosen.report.dropped == {"empty answer": 3, "empty problem": 1, "prompt longer than 98 tokens": 1}
    assert [p.problem for p in chosen.prompts] == ["good"]
    assert (
        "5 dropped (empty answer 3, empty problem 1, prompt longer than 98 tokens 1), 1 kept, sha256 "
        in str(chosen.report)
    )  # fmt: skip


def test_the_length_limit_is_inclusive(tmp_path: Path, tokenizer: Any) -> None:
    config = columns(write_jsonl(tmp_path / "a.jsonl", [{"problem": "12345", "answer": "1"}]))
    renderer = PromptRenderer(tokenizer, template="{problem}")
    assert len(load_prompt_set("x", config, renderer, max_prompt_length=5).prompts[0].token_ids) == 5
    with pytest.raises(ValueError, match=r"no problem is left.*prompt longer than 4 tokens 1"):
        load_prompt_set("x", config, renderer, max_prompt_length=4)


def test_max_problems_keeps_the_first_after_repeats(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i // 10}", "answer": "1"} for i in range(100)]
    problems, _ = load_problems("x", columns(write_jsonl(tmp_path / "a.jsonl", rows), max_problems=3))
    assert [p.problem for p in problems] == ["p0", "p1", "p2"]


def test_problems_of_an_evaluation_set_are_dropped_from_training_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(10)]
    train = columns(write_jsonl(tmp_path / "train.jsonl", rows))
    held_out = columns(write_jsonl(tmp_path / "eval.jsonl", [{"problem": " p3\n", "answer": "3"}]))
    config = DataConfig(train={"t": train}, eval={"e": held_out})
    data = load_run_data(config, tokenizer, max_prompt_length=1000)
    assert data.train[0].report.dropped == {"in an evaluation set": 1}
    assert "p3" not in {p.problem for p in data.train[0].prompts}
    config.exclude_eval = False
    assert len(load_run_data(config, tokenizer, max_prompt_length=1000).train[0].prompts) == 10


def test_problems_that_two_training_sets_share_are_counted_and_kept(tmp_path: Path, tokenizer: Any) -> None:
    def rows(*names: str) -> list[dict[str, Any]]:
        return [{"problem": name, "answer": "1"} for name in names]

    sets = {
        "first": columns(write_jsonl(tmp_path / "1.jsonl", rows("p", "q", "r"))),
        "second": columns(write_jsonl(tmp_path / "2.jsonl", rows("q", " r ", "s"))),
        "third": columns(write_jsonl(tmp_path / "3.jsonl", rows("t"))),
    }
    data = load_run_data(DataConfig(train=sets), tokenizer, max_prompt_length=1000)
    assert [chosen.report.overlaps for chosen in data.train] == [{}, {"first": 2}, {}]
    assert "3 kept, 2 of them also in 'first', sha256 " in str(data.train[1].report)
    assert len(data.train[1].prompts) == 3


def test_a_set_smaller_than_a_steps_attempts_is_said(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"problem": f"p{i}", "answer": "1"} for i in range(20)]
    config = DataConfig(train={"t": columns(write_jsonl(tmp_path / "a.jsonl", rows))})
    data = load_run_data(config, tokenizer, max_prompt_length=1000)
    assert data.scarcity(20) == ""
    assert data.scarcity(40).startswith("data: 20 training problems, but one step samples up to 40 ")


# The public sets in shared/data


@needs_shared
def test_gsm8k_loads_with_every_final_answer_a_number() -> None:
    config = DataSetConfig(format="gsm8k", path=str(SHARED / "gsm8k" / "train.jsonl"))
    problems, report = load_problems("gsm8k", config)
    assert (report.rows_read, report.repeats_removed, report.dropped) == (7473, 0, {})
    assert problems[0].answer == "72"
    assert all(float(p.answer) == float(p.answer) for p in problems)


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("aime24", 30), ("amc23", 40)])
def test_aime_and_amc_load_through_the_default_columns_with_integer_answers(name: str, count: int) -> None:
    problems, report = load_problems(name, columns(str(SHARED / name / "test.jsonl")))
    assert report.kept == count
    assert all(p.answer.lstrip("-").isdigit() for p in problems)
