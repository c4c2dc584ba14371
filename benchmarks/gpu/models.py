"""Models, batches and policies for the rows; weights are random, drawn on the spot: a GPU machine needs no download."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from nemo_dapo.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision
from nemo_dapo.interfaces import LossFn
from nemo_dapo.losses.dapo import make_loss_fn
from nemo_dapo.types import TrainBatch

LOSS: LossFn = make_loss_fn(AlgorithmConfig())
SMALLEST = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 320}
# Sizes of Qwen2.5-0.5B, whose embedding is its head.
HALF_BILLION = {"layers": 24, "hidden": 896, "heads": 14, "kv_heads": 2, "ffn": 4864, "vocab": 151936}


def write_model(
    path: Path, *, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, spread: float = 1.0
) -> Path:
    """A Hugging Face folder of the Qwen2 family in bfloat16, which fp32 and bf16 represent alike.

    Matrices are `spread` times as large as a fresh model's, whose nearly uniform attention would hide errors.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def make_batch(sequences: int, longest: int, vocab: int, *, shortest: int | None = None) -> TrainBatch:
    """Random tokens: prompts of an eighth, responses up to `longest` tokens in all; advantages of both signs."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest or longest // 2, longest + 1, (sequences,), generator=generator)
    tokens = torch.randint(2, vocab, (int(lengths.sum()),), generator=generator)
    advantages = torch.randn(sequences, generator=generator)
    return TrainBatch(tokens, lengths, lengths // 8, torch.zeros(tokens.numel()), advantages)


def response_positions(batch: TrainBatch) -> Tensor:
    """[T] bool: which tokens of `batch` are scored."""
    spans = zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)
    return torch.cat([torch.arange(length) >= prompt for length, prompt in spans])


@contextmanager
def a_policy(path: Path, precision: Precision, tokens: int, **options: Any) -> Iterator[Any]:
    """A policy of one rank; Megatron's process groups go with it."""
    from nemo_dapo.megatron import parallel

    config = ParallelConfig(timeout_minutes=10.0)
    parallel.initialize(config, seed=1)
    from nemo_dapo.megatron.policy import MegatronPolicy

    model, optimizer = ModelConfig(str(path), precision), OptimizerConfig(lr=1e-3, warmup_steps=0)
    try:
        yield MegatronPolicy(model, config, optimizer, tokens_per_microbatch=tokens, **options)
    finally:
        parallel.shut_down()


@contextmanager
def one_rank(device: str) -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone, over NCCL on a GPU: its collectives take tensors of the device."""
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda":
            torch.cuda.set_device(0)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


def hugging_face_logprobs(path: Path, dtype: torch.dtype, batch: TrainBatch, device: str) -> Tensor:
    """[T] of every token but each sequence's first, one sequence at a time, in float32 from the logits on."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.to(device)
    scored = []
    with torch.no_grad():
        for ids in batch.tokens.split(batch.lengths.tolist()):
            logits = model(ids[None].to(device)).logits[0, :-1].float()
            chosen = torch.log_softmax(logits, -1).gather(1, ids[1:, None].to(device))[:, 0]
            scored.append(torch.cat([torch.zeros(1), chosen.cpu()]))
    return torch.cat(scored)
