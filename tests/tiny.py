"""Tiny Hugging Face models and tokenizers that tests build for themselves: this machine reaches no model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_dapo.types import Sample

FAMILIES: dict[str, type[Any]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
    "deepseek_v3": DeepseekV3Config,
    "moonlight": DeepseekV3Config,
}
LATENT = {  # multi-latent attention and experts, some of them shared, behind a first layer without any
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 24},
    **{"moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 4},
    **{"first_k_dense_replace": 1, "num_mtp_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
EXPERTS: dict[str, dict[str, Any]] = {  # 4 experts, of which a token goes to 2, or 8 and 4
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "moonlight": LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, so every text survives encode and decode.

    `AutoTokenizer` ignores the pre-tokenizer of tokenizer.json when config.json says `qwen2` and builds the family's own,
    which is byte-level too: with this vocabulary both agree.
    """
    vocabulary = {"<pad>": 0, "<eos>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def save_tiny_tokenizer(path: Path) -> None:
    tiny_tokenizer().save_pretrained(path)


def said(text: str, finish_reason: str = "stop") -> Sample:
    """A sample that says `text` in the tokens of `tiny_tokenizer`."""
    ids = tiny_tokenizer().encode(text)
    return Sample(ids, np.full(len(ids), -0.5, np.float32), finish_reason)


def save_tiny_model(
    path: Path,
    *,
    family: str = "qwen2",
    tied: bool = True,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    max_positions: int = 512,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised model of `family` with its tokenizer to `path`; float32, head size hidden / heads."""
    torch.manual_seed(seed)
    config = FAMILIES[family](
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **{"head_dim": hidden // heads, **EXPERTS.get(family, {})},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A fresh initialisation gives nearly uniform logits, which would hide errors: spread them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # moves the choice of experts, not their scores
                buffer.normal_(std=0.1)
    model.save_pretrained(path)
    save_tiny_tokenizer(Path(path))
    return Path(path)
