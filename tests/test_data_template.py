"""The prompt a model sees: the public recipe's words, the chat template when there is one, and special tokens once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_dapo.config import DataConfig
from nemo_dapo.config.prompts import resolve_template
from nemo_dapo.data.problem import Problem
from nemo_dapo.data.template import PromptRenderer
from tests.tiny import save_tiny_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if quiet %}<quiet>{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tiny_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def rendered(tokenizer: Any, config: DataConfig, problem: Problem) -> str:
    return tokenizer.decode(PromptRenderer.from_config(config, tokenizer).prompt(problem).token_ids)


def test_the_dapo_template_is_the_public_recipes_text(tokenizer: Any) -> None:
    assert rendered(tokenizer, DataConfig(), Problem("1+1?", "2")) == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n1+1?\n\nRemember to put your answer on "
        'its own line after "Answer:".'
    )


def test_latex_braces_in_a_problem_survive_the_template(tokenizer: Any) -> None:
    problem = Problem(r"$\{x\}_{i}$ {problem} {0}", "1")
    assert rendered(tokenizer, DataConfig(template="plain"), problem) == problem.problem


def test_a_system_prompt_comes_first_with_and_without_a_chat_template(tokenizer: Any) -> None:
    config = DataConfig(template="Q: {problem}\n", system_prompt="Be brief.")
    assert rendered(tokenizer, config, Problem("1+1", "2")) == "Be brief.\n\nQ: 1+1\n"
    tokenizer.chat_template = CHAT
    assert rendered(tokenizer, config, Problem("1+1", "2")) == "<system>Be brief.\n<user>Q: 1+1\n\n<assistant>"


def test_a_row_with_its_own_system_prompt_keeps_it(tokenizer: Any) -> None:
    messages = ({"role": "system", "content": "own"}, {"role": "user", "content": "1+1"})
    config = DataConfig(system_prompt="Be brief.")
    assert rendered(tokenizer, config, Problem("1+1", "2", messages=messages)) == "own\n\n1+1"


def test_the_chat_template_can_be_switched_off_and_given_options(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    problem = Problem("1+1", "2")
    assert rendered(tokenizer, DataConfig(template="plain", use_chat_template=False), problem) == "1+1"
    config = DataConfig(template="plain", chat_template_options={"quiet": True})
    assert rendered(tokenizer, config, problem) == "<user>1+1\n<quiet><assistant>"


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt(tokenizer: Any, monkeypatch: Any) -> None:
    plain = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text, **options: [*plain(self, text, **options), 1])
    assert rendered(tokenizer, DataConfig(template="plain"), Problem("1+1", "2")) == "1+1"


@pytest.mark.parametrize("template", ["dopa", "", "{problem} {problem}"])
def test_a_template_without_its_place_for_the_problem_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of dapo, plain or a text with {problem}"):
        resolve_template(template)


def test_equal_content_has_equal_uid_and_other_content_another() -> None:
    assert Problem("1 + 1", "2").uid == Problem(" 1 +\n1 ", "2", source="x").uid
    assert len({Problem("1", "2").uid, Problem("1", "3").uid, Problem("12", "").uid, Problem("", "12").uid}) == 4


def test_an_option_that_the_chat_template_would_ignore_is_refused(tokenizer: Any) -> None:
    def renderer(**options: Any) -> PromptRenderer:
        return PromptRenderer.from_config(DataConfig(chat_template_options=options), tokenizer)

    with pytest.raises(ValueError, match=r"options\.quiet does nothing: no chat template is used; remove it"):
        renderer(quiet=True)
    tokenizer.chat_template = CHAT
    renderer(quiet=True)
    with pytest.raises(ValueError, match=r"options\.quite does nothing: .* no such variable; did you mean quiet\?"):
        renderer(quite=True)
    for name in ("add_generation_prompt", "tokenize", "continue_final_message", "messages", "chat_template"):
        with pytest.raises(
            ValueError, match=rf"options\.{name} is not a variable of the template but set by this program"
        ):
            renderer(**{name: False})


def test_a_template_that_refuses_a_system_role_names_the_option(tokenizer: Any) -> None:
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + CHAT
    assert rendered(tokenizer, DataConfig(template="plain"), Problem("1+1", "2")) == "<user>1+1\n<assistant>"
    with pytest.raises(
        ValueError, match=r"roles system, user: System role not supported; leave data\.system_prompt='Be b"
    ):
        rendered(tokenizer, DataConfig(system_prompt="Be brief."), Problem("1+1", "2"))
    own = ({"role": "system", "content": "own"}, {"role": "user", "content": "1+1"})
    with pytest.raises(ValueError, match=r"System role not supported; set data\.use_chat_template=false"):
        rendered(tokenizer, DataConfig(), Problem("1+1", "2", messages=own))


def test_the_fingerprint_changes_with_all_that_changes_a_prompt(tokenizer: Any) -> None:
    def fingerprint(**options: Any) -> dict[str, str]:
        return PromptRenderer.from_config(DataConfig(**options), tokenizer).fingerprint()

    tokenizer.chat_template = CHAT
    first = fingerprint()
    others = [
        fingerprint(template="plain"),
        fingerprint(system_prompt="x"),
        fingerprint(use_chat_template=False),
        fingerprint(chat_template_options={"quiet": True}),
    ]
    tokenizer.chat_template = CHAT + " "
    others.append(fingerprint())
    assert first not in others
    tokenizer.chat_template = CHAT
    assert fingerprint(template="dapo") == first
