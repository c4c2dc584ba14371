"""A chat in a data set is asked as it is meant, or refused with its row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_dapo.config.prompts import DAPO
from nemo_dapo.data.chat import asked
from nemo_dapo.data.formats import dapo_math
from nemo_dapo.data.formats.columns import to_problem
from nemo_dapo.data.rows import Row

USER = {"role": "user", "content": "1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SOLUTION = {"role": "assistant", "content": "It is 2."}


def row(prompt: Any) -> Row:
    return Row({"prompt": prompt, "reward_model": {"ground_truth": "2"}}, "a.jsonl", 12, "line")


@pytest.mark.parametrize(
    ("chat", "messages"),
    [
        ([USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([USER, SOLUTION], [USER]),
        ([USER, SOLUTION, USER, SOLUTION], [USER, SOLUTION, USER]),
        ([{"role": "human", "content": "1+1?"}, {"role": "gpt", "content": "It is 2."}], [USER]),
        ([{"from": "human", "value": "1+1?"}], [USER]),
        ([{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}], [USER]),
        ([{"role": "user", "content": ["1+1?"]}], [USER]),
        (json.dumps([SYSTEM, USER]), [SYSTEM, USER]),
    ],
)
def test_a_chat_ends_with_the_users_turn_and_holds_texts(chat: Any, messages: list[dict[str, str]]) -> None:
    assert asked(row(chat), "prompt") == ("1+1?", tuple(messages))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([SYSTEM, {"role": "user", "content": None}], r"turn 2 must hold a text, got 'None'"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"turn 1 must hold text parts alone",
        ),
        ([{"role": "narrator", "content": "x"}], r"turn 1 must be .* a role of system, developer, user.*narrator"),
        ([SYSTEM], r"whose last turn is the user's, got the roles system"),
        ([SOLUTION], r"whose last turn is the user's, got the roles assistant"),
        ([], r"got the roles of no turn"),
        (["1+1?"], r"turn 1 must be \{\"role\", \"content\"\}.*'1\+1\?'"),
        ([{"role": "user", "content": "\ud835"}], r"turn 1 holds half a surrogate pair"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_row(chat: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"column 'prompt' of 'a\.jsonl', line 12.*{message}"):
        asked(row(chat), "prompt")


@pytest.mark.parametrize("text", ["[{x}] is what?", "[1, 2] is what?", '[{"a": 1}] is which JSON?'])
def test_a_text_with_brackets_is_a_text(text: str) -> None:
    assert asked(row(text), "prompt") == (text, ())


def test_a_chat_of_nothing_is_an_empty_problem() -> None:
    assert asked(row([{"role": "user", "content": "  "}]), "prompt")[0] == ""


@pytest.mark.parametrize(
    "prompt", [DAPO.replace("{problem}", "1+1?"), [{"role": "user", "content": DAPO.replace("{problem}", "1+1?")}]]
)
def test_the_recipes_template_is_taken_off_a_text_and_a_chat(prompt: Any) -> None:
    problem = dapo_math.to_problem(row(prompt))
    assert (problem.problem, problem.messages, problem.answer) == ("1+1?", (), "2")
    assert problem.metadata == {}  # data_source and extra_info are nobody's need


def test_columns_takes_the_template_off_texts_and_leaves_chats_alone() -> None:
    columns = {"problem": "prompt", "answer": "reward_model.ground_truth"}
    text = DAPO.replace("{problem}", "1+1?")
    assert to_problem(row(text), columns).problem == "1+1?"
    chat = to_problem(row([{"role": "user", "content": text}]), columns)
    assert chat.messages == ({"role": "user", "content": text},)
