"""A prompt that asks for what the reward does not read is refused, and so is an escape that no shell has turned."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_dapo import config as schema
from nemo_dapo import entry
from nemo_dapo.config import DataConfig, DataSetConfig, RewardConfig, RewardStyle
from nemo_dapo.config.prompts import DAPO, check_prompts, remark_on_prompts

CONF = Path(__file__).parents[1] / "conf" / "config.yaml"
DAPO_STYLE = RewardConfig(style=RewardStyle.dapo)
BOXED = "{problem} Put your final answer within \\boxed{}."


def data(template: str = "dapo", system_prompt: str = "", format: str = "columns") -> DataConfig:
    return DataConfig(train={"mine": DataSetConfig(format=format)}, template=template, system_prompt=system_prompt)


@pytest.mark.parametrize(
    "text",
    [
        "{problem}\\n", "\\n{problem}", "\\n\\nQ: {problem}", "{problem}\\nAnswer:", "{problem}\\nanswer:",
        "{problem}\\tQ", "{problem}\\r\\n", "Name: {problem}\\nnothing",
    ],
)  # fmt: skip
def test_an_escape_that_stayed_two_characters_is_refused_with_the_remedy(text: str) -> None:
    for given in (data(text), data(system_prompt=text)):
        (line,) = check_prompts(given, RewardConfig())
        name = "data.template" if given.template == text else "data.system_prompt"
        assert line.startswith(f"{name} holds a backslash before")
        assert f"$'{name}=\"…\\n…\"' in bash, or double quotes in a YAML file" in line


@pytest.mark.parametrize(
    "text",
    [
        "{problem}\n", "{problem}\n\nAnswer:", "$\\nabla$ {problem}", "a \\neq b: {problem}", "\\text{Q} {problem} \\times",
        "{problem} \\not\\in \\nu", "{problem} in $\\rightarrow$ \\theta", "{problem} \\\\", DAPO,
    ],
)  # fmt: skip
def test_real_line_breaks_and_latex_are_no_typed_escapes(text: str) -> None:
    assert list(check_prompts(data(text), RewardConfig())) == []


def test_a_command_line_is_refused_with_a_literal_escape_and_taken_with_a_line_break() -> None:
    schema.register()
    for ending, holds in (("\\n", 1), ("\n", 0)):
        run = entry.composed(CONF, ["model.path=m", f'data.template="{{problem}}{ending}"'])
        assert run is not None
        assert len(list(check_prompts(run.data, run.reward))) == holds


@pytest.mark.parametrize("template", ["nope", "{question}", "{problem} {problem}"])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    (line,) = check_prompts(data(template), RewardConfig())
    assert line.startswith(f"data.template={template!r} must be one of dapo, plain or a text with {{problem}}")


def test_a_box_that_the_strict_rule_does_not_open_is_refused() -> None:
    for given in (data(BOXED), data("plain", system_prompt="Answer within \\boxed{}.")):
        (line,) = check_prompts(given, DAPO_STYLE)
        for part in (f"data.template={given.template!r}", "\\boxed", "reward.style=dapo", "reward.style=math"):
            assert part in line
        assert list(remark_on_prompts(given, DAPO_STYLE)) == []


@pytest.mark.parametrize(
    ("given", "reward"),
    [
        (data(BOXED), RewardConfig()),  # the mathematical style reads both
        (data(BOXED), RewardConfig(style=RewardStyle.dapo, function="m:f")),  # the style is not used
        (data(BOXED + " Then write Answer : x"), DAPO_STYLE),
        (data(BOXED, system_prompt="End with 'ANSWER: <x>'"), DAPO_STYLE),
        (data(BOXED, format="dapo_math"), DAPO_STYLE),  # whose rows bring their prompt
        (data(), DAPO_STYLE),
    ],
)
def test_what_is_asked_for_and_read_is_taken_without_a_remark(given: DataConfig, reward: RewardConfig) -> None:
    assert list(check_prompts(given, reward)) == []
    assert list(remark_on_prompts(given, reward)) == []


def test_a_prompt_that_asks_for_no_form_is_remarked_upon_under_the_strict_rule() -> None:
    for template in ("plain", "Solve: {problem}\n"):
        assert list(check_prompts(data(template), DAPO_STYLE)) == []
        (line,) = remark_on_prompts(data(template), DAPO_STYLE)
        assert f"data.template={template!r} does not ask for a line `Answer: …`" in line
        assert list(remark_on_prompts(data(template), RewardConfig())) == []
