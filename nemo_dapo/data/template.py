"""From a problem to the token ids a model is asked with: prompt template, system prompt, chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_dapo.config import DataConfig
from nemo_dapo.config.prompts import DAPO, resolve_template
from nemo_dapo.data.problem import Message, Problem
from nemo_dapo.types import Prompt


@dataclass(frozen=True)
class PromptRenderer:
    """Turns problems into prompts for one tokenizer. `template` is a text with {problem}."""

    tokenizer: PreTrainedTokenizerBase
    template: str = DAPO
    system_prompt: str = ""
    use_chat_template: bool = True
    chat_template_options: dict[str, Any] = field(default_factory=dict)

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
        """The chat through the tokenizer's chat template where there is one, else its turns one after another."""
        if self.use_chat_template and self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_template_options
            )
            # The chat template wrote the special tokens itself.
            return self.tokenizer.encode(text, add_special_tokens=False)
        ids = self.tokenizer.encode("\n\n".join(turn["content"] for turn in messages))
        # Some tokenizers close every text; a prompt must stay open.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
