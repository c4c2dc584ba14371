"""The prompt templates that have a name, and whether what a prompt asks for is what the reward reads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemo_dapo.config.schema import DataConfig, RewardConfig, RewardStyle

# The user turn of the public recipe, already written into DAPO-Math-17k's `prompt` column.
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
TEMPLATES = {"dapo": DAPO, "plain": "{problem}"}

# A backslash and a letter that were meant as one character, unless they begin one of LaTeX's commands.
TYPED_ESCAPE = re.compile(
    r"\\[ntr](?![a-z])|\\n(?!(abla|eq?|eg|i|ot|otin|u|ewline|mid|geq|leq|earrow|warrow|atural|subseteq|exists|"
    r"rightarrow|leftarrow|olimits|onumber)(?![a-z]))"
)
ASKS_FOR_ANSWER = re.compile(r"(?i)answer\s*:")  # what nemo_dapo.rewards reads under style=dapo


def resolve_template(template: str) -> str:
    """A name of TEMPLATES, or a text with {problem}, as text. Raises ValueError for anything else."""
    text = TEMPLATES.get(template, template)
    if text.count("{problem}") != 1:
        raise ValueError(
            f"data.template={template!r} must be one of {', '.join(TEMPLATES)} or a text with {{problem}} in it once"
        )
    return text


def check_prompts(data: DataConfig, reward: RewardConfig) -> Iterator[str]:
    """A template that is none, escapes that a shell did not turn into characters, a box that nobody will open."""
    try:
        resolve_template(data.template)
    except ValueError as error:
        yield str(error)
    for name in ("template", "system_prompt"):
        if found := TYPED_ESCAPE.search(getattr(data, name)):
            yield (
                f"data.{name} holds a backslash before {found.group()[1]!r} instead of one character: a shell and Hydra "
                f"leave escapes as they are; write $'data.{name}=\"…\\n…\"' in bash, or double quotes in a YAML file"
            )
    if _unread(data, reward) and "\\boxed" in _instructions(data):
        yield (
            f"data.template={data.template!r} asks for \\boxed, but reward.style=dapo reads a line `Answer: …` alone: "
            "every answer would be wrong; set reward.style=math, which reads both, or ask for `Answer:`"
        )


def remark_on_prompts(data: DataConfig, reward: RewardConfig) -> Iterator[str]:
    """What is suspicious but right for a model that has learnt the form of its answers."""
    if _unread(data, reward) and "\\boxed" not in _instructions(data):
        yield (
            f"data.template={data.template!r} does not ask for a line `Answer: …`, which is all that reward.style=dapo "
            "reads; unless the model writes it anyway, take data.template=dapo or reward.style=math"
        )


def _unread(data: DataConfig, reward: RewardConfig) -> bool:
    """Whether the strict rule will judge answers to prompts that do not ask for what it reads."""
    sets = [*data.train.values(), *data.eval.values()]
    bring_their_own_prompt = all(one.format == "dapo_math" for one in sets)
    strict = reward.style is RewardStyle.dapo and not reward.function
    return strict and not bring_their_own_prompt and not ASKS_FOR_ANSWER.search(_instructions(data))


def _instructions(data: DataConfig) -> str:
    return f"{data.system_prompt}\n{TEMPLATES.get(data.template, data.template)}"
