"""From a problem to the token ids a model is asked with: prompt template, system prompt, chat template."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_dapo.config import DataConfig
from nemo_dapo.config.prompts import DAPO, resolve_template
from nemo_dapo.data.problem import Message, Problem
from nemo_dapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # here: the options are checked before anything slow is imported

_BEFORE, _AFTER = (part.strip() for part in DAPO.split("{problem}"))


def without_recipe(text: str) -> str:
    """The problem that the public recipe's template was put around; any other text as it is."""
    if text.startswith(_BEFORE) and text.endswith(_AFTER):
        return text[len(_BEFORE) : len(text) - len(_AFTER)].strip()
    return text


@dataclass(frozen=True)
class PromptRenderer:
    """Turns problems into prompts for one tokenizer. `template` is a text with {problem}.

    Raises ValueError for an option that the tokenizer's chat template would ignore, or that is not the user's to set.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = DAPO
    system_prompt: str = ""
    use_chat_template: bool = True
    chat_template_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_options(self.chat_template_options, self._chat_template, self.tokenizer)

    @classmethod
    def from_config(cls, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
        return cls(
            tokenizer=tokenizer,
            template=resolve_template(config.template),
            system_prompt=config.system_prompt,
            use_chat_template=config.use_chat_template,
            chat_template_options=config.chat_template_options,
        )

    def prompt(self, problem: Problem) -> Prompt:
        """`problem`, templated and tokenised, under its content's uid."""
        return Prompt(
            uid=problem.uid,
            token_ids=tuple(self.token_ids(self.messages(problem))),
            problem=problem.problem,
            ground_truth=problem.answer,
            source=problem.source,
            metadata=problem.metadata,
        )

    def messages(self, problem: Problem) -> list[Message]:
        """The chat: the row's own messages as they are, else the template; the system prompt unless there is one."""
        # str.replace, not str.format: problems and templates are full of LaTeX braces.
        text = self.template.replace("{problem}", problem.problem)
        turns = list(problem.messages) or [{"role": "user", "content": text}]
        if self.system_prompt and all(turn["role"] != "system" for turn in turns):
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def token_ids(self, messages: list[Message]) -> list[int]:
        """The chat through the tokenizer's chat template where there is one, else its turns one after another.

        Raises ValueError for a chat that the template refuses.
        """
        if self._chat_template:
            # The chat template wrote the special tokens itself.
            return self.tokenizer.encode(self._rendered(messages), add_special_tokens=False)
        ids = self.tokenizer.encode("\n\n".join(turn["content"] for turn in messages))
        # Some tokenizers close every text; a prompt must stay open.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def fingerprint(self) -> dict[str, str]:
        """What makes the same problem another prompt: the same for two runs that ask alike."""
        options = json.dumps(self.chat_template_options, sort_keys=True, default=str)
        digest = hashlib.sha256(f"{self._chat_template} {options}".encode()).hexdigest()[:12]
        return {"template": self.template, "system_prompt": self.system_prompt, "chat template (sha256)": digest}

    @property
    def _chat_template(self) -> str:
        """The tokenizer's, as text ("" for none, or where it is not to be used); one may have several, by name."""
        template = self.tokenizer.chat_template if self.use_chat_template else None
        return template if isinstance(template, str) else json.dumps(template) if template else ""

    def _rendered(self, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.chat_template_options
                )
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in messages)
            remedy = (
                f"leave data.system_prompt={self.system_prompt[:40]!r} empty and write it into data.template"
                if self.system_prompt
                else "set data.use_chat_template=false, or change the rows' chats"
            )
            raise ValueError(
                f"the model's chat template refuses a chat with the roles {roles}: {error}; {remedy}"
            ) from error


def _check_options(options: dict[str, Any], template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    words = set(re.findall(r"[A-Za-z_]\w+", template))
    ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
    for name in options:
        if name in ours or name == "messages":
            raise ValueError(
                f"data.chat_template_options.{name} is not a variable of the template but set by this program: remove it"
            )
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1)
            why = "the model's chat template has no such variable" if template else "no chat template is used"
            hint = f"; did you mean {near[0]}?" if near else "; remove it"
            raise ValueError(f"data.chat_template_options.{name} does nothing: {why}{hint}")
