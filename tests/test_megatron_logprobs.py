"""Log-probabilities: Megatron against Hugging Face, `score_targets` against log_softmax, packed attention against plain."""

from __future__ import annotations

import itertools
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
        missing, unexpected = model.load_state_dict(result["weights"], strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if MODELS[name]["tied"] and missing else [])
        assert_matches(model, result["after"])


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


def reference(vocab_size: int, rows: int, temperature: float = 0.7) -> dict[str, Tensor]:
    """log_softmax, entropy and their gradients by autograd in float64 over the real rows."""
    hidden, weight, targets = score_inputs(vocab_size, rows=rows)
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    scores = torch.log_softmax(hidden @ weight[:vocab_size].T / temperature, -1)
    logprobs = scores.gather(-1, targets[:, None])[:, 0]
    entropy = -(scores.exp() * scores).sum(-1)
    return with_gradients(logprobs, entropy, hidden, weight)


def scored(group: dist.ProcessGroup, vocab_size: int, rows: int, temperature: float = 0.7) -> dict[str, Tensor]:
    hidden, weight, targets = score_inputs(vocab_size, rows=rows)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = score_targets(
        hidden, weight, targets, group=group, vocab_size=vocab_size, temperature=temperature
    )
    return with_gradients(logprobs, entropy, hidden, weight)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """float32 against float64: sums of 150 terms of size up to 10, so a few 1e-6 relative."""
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_scores_and_gradients_are_those_of_log_softmax(group: dist.ProcessGroup, temperature: float) -> None:
    assert_close(scored(group, 150, 150, temperature), reference(150, 150, temperature))


def test_padding_rows_of_the_vocabulary_are_ignored(group: dist.ProcessGroup) -> None:
    got = scored(group, 150, 192)
    assert_close(got, reference(150, 192))
    assert torch.count_nonzero(got["grad_weight"][150:]) == 0


@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 22])
def test_chunks_give_what_one_piece_gives(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int
) -> None:
    whole = scored(group, 150, 150)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", tokens_per_chunk * 150)
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
