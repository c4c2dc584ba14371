"""Groups -> one batch -> packed micro-batches, balanced over the data-parallel ranks.

Every rank knows the lengths of all sequences and computes the same plan from them, so no rank can come to another number of
micro-batches; the tokens go to the ranks that train on them alone.
Targets are shifted here, once: every per-token tensor of a micro-batch scores `targets[t]`.

Shapes: B sequences, T packed tokens, S sequences in a micro-batch.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_dapo.types import Group, Sample, TrainBatch, VersionSpan


@dataclass
class MicroBatch:
    """Sequences back to back, with `targets[t] = tokens[t + 1]` inside a sequence.

    Example, one sequence of 2 prompt (p) and 2 response (r) tokens, then one of padding (-):

        tokens    p0 p1 r0 r1 -       [T] int64
        targets   p1 r0 r1 0  0       [T] int64
        mask      0  1  1  0  0       [T] bool: targets[t] is a response token
        sequence  4  4  4  4  -1      [T] int64: position in the TrainBatch
        segment   0  0  0  0  1       [T] int64: position in the pack
        starts    0  1  0  0  0       [T] bool: targets[t] is the first token of a response
        cu_seqlens        0 4 5       [S + 1] int32
        response_lengths  2 0         [S] int64
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    sequence: Tensor
    segment: Tensor
    starts: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    cu_seqlens: Tensor
    response_lengths: Tensor
    max_seqlen: int
    where: Tensor  # [T] int64: which token of the TrainBatch targets[t] is; -1 where the mask is 0
    origin: Tensor  # [T] int64: which token of the TrainBatch tokens[t] is; -1 where it fills the pack up
    routes: Tensor | None  # [T, L, K] uint8 or int32: the experts that tokens[t] goes to in each layer; None: any
    newest: Tensor | None  # [T] bool: 0 where the mask is, else whether targets[t] is newest; None: all are

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy whose tensors lie on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return dataclasses.replace(self, **moved)


def make_batch(
    groups: Sequence[Group],
    advantages: Tensor,
    *,
    overlong_filter: bool = False,
    version: int | None = None,
    keeps_cache: bool = False,
) -> TrainBatch:
    """Concatenate prompts and responses of `groups`; `advantages` [N, G] as Eq. 9 gives them.

    Under `overlong_filter` (DAPO, section 3.4) a truncated response is left out: its prompt stands alone and adds
    nothing to the loss, nor to the tokens that divide it. It still counts in its group's advantages.
    `version` is that of the weights that the step trains from, None where no token can be of others; `keeps_cache` says
    that servers go on behind a push with what older weights had cached.
    """
    samples = [(group.prompt, sample) for group in groups for sample in group.samples]
    kept = [0 if overlong_filter and sample.truncated else len(sample.token_ids) for _, sample in samples]
    prompt_lengths = torch.tensor([len(prompt.token_ids) for prompt, _ in samples], dtype=torch.int64)
    lengths = prompt_lengths + torch.tensor(kept, dtype=torch.int64)
    # By numpy, which asks for huge pages: a step is gigabytes, and the kernel gives them out page by page.
    ids, values, at = np.empty(int(lengths.sum()), np.int32), np.empty(int(lengths.sum()), np.float32), 0
    for (prompt, sample), length in zip(samples, kept, strict=True):
        response = at + len(prompt.token_ids)
        ids[at:response], values[at:response] = prompt.token_ids, 0
        at = response + length
        ids[response:at] = sample.token_ids[:length]
        values[response:at] = sample.logprobs[:length]
    scores, routes = advantages.flatten().to(torch.float32), _joined_routes([sample for _, sample in samples], lengths)
    batch = TrainBatch(torch.from_numpy(ids), lengths, prompt_lengths, torch.from_numpy(values), scores, routes=routes)
    if version is not None:
        batch.newest = _newest(batch, [sample for _, sample in samples], version, keeps_cache=keeps_cache)
    return batch


def _newest(batch: TrainBatch, samples: Sequence[Sample], version: int, *, keeps_cache: bool) -> Tensor | None:
    """`TrainBatch.newest` [T]: None where it holds of every response token."""
    newest = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
    ends = batch.lengths.cumsum(0)
    starts = ends - batch.lengths + batch.prompt_lengths
    for sample, start, end in zip(samples, starts.tolist(), ends.tolist(), strict=True):
        for span in _spans_of(sample, version, keeps_cache=keeps_cache):
            newest[start + span.start : min(start + span.end, end)] = True
    return None if int(newest.sum()) == batch.num_response_tokens else newest


def _spans_of(sample: Sample, version: int, *, keeps_cache: bool) -> Iterator[VersionSpan]:
    """The response tokens that weights `version`, and no older ones, gave their log-probabilities.

    Behind a push a server that `keeps_cache` attends to older weights' keys and values: there a response must have begun
    under `version`.
    """
    if keeps_cache and any(span.version != version for span in sample.versions):
        return
    yield from (span for span in sample.versions if span.version == version)


def _joined_routes(samples: Sequence[Sample], lengths: Tensor) -> Tensor | None:
    """[T, L, K] of all sequences, None where one has none; a last token, which went nowhere, goes to the first K."""
    each = [sample.routes for sample in samples if sample.routes is not None]
    if not each or len(each) < len(samples):
        return None
    _, layers, top_k = each[0].shape
    # What gloo and NCCL carry and sum: uint16 is neither's.
    dtype, at = np.uint8 if each[0].dtype == np.uint8 else np.int32, 0
    joined = np.empty((int(lengths.sum()), layers, top_k), dtype)
    for routes, length in zip(each, lengths.tolist(), strict=True):
        known = min(length, len(routes))
        joined[at : at + known], joined[at + known : at + length] = routes[:known], np.arange(top_k, dtype=dtype)
        at += length
    return torch.from_numpy(joined)


def costs(lengths: Sequence[int], hidden_size: int) -> list[float]:
    """What sequences of `lengths` cost to train on, in tokens of a short one: n + n^2 / (6 H).

    A token's products with a layer's weights take about 24 H^2 operations forward, its attention to n others 4 n H: half
    of them under a causal mask, which the backward pass, dearer for attention, makes up for.
    """
    return [n + n * n / (6 * hidden_size) for n in lengths]


def plan_microbatches(
    lengths: Sequence[int], *, max_tokens: int, hidden_size: int, data_parallel_size: int, rounds_of: int = 1
) -> list[list[list[int]]]:
    """Share sequences out: plan[rank][i] lists the sequences of rank's i-th micro-batch; every rank has as many.

    The longest sequence goes first, each into the cheapest bin (see `costs`) with room for it; there are as few bins, a
    multiple of `rounds_of` a rank, as that takes to put at most `max_tokens` into each. Raises ValueError when one sequence
    alone exceeds it.
    """
    if lengths and max(lengths) > max_tokens:
        raise ValueError(
            f"a sequence of {max(lengths)} tokens exceeds trainer.tokens_per_microbatch={max_tokens}; raise it to at "
            "least rollout.max_prompt_length + rollout.max_response_length"
        )
    cost = costs(lengths, hidden_size)
    needed = max(1, -(-sum(lengths) // (max_tokens * data_parallel_size)))
    per_rank = needed + -needed % rounds_of
    while (bins := _longest_first(lengths, cost, per_rank * data_parallel_size, max_tokens)) is None:
        per_rank += rounds_of
    # Dear and cheap bins alternate over the ranks, so that the ranks' totals are close too.
    bins.sort(key=lambda bin_: -sum(cost[i] for i in bin_))
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for i, bin_ in enumerate(bins):
        lap, rank = divmod(i, data_parallel_size)
        plan[rank if lap % 2 == 0 else data_parallel_size - 1 - rank].append(sorted(bin_))
    return plan


def plan_minibatches(
    lengths: Tensor,
    minibatches: Sequence[Tensor],
    *,
    max_tokens: int,
    hidden_size: int,
    data_parallel_size: int,
    rounds_of: int = 1,
) -> list[list[list[int]]]:
    """The plans of several mini-batches one after another: what a rank scores before them is what it will train on."""
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for chosen in minibatches:
        parts = plan_microbatches(
            lengths[chosen].tolist(),
            max_tokens=max_tokens,
            hidden_size=hidden_size,
            data_parallel_size=data_parallel_size,
            rounds_of=rounds_of,
        )
        positions = chosen.tolist()
        for mine, part in zip(plan, parts, strict=True):
            mine += [[positions[i] for i in sequences] for sequences in part]
    return plan


def _longest_first(
    lengths: Sequence[int], cost: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Sequences in bins; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [max_tokens] * num_bins
    heap = [(0.0, i) for i in range(num_bins)]
    shortest = min(lengths, default=0)
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        skipped = []
        while heap and room[heap[0][1]] < lengths[sequence]:
            too_full = heapq.heappop(heap)
            if room[too_full[1]] >= shortest:
                skipped.append(too_full)
        if not heap:
            return None
        load, i = heapq.heappop(heap)
        bins[i].append(sequence)
        room[i] -= lengths[sequence]
        for entry in (*skipped, (load + cost[sequence], i)):
            heapq.heappush(heap, entry)
    return bins


def pack(
    batch: TrainBatch,
    sequences: Sequence[int],
    *,
    multiple_of: int = 1,
    sequence_multiple: int = 1,
    at_least: int = 0,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> MicroBatch:
    """Pack held `sequences` of `batch` back to back; old_logprobs and ref_logprobs [T_batch] are aligned with its tokens.

    The tail is filled to a multiple of `multiple_of` tokens (sequence parallelism splits the pack evenly over the tensor-
    parallel ranks) by a sequence of its own, which no real token attends to. A micro-batch without sequences is all tail:
    ranks must run the same number of micro-batches, and this one adds nothing to the loss. Each sequence is filled up to a
    multiple of `sequence_multiple` at its own end, which no real token attends to either (context parallelism cuts it). The
    pack has `at_least` so many tokens.
    """
    assert batch.held is None or bool(batch.held[list(sequences)].all()), "the tokens are on another rank"
    places = _places(batch, sequences, multiple_of, sequence_multiple, at_least)
    mask, origin, segment, boundaries = places.mask, places.origin, places.segment, places.boundaries
    where = torch.where(mask, torch.cat([origin[1:], origin[:1]]), -1)

    def gathered(values: Tensor, rows: Tensor) -> Tensor:
        """values[rows], 0 where a row is -1. Without sequences nothing is read: this rank may hold no token at all."""
        found = values[rows.clamp(min=0)] if len(sequences) else torch.zeros(rows.numel(), dtype=values.dtype)
        return torch.where(rows < 0, torch.zeros((), dtype=values.dtype), found)

    sequence = torch.tensor([*sequences, -1], dtype=torch.int64)[segment]
    return MicroBatch(
        tokens=gathered(batch.tokens, origin).long(),
        positions=places.positions,
        targets=gathered(batch.tokens, where).long(),
        mask=mask,
        sequence=sequence,
        segment=segment,
        starts=places.starts,
        advantages=torch.where(mask, batch.advantages[sequence.clamp(min=0)], 0.0),
        rollout_logprobs=gathered(batch.rollout_logprobs, where),
        old_logprobs=None if old_logprobs is None else gathered(old_logprobs, where),
        ref_logprobs=None if ref_logprobs is None else gathered(ref_logprobs, where),
        cu_seqlens=torch.tensor([0, *boundaries], dtype=torch.int64).cumsum(0).to(torch.int32),
        response_lengths=torch.zeros(len(boundaries), dtype=torch.int64).index_add(0, segment, mask.long()),
        max_seqlen=max(boundaries),
        where=where,
        origin=origin,
        routes=None if batch.routes is None else _routes(batch.routes, origin),
        newest=None if batch.newest is None else gathered(batch.newest, where),
    )


@dataclass
class _Places:
    """What lies where in a pack of T tokens: `boundaries` are the lengths [S] of its pieces, all else is [T]."""

    boundaries: list[int]
    segment: Tensor
    positions: Tensor
    origin: Tensor
    mask: Tensor
    starts: Tensor


def _places(
    batch: TrainBatch, sequences: Sequence[int], multiple_of: int, sequence_multiple: int, at_least: int
) -> _Places:
    ends = torch.cumsum(batch.held_lengths, 0)
    real = [int(batch.lengths[i]) for i in sequences]
    lengths = [n + -n % sequence_multiple for n in real]
    used = sum(lengths)
    total = max(used, at_least, 1)
    tail = total + -total % multiple_of - used
    boundaries = [*lengths, tail] if tail else lengths
    offsets = [int(ends[i]) - n for i, n in zip(sequences, real, strict=True)]
    segment = torch.repeat_interleave(torch.arange(len(boundaries)), torch.tensor(boundaries))
    positions = torch.cat([torch.arange(n) for n in boundaries])
    is_fill = positions >= torch.tensor([*real, 0])[segment]
    origin = torch.where(is_fill, -1, positions + torch.tensor([*offsets, 0])[segment])

    # targets[t] is the next token of the same sequence; the last token of a sequence predicts nothing.
    prompts = torch.tensor([*(int(batch.prompt_lengths[i]) for i in sequences), 0])[segment]
    is_response = ~is_fill & (positions >= prompts)
    mask = torch.cat([is_response[1:], torch.zeros(1, dtype=torch.bool)])
    mask[torch.tensor(boundaries, dtype=torch.int64).cumsum(0) - 1] = False
    return _Places(boundaries, segment, positions, origin, mask, mask & (positions + 1 == prompts))


def _routes(routes: Tensor, origin: Tensor) -> Tensor:
    """Those of the pack's tokens; what fills it up goes to experts 0 to K - 1, since a token's must differ."""
    anything = torch.arange(routes.size(2), dtype=routes.dtype).expand(origin.numel(), *routes.shape[1:]).clone()
    is_token = origin >= 0
    anything[is_token] = routes[origin[is_token]]
    return anything


def scatter_logprobs(microbatches: Sequence[MicroBatch], logprobs: Sequence[Tensor], num_tokens: int) -> Tensor:
    """Undo the packing: [num_tokens] float32 aligned with `TrainBatch.tokens`, 0 where this rank scored nothing."""
    out = torch.zeros(num_tokens, dtype=torch.float32)
    for micro, values in zip(microbatches, logprobs, strict=True):
        mask = micro.mask.cpu()
        out[micro.where.cpu()[mask]] = values.detach().float().cpu()[mask]
    return out


def minibatches(num_sequences: int, size: int, group_size: int) -> list[Tensor]:
    """Sequence indices of each optimizer step: as few runs as hold at most `size` sequences each, and equally long.

    When dynamic sampling found a little more than a multiple of `size`, runs of `size` would leave a last one of a group or
    two: an update on a noisy gradient with the full learning rate, because each divides by its own tokens. Runs are of
    whole groups, and then differ by one group at most; a `size` that cuts through groups anyway counts in sequences.
    """
    if not num_sequences:
        return []
    unit = 1 if size % group_size else group_size
    indices = torch.arange(num_sequences).view(-1, unit)
    runs = torch.tensor_split(indices, -(-num_sequences // size))
    return [run.flatten() for run in runs]
