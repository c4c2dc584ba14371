"""Log-probabilities and entropy from hidden states, without ever holding the logits of a whole micro-batch.

The output layer of the policy is replaced by `score_targets`: for a chunk of tokens at a time it forms float32 logits over
this tensor-parallel rank's share of the vocabulary, reduces them to a few numbers a token and forgets them. The backward
pass forms each chunk again. Memory is chunk x V / tp instead of T x V; two small all-reduces serve all T tokens.

Shapes: T tokens, H hidden size, V vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 64 * 2**20  # float32 logits of one chunk: 256 MiB
LOWEST = -1e30  # stands for minus infinity where a shard holds padding only: finite, so that differences stay numbers


def score_targets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy (nats) of softmax(hidden @ weight.T / temperature), both [T] float32.

    hidden [T, H] is the same on all ranks of `group`; weight [V_padded / tp, H] is this rank's shard, of which rows
    beyond `vocab_size` in the whole vocabulary are padding; targets [T] int64. The gradient of `hidden` is this rank's
    part of the sum over the group; both outputs are differentiable.
    """
    return _ScoreTargets.apply(hidden, weight, targets, group, vocab_size, temperature)


class _ScoreTargets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: Any, vocab_size: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        start = dist.get_rank(group) * weight.size(0)
        width = min(max(vocab_size - start, 0), weight.size(0))
        local = targets - start
        owned = (local >= 0) & (local < width)
        peak = hidden.new_full((targets.numel(),), LOWEST, dtype=torch.float32)
        sums = hidden.new_zeros((3, targets.numel()), dtype=torch.float32)  # exp, exp * logit, target's logit
        for rows in _chunks(targets.numel(), width):
            logits = _logits(hidden[rows], weight[:width], temperature)  # [chunk, width]
            peak[rows] = logits.amax(-1)
            exp = (logits - peak[rows].unsqueeze(-1)).exp()
            sums[0, rows] = exp.sum(-1)
            sums[1, rows] = (exp * logits).sum(-1)
            picked = logits.gather(-1, local[rows].clamp(0, width - 1).unsqueeze(-1)).squeeze(-1)
            sums[2, rows] = torch.where(owned[rows], picked, 0.0)
        if dist.get_world_size(group) > 1:
            local_peak = peak.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            sums[:2] *= (local_peak - peak).exp()
            dist.all_reduce(sums, group=group)
        log_normaliser = peak + sums[0].log()
        mean_logit = sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, owned, log_normaliser, mean_logit)
        ctx.width, ctx.temperature = width, temperature
        return sums[2] - log_normaliser, log_normaliser - mean_logit

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob / d logit_j = [j = target] - p_j;  d entropy / d logit_j = -p_j (logit_j - mean logit)."""
        hidden, weight, local, owned, log_normaliser, mean_logit = ctx.saved_tensors
        width, temperature = ctx.width, ctx.temperature
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(local.numel(), width):
            logits = _logits(hidden[rows], weight[:width], temperature)
            probs = (logits - log_normaliser[rows].unsqueeze(-1)).exp()
            weight_of_prob = grad_logprobs[rows] - grad_entropy[rows] * mean_logit[rows]
            grad = -probs * (weight_of_prob.unsqueeze(-1) + grad_entropy[rows].unsqueeze(-1) * logits)
            own = owned[rows].nonzero().squeeze(-1)
            grad[own, local[rows][own]] += grad_logprobs[rows][own]
            grad = (grad / temperature).to(weight.dtype)
            grad_hidden[rows] = (grad @ weight[:width]).to(hidden.dtype)
            grad_weight[:width] += grad.T @ hidden[rows].to(weight.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(tokens: int, width: int) -> list[slice]:
    """Slices of the tokens whose logits have at most CHUNK_ELEMENTS elements; none where the shard is all padding."""
    if width == 0:
        return []
    size = max(1, CHUNK_ELEMENTS // width)
    return [slice(i, i + size) for i in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden.to(weight.dtype) @ weight.T).float() / temperature
