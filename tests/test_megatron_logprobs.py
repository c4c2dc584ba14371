"""Log-probabilities: Megatron against Hugging Face, `score_targets` against log_softmax, packed attention against plain."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_dapo.megatron import logprobs as module
from nemo_dapo.megatron.logprobs import score_targets
from nemo_dapo.types import TrainBatch
from tests.policy_runs import PolicyRuns
from tests.policy_scenarios import (
    MODELS,
    PREFIX,
    VOCAB,
    every_next_token,
    make_train_batch,
    score_inputs,
    with_gradients,
)

# Two float32 implementations of a two-layer model; 1e-5 nats were seen, rotary positions at the wrong base give 0.1.
ATOL = 1e-4


@torch.no_grad()
def hf_logprobs(model: torch.nn.Module, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response token, sequence by sequence: [T], 0 on prompt tokens."""
    out = torch.zeros(batch.tokens.numel())
    start = 0
    for length, prompt in zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True):
        tokens = batch.tokens[start : start + length]
        scores = torch.log_softmax(model(tokens[None]).logits[0].float() / temperature, -1)
        picked = scores[:-1].gather(-1, tokens[1:, None])[:, 0]
        out[start + prompt : start + length] = picked[prompt - 1 :]
        start += length
    return out


@torch.no_grad()
def hf_log_softmax(model: torch.nn.Module) -> Tensor:
    return torch.log_softmax(model(torch.tensor([PREFIX])).logits[0, -1].float(), -1)


def whole_vocabulary(logprobs: Tensor) -> Tensor:
    return logprobs.view(VOCAB, -1)[:, -1]


# ------------------------------------------------------------------ parity with Hugging Face


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("name", MODELS)
class TestParity:
    def test_an_imported_model_scores_like_hugging_face(
        self, policy_runs: PolicyRuns, name: str, tensor_parallel: int
    ) -> None:
        tokens, vocabulary = policy_runs.get(tensor_parallel, "parity")[name]["before"]
        model = AutoModelForCausalLM.from_pretrained(policy_runs.folder / "models" / name)
        torch.testing.assert_close(tokens, hf_logprobs(model, make_train_batch()), rtol=0, atol=ATOL)
        torch.testing.assert_close(whole_vocabulary(vocabulary), hf_log_softmax(model), rtol=0, atol=ATOL)

    def test_a_saved_model_scores_the_same_in_hugging_face(
        self, policy_runs: PolicyRuns, name: str, tensor_parallel: int
    ) -> None:
        result = policy_runs.get(tensor_parallel, "parity")[name]
        model = AutoModelForCausalLM.from_pretrained(result["saved"])
        assert_matches(model, result["after"])
        assert (result["after"][0] - result["before"][0]).abs().max() > 100 * ATOL  # the update did something

    def test_exported_weights_load_into_hugging_face_one_by_one(
        self, policy_runs: PolicyRuns, name: str, tensor_parallel: int
    ) -> None:
        result = policy_runs.get(tensor_parallel, "parity")[name]
        config = AutoConfig.from_pretrained(policy_runs.folder / "models" / name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        missing, unexpected = model.load_state_dict(stacked(result["weights"]), strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if MODELS[name]["tied"] and missing else [])
        assert_matches(model, result["after"])


EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers 5 holds them, gate above up, all experts in one tensor; files name them one by one."""
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    rest = {}
    for name, weight in weights.items():
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = weight
        else:
            rest[name] = weight
    for where, parts in experts.items():
        gate, up, down = ([parts[kind][i] for i in range(len(parts[kind]))] for kind in ("gate", "up", "down"))
        rest[f"{where}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        rest[f"{where}.down_proj"] = torch.stack(down)
    return rest


def assert_matches(model: torch.nn.Module, scores: tuple[Tensor, Tensor]) -> None:
    tokens, vocabulary = scores
    torch.testing.assert_close(hf_logprobs(model, make_train_batch()), tokens, rtol=0, atol=ATOL)
    torch.testing.assert_close(hf_log_softmax(model), whole_vocabulary(vocabulary), rtol=0, atol=ATOL)


@pytest.mark.slow
def test_the_whole_vocabulary_is_scored_by_these_sequences() -> None:
    batch = every_next_token([1, 2])
    assert batch.tokens.view(VOCAB, 3)[:, -1].tolist() == list(range(VOCAB))
    assert batch.num_response_tokens == VOCAB


@pytest.mark.slow
def test_the_policy_divides_logits_by_the_temperature(policy_runs: PolicyRuns) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_runs.folder / "models" / "qwen2_tied")
    expected = hf_logprobs(model, make_train_batch(), temperature=0.7)
    torch.testing.assert_close(policy_runs.get(1, "temperature"), expected, rtol=0, atol=ATOL)


# ------------------------------------------------------------------ score_targets


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """A job of this process alone."""
    file: Path = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def reference(
    vocab_size: int, rows: int, temperature: float = 0.7, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """log_softmax, entropy and their gradients by autograd in float64 over the real rows of inputs rounded to `dtype`."""
    hidden, weight, targets = score_inputs(vocab_size, rows=rows)
    hidden, weight = (x.to(dtype).double().requires_grad_() for x in (hidden, weight))
    scores = torch.log_softmax(hidden @ weight[:vocab_size].T / temperature, -1)
    logprobs = scores.gather(-1, targets[:, None])[:, 0]
    entropy = -(scores.exp() * scores).sum(-1)
    return with_gradients(logprobs, entropy, hidden, weight)


def scored(
    group: dist.ProcessGroup,
    vocab_size: int,
    rows: int,
    temperature: float = 0.7,
    dtype: torch.dtype = torch.float32,
    fp32_logits: bool = False,
) -> dict[str, Tensor]:
    hidden, weight, targets = score_inputs(vocab_size, rows=rows)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    logprobs, entropy = score_targets(
        hidden,
        weight,
        targets,
        group=group,
        vocab_size=vocab_size,
        temperature=temperature,
        fp32_logits=fp32_logits,
    )
    return with_gradients(logprobs, entropy, hidden, weight)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """float32 against float64: sums of 150 terms of size up to 10, so a few 1e-6 relative."""
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=2e-5, atol=2e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_scores_and_gradients_are_those_of_log_softmax(group: dist.ProcessGroup, temperature: float) -> None:
    assert_close(scored(group, 150, 150, temperature), reference(150, 150, temperature))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def test_float32_scores_and_gradients_are_exact_to_a_millionth(group: dist.ProcessGroup) -> None:
    """Over all entries together: single ones near zero have no relative error to speak of.

    A temperature of 4 leaves logits of a few units, as a model's mostly are: a probability is as exact as its logit, whose
    own steps in float32 are 2^-22 there, and ten times as large among logits of 30.
    """
    got, expected = scored(group, 150, 150, 4.0), reference(150, 150, 4.0)
    errors = {name: relative(got[name], value) for name, value in expected.items()}
    assert max(errors.values()) < 1e-6, errors


BF16_ROUNDING = 2.0**-9  # largest relative error of one rounding to 8 bits of mantissa


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_a_bfloat16_head_is_exact_up_to_its_roundings(group: dist.ProcessGroup, fp32_logits: bool) -> None:
    got = scored(group, 150, 150, dtype=torch.bfloat16, fp32_logits=fp32_logits)
    expected = reference(150, 150, dtype=torch.bfloat16)
    hidden, weight, _ = score_inputs(150, rows=150)
    largest = float((hidden.bfloat16().double() @ weight.bfloat16().double().T).abs().max())
    # Logits of the rounded inputs are exact in float32 but for its own 2^-24 a term; each rounded one is off by at most its
    # size times 2^-9, and a log-probability is the difference of one of them and a mean of them, over the temperature.
    bound = 2 * largest / 0.7 * (16 * 2.0**-24 if fp32_logits else BF16_ROUNDING)
    worst = float((got["logprobs"].double() - expected["logprobs"]).abs().max())
    assert worst < bound
    if not fp32_logits:
        assert worst > 2 * largest / 0.7 * 16 * 2.0**-24  # the option does something
    for name in ("grad_hidden", "grad_weight"):
        # The gradient by the logits and the result are each rounded once: two roundings, and with rounded logits
        # probabilities off by `bound` of themselves.
        assert relative(got[name], expected[name]) < 2 * BF16_ROUNDING + (0 if fp32_logits else bound)


# ------------------------------------------------------------------ into Megatron's gradient buffer


def hooked(weight: Tensor) -> None:
    """What Megatron's DistributedDataParallel does with a gradient (`_make_backward_post_hook`)."""
    assert weight.grad is not None, "Megatron asks for one under overlap_grad_reduce"
    if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):  # type: ignore[attr-defined]
        weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
    weight.grad = None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2 * BF16_ROUNDING)])
def test_micro_batches_add_up_in_megatrons_gradient_buffer(
    group: dist.ProcessGroup, dtype: torch.dtype, tolerance: float, tied: bool
) -> None:
    """`tied`: the weight is looked up as the embedding too, and autograd brings that gradient along."""
    hidden, weight, targets = score_inputs(150, rows=192)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = tied  # type: ignore[attr-defined]
    exact = weight.detach().double().requires_grad_()
    for rows in (slice(0, 9), slice(9, 23)):
        logprobs, entropy = score_targets(
            hidden[rows], weight, targets[rows], group=group, vocab_size=150, temperature=0.7, fp32_logits=True
        )
        scores = torch.log_softmax(hidden[rows].detach().double() @ exact[:150].T / 0.7, -1)
        objective = scores.gather(-1, targets[rows, None]).sum() - 0.5 * (scores.exp() * scores).sum()
        looked_up = torch.zeros(())
        if tied:
            looked_up = F.embedding(targets[rows], weight).float().square().sum()
            objective = objective + F.embedding(targets[rows], exact).square().sum()
        (logprobs.sum() + 0.5 * entropy.sum() + looked_up).backward()
        hooked(weight)
        objective.backward()
    assert exact.grad is not None
    assert relative(weight.main_grad, exact.grad) < tolerance  # type: ignore[attr-defined]
    assert weight.main_grad.dtype is torch.float32  # type: ignore[attr-defined]
    assert torch.count_nonzero(weight.main_grad[150:]) == 0  # type: ignore[attr-defined]


def test_a_frozen_head_gets_no_gradient(group: dist.ProcessGroup) -> None:
    hidden, weight, targets = score_inputs(150, rows=150)
    hidden.requires_grad_()
    logprobs, _ = score_targets(hidden, weight, targets, group=group, vocab_size=150, temperature=1.0)
    logprobs.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


# ------------------------------------------------------------------ its edges


def test_padding_rows_of_the_vocabulary_are_ignored(group: dist.ProcessGroup) -> None:
    got = scored(group, 150, 192)
    assert_close(got, reference(150, 192))
    assert torch.count_nonzero(got["grad_weight"][150:]) == 0


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 22])
def test_chunks_give_what_one_piece_gives(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int
) -> None:
    whole = scored(group, 150, 150)
    monkeypatch.setattr(module, "CHUNK_BYTES", tokens_per_chunk * 150 * 4)
    assert len(module._chunks(23, 150)) == -(-23 // tokens_per_chunk)
    assert_close(scored(group, 150, 150), whole)


def test_extreme_logits_stay_finite(group: dist.ProcessGroup) -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = score_targets(hidden, weight, torch.tensor([1]), group=group, vocab_size=2, temperature=1.0)
    assert logprobs.tolist() == [-600.0]
    assert entropy.tolist() == [0.0]


def test_a_non_finite_hidden_state_spoils_its_own_token_only(group: dist.ProcessGroup) -> None:
    hidden, weight, targets = score_inputs(150, rows=150)
    hidden[3] = float("nan")
    logprobs, _ = score_targets(hidden, weight, targets, group=group, vocab_size=150, temperature=1.0)
    assert (~logprobs.isfinite()).nonzero().flatten().tolist() == [3]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "vocab_size"), [("both", 150), ("padding", 90)])
def test_two_vocabulary_shards_score_like_one(policy_runs: PolicyRuns, case: str, vocab_size: int) -> None:
    """`padding`: the second rank's shard holds padding rows only."""
    shards = [policy_runs.get(2, "sharded_scores", rank)[case] for rank in range(2)]
    expected = reference(vocab_size, 192)
    for shard in shards:  # outputs are the same on both ranks
        assert_close({k: shard[k] for k in ("logprobs", "entropy")}, {k: expected[k] for k in ("logprobs", "entropy")})
    gradients = {
        "grad_hidden": shards[0]["grad_hidden"] + shards[1]["grad_hidden"],
        "grad_weight": torch.cat([shard["grad_weight"] for shard in shards]),
    }
    assert_close(gradients, {k: expected[k] for k in gradients})


# ------------------------------------------------------------------ attention


@pytest.mark.slow
def test_packed_attention_equals_attention_of_each_sequence_alone(policy_runs: PolicyRuns) -> None:
    result = policy_runs.get(1, "packed_attention")
    bounds = result["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(bounds):
        q, k, v = (result[x][start:end].double().transpose(0, 1) for x in "qkv")
        k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))  # query heads 0, 1 share key-value head 0
        scores = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
        future = torch.ones(end - start, end - start).triu(1).bool()
        alone = F.softmax(scores.masked_fill(future, -torch.inf), -1) @ v
        expected = alone.transpose(0, 1).reshape(end - start, -1)
        torch.testing.assert_close(result["out"][start:end].double(), expected, rtol=0, atol=1e-6)
