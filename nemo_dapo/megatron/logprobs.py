"""Log-probabilities and entropy from hidden states, without ever holding the logits of a whole micro-batch.

The output layer of the policy is replaced by `score_targets`: for a chunk of tokens at a time it forms float32 logits over
this tensor-parallel rank's share of the vocabulary, reduces them to a few numbers a token and forgets them. The backward
pass forms each chunk again. Memory is chunk x V / tp instead of T x V; two small all-reduces serve all T tokens.

The weight's gradient is summed up in float32: in Megatron's gradient buffer where the weight has one, over micro-batches
too, and otherwise in a buffer of its own, rounded once.

Shapes: T tokens, H hidden size, V vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Float32 logits of one chunk; the backward pass holds twice as much, and half for its rounded copy. 2,200 tokens of 152,000
# words: with fewer, the product for the weight's gradient would wait for the buffer that it adds to. A fixed number: an old
# log-probability and the one it is compared with must come from the same kernels.
CHUNK_BYTES = 5 * 2**28
LOWEST = -1e30  # stands for minus infinity where a shard holds padding only: finite, so that differences stay numbers


def score_targets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    fp32_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` and entropy (nats) of softmax(hidden @ weight.T / temperature), both [T] float32.

    hidden [T, H] is the same on all ranks of `group`; weight [V_padded / tp, H] is this rank's shard, of which rows
    beyond `vocab_size` in the whole vocabulary are padding; targets [T] int64. The gradient of `hidden` is this rank's
    part of the sum over the group; both outputs are differentiable. With `fp32_logits` the logits of a 16-bit weight are
    not rounded to it: its products are exact in float32, in which they are summed up anyway.

    Where `weight` has a `main_grad` (Megatron's DistributedDataParallel), its gradient is added to that, and its `.grad` is
    a stand-in that Megatron's hook leaves out, or adds as zeros where the weight is the embedding's too.
    """
    return _ScoreTargets.apply(hidden, weight, targets, group, vocab_size, temperature, fp32_logits)


class _ScoreTargets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: Any,
        vocab_size: int,
        temperature: float,
        fp32_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        start = dist.get_rank(group) * weight.size(0)
        width = min(max(vocab_size - start, 0), weight.size(0))
        local = targets - start
        owned = (local >= 0) & (local < width)
        peak = hidden.new_full((targets.numel(),), LOWEST, dtype=torch.float32)
        sums = hidden.new_zeros((3, targets.numel()), dtype=torch.float32)  # exp, exp * logit, target's logit
        for rows in _chunks(targets.numel(), width):
            logits = _logits(hidden[rows], weight[:width], temperature, fp32_logits)  # [chunk, width]
            peak[rows] = logits.amax(-1)
            exp = (logits - peak[rows].unsqueeze(-1)).exp_()
            sums[0, rows] = exp.sum(-1)
            sums[1, rows] = exp.mul_(logits).sum(-1)
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
        ctx.width, ctx.temperature, ctx.fp32_logits = width, temperature, fp32_logits
        return sums[2] - log_normaliser, log_normaliser - mean_logit

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob / d logit_j = [j = target] - p_j;  d entropy / d logit_j = -p_j (logit_j - mean logit)."""
        hidden, weight, local, owned, log_normaliser, mean_logit = ctx.saved_tensors
        width, temperature = ctx.width, ctx.temperature
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = _gradient_sum(weight) if ctx.needs_input_grad[1] else None
        for rows in _chunks(local.numel(), width):
            logits = _logits(hidden[rows], weight[:width], temperature, ctx.fp32_logits)
            probs = (logits - log_normaliser[rows].unsqueeze(-1)).exp_()
            weight_of_prob = grad_logprobs[rows] - grad_entropy[rows] * mean_logit[rows]
            grad = logits.mul_(grad_entropy[rows].unsqueeze(-1)).add_(weight_of_prob.unsqueeze(-1)).mul_(probs).neg_()
            own = owned[rows].nonzero().squeeze(-1)
            grad[own, local[rows][own]] += grad_logprobs[rows][own]
            grad = grad.div_(temperature).to(weight.dtype)
            grad_hidden[rows] = (grad @ weight[:width]).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight[:width], grad.T, hidden[rows].to(weight.dtype))
        return grad_hidden, _autograds_part(weight, grad_weight), None, None, None, None, None


def _chunks(tokens: int, width: int) -> list[slice]:
    """Slices of the tokens whose float32 logits have at most CHUNK_BYTES; none where the shard is all padding."""
    if width == 0:
        return []
    size = max(1, CHUNK_BYTES // (4 * width))
    return [slice(i, i + size) for i in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, fp32_logits: bool) -> Tensor:
    """[chunk, width] float32, a tensor of its own."""
    hidden = hidden.to(weight.dtype)
    if not fp32_logits or weight.dtype is torch.float32:
        logits = (hidden @ weight.T).float()
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    return logits.div_(temperature)


def _gradient_sum(weight: Tensor) -> Tensor:
    """What the weight's gradient is added to: Megatron's buffer, which other micro-batches have added to, or zeros."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    return torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, whose sum is not rounded to the type of a and b where `total` has a wider one."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)


def _autograds_part(weight: Tensor, total: Tensor | None) -> Tensor | None:
    """What autograd gets as the weight's gradient.

    Where that is in `main_grad` already, a tensor of its shape, which Megatron's hook asks for under `overlap_grad_reduce`.
    The hook adds it if `zero_out_wgrad` marks a weight that is the embedding's too, whose own gradient comes with it.
    """
    if total is None:
        return None
    if not hasattr(weight, "main_grad"):
        return total.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
