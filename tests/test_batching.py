"""Groups -> batch -> plan -> packed micro-batches -> log-probabilities back in the batch's order."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_dapo.batching import (
    costs,
    make_batch,
    minibatches,
    pack,
    plan_microbatches,
    plan_minibatches,
    scatter_logprobs,
)
from nemo_dapo.megatron.context_parallel import slice_microbatch
from nemo_dapo.types import Group, Prompt, Sample, TrainBatch, Verdict, VersionSpan


def batch_of(lengths: list[int], prompt_lengths: list[int]) -> TrainBatch:
    """Token t of the whole batch is 100 + t and was sampled with log-probability -t."""
    total = sum(lengths)
    return TrainBatch(
        tokens=torch.arange(100, 100 + total),
        lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor(prompt_lengths),
        rollout_logprobs=-torch.arange(float(total)),
        advantages=torch.arange(1.0, len(lengths) + 1),
    )


def sample(tokens: tuple[int, ...], logprobs: tuple[float, ...]) -> Sample:
    return Sample(token_ids=tokens, logprobs=logprobs, finish_reason="stop")


# ------------------------------------------------------------------ make_batch


def test_a_batch_lays_prompts_and_responses_back_to_back() -> None:
    verdicts = (Verdict(True), Verdict(False))
    groups = [
        Group(Prompt("a", (1, 2, 3), "", ""), (sample((4, 5), (-0.1, -0.2)), sample((6,), (-0.3,))), verdicts),
        Group(Prompt("b", (7,), "", ""), (sample((8,), (-0.4,)), sample((9, 10), (-0.5, -0.6))), verdicts),
    ]
    batch = make_batch(groups, torch.tensor([[1.0, -1.0], [2.0, -2.0]]))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 7, 9, 10]
    assert batch.lengths.tolist() == [5, 4, 2, 3]
    assert batch.prompt_lengths.tolist() == [3, 3, 1, 1]
    assert batch.rollout_logprobs.tolist() == pytest.approx(
        [0, 0, 0, -0.1, -0.2, 0, 0, 0, -0.3, 0, -0.4, 0, -0.5, -0.6]
    )
    assert batch.advantages.tolist() == [1.0, -1.0, 2.0, -2.0]
    assert batch.num_response_tokens == 6


def of_versions(*spans: tuple[int, int, int], size: int = 4, reason: str = "stop") -> tuple[Prompt, Sample]:
    """`size` response tokens behind a prompt of two."""
    versions = tuple(VersionSpan(*span) for span in spans)
    sample = Sample(range(size), [-1.0] * size, reason, versions)
    return Prompt(str(spans), (8, 9), "", ""), sample


def newest_of(*pairs: tuple[Prompt, Sample], **options: Any) -> list[list[int]] | None:
    """Of each sequence, trained on from version 7: which of its tokens are newest."""
    groups = [Group(prompt, (sample,), (Verdict(True),)) for prompt, sample in pairs]
    batch = make_batch(groups, torch.zeros(len(groups), 1), version=7, **options)
    if batch.newest is None:
        return None
    assert batch.newest.dtype == torch.bool
    assert batch.newest.shape == batch.tokens.shape
    return [one.nonzero().flatten().tolist() for one in batch.newest.split(batch.lengths.tolist())]


MIXED = of_versions((5, 0, 1), (6, 1, 2), (7, 2, 4))
OLD, NEW, UNKNOWN = of_versions((6, 0, 4)), of_versions((7, 0, 3), size=3), of_versions()


def test_the_newest_tokens_are_those_of_the_weights_that_the_step_trains_from() -> None:
    assert newest_of(NEW, MIXED, OLD, UNKNOWN, NEW) == [[2, 3, 4], [4, 5], [], [], [2, 3, 4]]
    assert newest_of(UNKNOWN) == [[]]


def test_tokens_behind_a_push_that_read_what_older_weights_had_cached_are_not_newest() -> None:
    assert newest_of(NEW, MIXED, OLD, UNKNOWN, keeps_cache=True) == [[2, 3, 4], [], [], []]


def test_a_batch_of_newest_tokens_alone_says_nothing_of_each() -> None:
    assert newest_of(NEW, NEW) is None
    prompt, sample = MIXED
    assert (
        make_batch([Group(prompt, (sample,), (Verdict(True),))], torch.zeros(1, 1)).newest is None
    )  # without a window


def test_a_response_that_was_filtered_has_no_newest_tokens() -> None:
    cut = of_versions((7, 0, 4), reason="length")
    assert newest_of(cut, OLD) == [[2, 3, 4, 5], []]
    assert newest_of(cut, OLD, overlong_filter=True) == [[], []]
    assert newest_of(of_versions((6, 0, 4), reason="length"), NEW, overlong_filter=True) is None


# ------------------------------------------------------------------ pack


def test_a_packed_micro_batch_is_the_example_of_its_docstring() -> None:
    batch = batch_of([4], [2])
    micro = pack(batch, [0], multiple_of=5)
    assert micro.tokens.tolist() == [100, 101, 102, 103, 0]
    assert micro.positions.tolist() == [0, 1, 2, 3, 0]
    assert micro.targets.tolist() == [0, 102, 103, 0, 0]  # where the mask is 0 the target is never looked at
    assert micro.mask.tolist() == [False, True, True, False, False]
    assert micro.sequence.tolist() == [0, 0, 0, 0, -1]
    assert micro.advantages.tolist() == [0, 1, 1, 0, 0]
    assert micro.rollout_logprobs.tolist() == [0, -2, -3, 0, 0]
    assert micro.cu_seqlens.tolist() == [0, 4, 5]
    assert micro.cu_seqlens.dtype == torch.int32
    assert micro.max_seqlen == 4
    assert micro.where.tolist() == [-1, 2, 3, -1, -1]
    assert micro.origin.tolist() == [0, 1, 2, 3, -1]


def test_sequences_of_a_pack_do_not_run_into_each_other() -> None:
    """Sequences 2 and 0 of three: the last token of the first predicts nothing, positions begin anew."""
    batch = batch_of([3, 2, 4], [1, 1, 2])
    micro = pack(batch, [2, 0], old_logprobs=batch.rollout_logprobs, ref_logprobs=2 * batch.rollout_logprobs)
    assert micro.tokens.tolist() == [105, 106, 107, 108, 100, 101, 102]
    assert micro.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert micro.mask.tolist() == [False, True, True, False, True, True, False]
    assert micro.targets[micro.mask].tolist() == [107, 108, 101, 102]
    assert micro.advantages[micro.mask].tolist() == [3, 3, 1, 1]
    assert micro.sequence.tolist() == [2, 2, 2, 2, 0, 0, 0]
    assert micro.origin.tolist() == [5, 6, 7, 8, 0, 1, 2]
    assert micro.cu_seqlens.tolist() == [0, 4, 7]
    assert micro.old_logprobs is not None
    assert micro.ref_logprobs is not None
    assert micro.old_logprobs[micro.mask].tolist() == [-7, -8, -1, -2]
    assert micro.ref_logprobs[micro.mask].tolist() == [-14, -16, -2, -4]


def routed(prompt: int, response: int, experts: int, reason: str = "stop") -> tuple[Prompt, Sample]:
    routes = np.full((prompt + response - 1, 2, 3), experts, np.uint16 if experts > 255 else np.uint8)
    sample = Sample(range(response), [-1.0] * response, reason, routes=routes)
    return Prompt(str(experts), tuple(range(prompt)), "", ""), sample


@pytest.mark.parametrize(("largest", "dtype"), [(9, torch.uint8), (300, torch.int32)])
def test_the_routes_of_samples_are_the_batch_s_token_for_token(largest: int, dtype: torch.dtype) -> None:
    pairs = [routed(2, 3, largest), routed(1, 2, largest - 1, "length")]
    groups = [Group(prompt, (sample,), (Verdict(True),)) for prompt, sample in pairs]
    scores = torch.zeros(2, 1)
    routes = make_batch(groups, scores).routes
    assert routes is not None
    assert (routes.dtype, routes.shape) == (dtype, (8, 2, 3))
    assert routes[:, 1].tolist() == [
        *([[largest] * 3] * 4),
        [0, 1, 2],  # a last token goes nowhere: to experts that differ
        *([[largest - 1] * 3] * 2),
        [0, 1, 2],
    ]
    filtered = make_batch(groups, scores, overlong_filter=True).routes
    assert filtered is not None
    assert filtered[:, 0].tolist() == [*([[largest] * 3] * 4), [0, 1, 2], [largest - 1] * 3]


def test_a_batch_with_a_sample_without_routes_has_none() -> None:
    prompt, sample = routed(2, 3, 9)
    without = dataclasses.replace(sample, routes=None)
    groups = [Group(prompt, (sample, without), (Verdict(True), Verdict(False)))]
    assert make_batch(groups, torch.zeros(1, 2)).routes is None


def test_routes_lie_as_tokens_do_and_filling_goes_to_experts_that_differ() -> None:
    batch = batch_of([3, 2], [1, 1])
    batch.routes = torch.tensor([[[7, 3]], [[6, 2]], [[5, 1]], [[4, 0]], [[9, 8]]], dtype=torch.uint8)  # 1 layer, K = 2
    micro = pack(batch.select(torch.tensor([1, 0])), [1, 0], sequence_multiple=4, multiple_of=10)
    assert micro.routes is not None
    assert micro.routes[:, 0].tolist() == [
        *([7, 3], [6, 2], [5, 1], [0, 1]),  # sequence 0, which is 1 after the selection, and a filling token
        *([4, 0], [9, 8], [0, 1], [0, 1]),
        *([0, 1], [0, 1]),
    ]
    assert micro.routes.dtype == torch.uint8


def test_newest_lies_as_the_log_probabilities_of_targets_do_and_is_cut_like_them() -> None:
    batch = batch_of([4, 3], [1, 1])
    batch.newest = torch.tensor(
        [False, True, False, True, False, False, True]
    )  # r0 and r2 of the first, r1 of the second
    micro = pack(batch.select(torch.tensor([1, 0])), [1, 0], sequence_multiple=4, multiple_of=12)
    assert micro.newest is not None
    assert micro.newest.tolist() == [True, False, True, False, False, True] + [False] * 6
    assert micro.rollout_logprobs[micro.newest].tolist() == [-1, -3, -6]
    # Two context-parallel ranks of four chunks a sequence: the first has the chunks 0 and 3, the other 1 and 2.
    ours, theirs = (slice_microbatch(micro, 2, rank) for rank in range(2))
    assert ours.newest is not None
    assert theirs.newest is not None
    assert ours.rollout_logprobs[ours.newest].tolist() == [-1]
    assert theirs.rollout_logprobs[theirs.newest].tolist() == [-3, -6]
    empty = pack(batch, [], multiple_of=2)
    assert empty.newest is not None
    assert empty.newest.tolist() == [False, False]


@pytest.mark.parametrize(("multiple", "tail"), [(1, 0), (2, 1), (7, 0), (8, 1), (5, 3)])
def test_the_tail_fills_a_pack_to_a_multiple(multiple: int, tail: int) -> None:
    micro = pack(batch_of([4, 3], [2, 1]), [0, 1], multiple_of=multiple)
    assert micro.tokens.numel() == 7 + tail
    assert micro.cu_seqlens.tolist() == [0, 4, 7] + [7 + tail] * (tail > 0)
    assert micro.positions[7:].tolist() == list(range(tail))
    assert not micro.mask[7:].any()


def test_a_micro_batch_without_sequences_is_all_tail() -> None:
    micro = pack(batch_of([4], [2]), [], multiple_of=2)
    assert micro.tokens.tolist() == [0, 0]
    assert micro.cu_seqlens.tolist() == [0, 2]
    assert not micro.mask.any()
    assert micro.old_logprobs is None
    assert micro.ref_logprobs is None


def test_a_moved_micro_batch_keeps_its_values() -> None:
    micro = pack(batch_of([4], [2]), [0])
    moved = micro.to("cpu")
    assert torch.equal(moved.tokens, micro.tokens)
    assert moved.max_seqlen == 4
    assert moved.old_logprobs is None
    assert moved.newest is None


# ------------------------------------------------------------------ plan_microbatches

WIDE = 10**6  # so wide a model that a sequence costs its tokens
LENGTHS = st.lists(st.integers(1, 64), min_size=0, max_size=40)


@given(lengths=LENGTHS, max_tokens=st.integers(64, 300), ranks=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_a_plan_holds_every_sequence_once_within_the_budget(lengths: list[int], max_tokens: int, ranks: int) -> None:
    plan = plan_microbatches(lengths, max_tokens=max_tokens, hidden_size=WIDE, data_parallel_size=ranks)
    bins = [bin_ for rank in plan for bin_ in rank]
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= max_tokens for bin_ in bins)
    assert len(plan) == ranks
    assert {len(rank) for rank in plan} == {len(plan[0])}  # ranks that disagree wait for each other for ever
    assert plan == plan_microbatches(lengths, max_tokens=max_tokens, hidden_size=WIDE, data_parallel_size=ranks)


@given(lengths=st.lists(st.integers(1, 64), min_size=8, max_size=60), ranks=st.integers(2, 4))
@settings(max_examples=100, deadline=None)
def test_no_rank_has_more_than_a_micro_batchs_difference_to_carry(lengths: list[int], ranks: int) -> None:
    """Full and empty bins alternate: totals differ by at most the spread of the bins, never by one a lap."""
    plan = plan_microbatches(lengths, max_tokens=128, hidden_size=WIDE, data_parallel_size=ranks)
    totals = [sum(lengths[i] for bin_ in rank for i in bin_) for rank in plan]
    loads = [sum(lengths[i] for i in bin_) for rank in plan for bin_ in rank]
    assert max(totals) - min(totals) <= max(loads) - min(loads)


def test_a_long_sequence_costs_more_than_its_tokens() -> None:
    """n + n^2 / (6 H): at H = 5120 a sequence of 20,480 tokens costs two thirds more than ten of 2,048."""
    long, short = costs([20480, 2048], 5120)
    assert long == pytest.approx(20480 * (1 + 20480 / 30720))
    assert long / (10 * short) == pytest.approx((1 + 2 / 3) / (1 + 1 / 15))


def test_bins_are_balanced_by_cost_within_the_budget_of_tokens() -> None:
    """H = 1: 12 tokens cost 36, 4 tokens 6.7. All short ones stay below the long one; by tokens two would join it."""
    lengths = [12, 4, 4, 4, 4, 4, 4]
    narrow = plan_microbatches(lengths, max_tokens=24, hidden_size=1, data_parallel_size=2)
    assert sorted(narrow) == [[[0]], [[1, 2, 3, 4, 5, 6]]]
    wide = plan_microbatches(lengths, max_tokens=24, hidden_size=WIDE, data_parallel_size=2)
    assert sorted(sum(lengths[i] for i in bin_) for rank in wide for bin_ in rank) == [16, 20]


def test_the_cheapest_bin_is_passed_over_where_it_has_no_room() -> None:
    """H = 1: the long one's bin is the dearest throughout, but after five short ones the other is full."""
    plan = plan_microbatches([12, 4, 4, 4, 4, 4, 4], max_tokens=20, hidden_size=1, data_parallel_size=2)
    assert sorted(plan) == [[[0, 6]], [[1, 2, 3, 4, 5]]]


@given(lengths=LENGTHS, max_tokens=st.integers(64, 300), ranks=st.integers(1, 5), hidden=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_a_plan_by_cost_keeps_the_budget_too(lengths: list[int], max_tokens: int, ranks: int, hidden: int) -> None:
    plan = plan_microbatches(lengths, max_tokens=max_tokens, hidden_size=hidden, data_parallel_size=ranks)
    bins = [bin_ for rank in plan for bin_ in rank]
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= max_tokens for bin_ in bins)
    assert {len(rank) for rank in plan} == {len(plan[0])}


def test_a_plan_by_hand() -> None:
    """Longest first into the emptiest of two bins: 6 | 5, then 4 to the 5, then 3 to the 6."""
    assert plan_microbatches([3, 6, 4, 5], max_tokens=9, hidden_size=WIDE, data_parallel_size=2) == [[[0, 1]], [[2, 3]]]


def test_a_budget_of_one_sequence_gives_one_a_micro_batch() -> None:
    plan = plan_microbatches([30, 40, 25], max_tokens=40, hidden_size=WIDE, data_parallel_size=2)
    assert sorted(len(bin_) for rank in plan for bin_ in rank) == [0, 1, 1, 1]


def test_a_sequence_longer_than_the_budget_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"65 tokens exceeds trainer.tokens_per_microbatch=64; raise it"):
        plan_microbatches([10, 65], max_tokens=64, hidden_size=WIDE, data_parallel_size=1)


# ------------------------------------------------------------------ scatter_logprobs, minibatches


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=12),
    ranks=st.integers(1, 3),
    multiple=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_scattering_undoes_packing(shapes: list[tuple[int, int]], ranks: int, multiple: int) -> None:
    """Every rank scatters its part; the sum over ranks is the batch's own value at each response token, else 0."""
    batch = batch_of([p + r for p, r in shapes], [p for p, _ in shapes])
    values = torch.arange(1.0, batch.tokens.numel() + 1)
    plan = plan_microbatches(batch.lengths.tolist(), max_tokens=20, hidden_size=WIDE, data_parallel_size=ranks)
    total = torch.zeros(batch.tokens.numel())
    for rank in plan:
        micros = [pack(batch, bin_, multiple_of=multiple, old_logprobs=values) for bin_ in rank]
        scores = [torch.where(m.mask, m.old_logprobs, torch.nan) for m in micros]  # type: ignore[arg-type]
        total += scatter_logprobs(micros, scores, total.numel())
    is_response = torch.cat([torch.arange(p + r) >= p for p, r in shapes])
    assert torch.equal(total, torch.where(is_response, values, 0.0))


def sizes_of(sequences: int, size: int, group_size: int) -> list[int]:
    return [len(m) for m in minibatches(sequences, size, group_size)]


def test_minibatches_are_consecutive_runs() -> None:
    assert [m.tolist() for m in minibatches(6, 2, 2)] == [[0, 1], [2, 3], [4, 5]]
    assert [m.tolist() for m in minibatches(6, 3, 2)] == [[0, 1, 2], [3, 4, 5]]  # the size cuts through groups
    assert [m.tolist() for m in minibatches(6, 64, 2)] == [list(range(6))]


def test_a_group_too_many_is_spread_over_the_updates() -> None:
    assert sizes_of(33 * 16, 512, 16) == [17 * 16, 16 * 16]  # not 512 and 16
    assert sizes_of(5 * 4, 8, 4) == [8, 8, 4]  # 5 groups over 3 updates: whole groups cannot be more even
    assert sizes_of(7, 3, 1) == [3, 2, 2]
    assert sizes_of(3 * 4, 6, 4) == [6, 6]
    assert sizes_of(5 * 4, 6, 4) == [5, 5, 5, 5]


@given(groups=st.integers(1, 40), group_size=st.integers(2, 5), size=st.integers(1, 30))
@settings(deadline=None)
def test_minibatches_are_few_even_whole_and_within_the_size(groups: int, group_size: int, size: int) -> None:
    total = groups * group_size
    found = sizes_of(total, size, group_size)
    assert sum(found) == total
    assert len(found) == -(-total // size)  # the number of updates, and so the learning rate, as without spreading
    assert max(found) <= size
    whole = size % group_size == 0
    assert max(found) - min(found) <= (group_size if whole else 1)
    assert not whole or all(one % group_size == 0 for one in found)
    if total % size == 0:
        assert found == [size] * (total // size)


def test_an_empty_batch_has_no_minibatches() -> None:
    empty = make_batch([], torch.zeros(0, 2))
    assert minibatches(empty.num_sequences, 4, 2) == []
    assert empty.tokens.dtype == torch.int32


def shares(batch: TrainBatch, owner: Tensor, replicas: int) -> list[TrainBatch]:
    """What each replica holds of a batch, as `coordination.share_batch` leaves it there."""
    parts = []
    for replica in range(replicas):
        held = owner == replica
        part = batch.select(held.nonzero().flatten())
        parts.append(
            TrainBatch(
                part.tokens, batch.lengths, batch.prompt_lengths, part.rollout_logprobs, batch.advantages, held=held
            )
        )
    return parts


def test_replicas_pack_from_their_shares_what_they_would_from_the_whole() -> None:
    torch.manual_seed(1)
    lengths = torch.randint(3, 20, (24,))
    batch = batch_of(lengths.tolist(), [2] * 24)
    runs = minibatches(24, 8, 4)
    plan = plan_minibatches(batch.lengths, runs, max_tokens=40, hidden_size=WIDE, data_parallel_size=3)
    owner = torch.empty(24, dtype=torch.int64)
    for replica, microbatches in enumerate(plan):
        owner[[i for sequences in microbatches for i in sequences]] = replica
    for replica, share in enumerate(shares(batch, owner, 3)):
        assert share.num_response_tokens == batch.num_response_tokens  # the loss's denominator
        for chosen in runs:
            for_all, for_share = batch.select(chosen), share.select(chosen)
            part = plan_microbatches(for_share.lengths.tolist(), max_tokens=40, hidden_size=WIDE, data_parallel_size=3)[
                replica
            ]
            for sequences in part:
                old = share.rollout_logprobs[share.token_indices(chosen)]
                ours = pack(for_share, sequences, old_logprobs=old)
                whole = pack(for_all, sequences, old_logprobs=for_all.rollout_logprobs)
                for name, value in vars(whole).items():
                    if isinstance(value, Tensor) and name not in (
                        "where",
                        "origin",
                    ):  # positions in the one batch or the other
                        assert torch.equal(getattr(ours, name), value), name


def test_the_plan_of_minibatches_is_their_own_plans_one_after_another() -> None:
    lengths = torch.tensor([3, 6, 4, 5, 9, 2])
    plan = plan_minibatches(
        lengths,
        [torch.tensor([0, 1, 2, 3]), torch.tensor([5, 4])],
        max_tokens=9,
        hidden_size=WIDE,
        data_parallel_size=2,
    )
    assert plan == [[[0, 1], [4]], [[2, 3], [5]]]


def test_a_sequence_that_lies_on_another_rank_is_not_packed() -> None:
    batch = batch_of([3, 2], [1, 1])
    share = shares(batch, torch.tensor([0, 1]), 2)[0]
    with pytest.raises(AssertionError, match="another rank"):
        pack(share, [1])


def test_a_rank_without_a_sequence_packs_an_empty_microbatch() -> None:
    batch = batch_of([3, 2], [1, 1])
    nothing = shares(batch, torch.tensor([0, 0]), 2)[1]
    micro = pack(nothing, [], multiple_of=2, old_logprobs=nothing.rollout_logprobs)
    assert micro.tokens.tolist() == [0, 0]
    assert not micro.mask.any()


def test_a_selected_minibatch_packs_like_the_whole() -> None:
    batch = batch_of([3, 2, 4], [1, 1, 2])
    half = batch.select(torch.tensor([2, 0]))
    whole, part = pack(batch, [2, 0]), pack(half, [0, 1])
    for name in ("tokens", "targets", "mask", "advantages", "rollout_logprobs", "cu_seqlens"):
        assert torch.equal(getattr(whole, name), getattr(part, name)), name
