"""The demo's model grown to 30 M parameters: what it writes does not change, what a step costs does.

A warm start at that size takes two cores the better part of an hour. Instead the small model's weights become blocks of a
larger one's, whose further heads, neurons, residual dimensions and layers read at random and write nothing yet: they have
a gradient from the first update on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from examples.demo import prepare

SIZES: dict[str, Any] = {"hidden": 512, "intermediate": 1536, "heads": 16, "kv_heads": 8, "layers": 10}
WRITERS = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")  # to the residual, and of it


def save_grown(small: Path, recipe: prepare.Recipe, output: Path) -> None:
    """Writes the model of `small`, made by `recipe`, at SIZES, and its tokenizer."""
    config = prepare.model_config(replace(recipe, initializer_range=0.02, **SIZES))
    assert isinstance(config, Qwen2Config)
    torch.manual_seed(recipe.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    grown(model, config).save_pretrained(output)
    AutoTokenizer.from_pretrained(small).save_pretrained(output)


@torch.no_grad()
def grown(small: Qwen2ForCausalLM, config: Qwen2Config) -> Qwen2ForCausalLM:
    """A model of `config` with the logits of `small`: as wide a head, no fewer of anything.

    A norm divides by the root of a mean over all dimensions, of which the new ones are zero: its weights make up for that,
    and its epsilon, which `config` is given.
    """
    share = small.config.hidden_size / config.hidden_size
    config.rms_norm_eps, norm = share * small.config.rms_norm_eps, share**0.5
    large, known = Qwen2ForCausalLM(config), small.state_dict()
    for name, weight in large.state_dict().items():
        if name.endswith(WRITERS):
            weight.zero_()
        if name.endswith("norm.weight"):
            weight.fill_(norm)
        if name in known:
            block = tuple(slice(size) for size in known[name].shape)
            weight[block] = known[name] * (norm if name.endswith("norm.weight") else 1)
    return large
