"""The head that scores targets, forward and backward, beside the matrix products alone that it cannot do without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.line import Line, seconds
from benchmarks.gpu.models import one_rank
from nemo_dapo.megatron.logprobs import score_targets

# [tokens, hidden size, vocabulary]: an 8 B model's micro-batch alone, and a 32 B model's eighth of the vocabulary.
SIZES = {"cpu": [(64, 32, 1000)], "cuda": [(22528, 4096, 151936), (22528, 5120, 19008)]}
REPEATS = {"cpu": 1, "cuda": 5}
ROWS = 2048  # of the products alone at a time: their logits of all tokens would not fit beside the rest
PRODUCTS = 4  # logits, logits again, and the gradients of hidden states and weight


def measure(device: str) -> Iterator[Line]:
    with one_rank(device) as group:
        for tokens, hidden, vocab in SIZES[device]:
            yield from lines_of(
                f"[{tokens}, {hidden}] × {vocab}", *inputs(tokens, hidden, vocab, device), group, device
            )


def lines_of(
    shape: str, states: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup, device: str
) -> Iterator[Line]:
    whole = seconds(
        lambda: forward_backward(states, weight, targets, group), device, repeats=REPEATS[device], warm_up=1
    )
    alone = seconds(lambda: products(states, weight), device, repeats=REPEATS[device], warm_up=1)
    flops = PRODUCTS * 2.0 * states.numel() * len(weight)
    yield Line(f"{shape}: forward and backward", 1e3 * whole, "ms")
    yield Line(f"{shape}: its matrix products alone", 1e3 * alone, "ms")
    yield Line(f"{shape}: share of matrix products", alone / whole, "")
    yield Line(f"{shape}: rate of the whole", flops / whole / 1e12, "TFLOP/s")


def forward_backward(states: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup) -> None:
    logprobs, entropy = score_targets(states, weight, targets, group=group, vocab_size=len(weight), temperature=1.0)
    torch.autograd.grad(logprobs.sum() + entropy.sum(), (states, weight))


def inputs(tokens: int, hidden: int, vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight as in a policy, with a buffer that gradients are added to, and targets."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16) / hidden**0.5).requires_grad_()
    weight.main_grad = torch.zeros(vocab, hidden, device=device)
    return states, weight, torch.randint(0, vocab, (tokens,), device=device)


@torch.no_grad()
def products(states: Tensor, weight: Tensor) -> None:
    """The same products in bf16, in equal slices, with nothing between them."""
    for start in range(0, len(states), ROWS):
        some = states[start : start + ROWS]
        logits = some @ weight.T
        torch.mm(some, weight.T, out=logits)
        logits @ weight
        logits.T @ some
