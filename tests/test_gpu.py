"""What only a CUDA device can show: log-probabilities there, their memory, NCCL's records of collectives, the rows of the
GPU proof, and the policy on Transformer Engine's layers.

Everything else is the same code as on a CPU host and is tested there. Where Transformer Engine is missing, as on a bare GPU
machine (docs/gpu_proof.md), the rows run the policy on the layers of `megatron/attention.py`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu.models import one_rank
from benchmarks.gpu.table import ROWS
from nemo_dapo.flight_recorder import unfinished
from nemo_dapo.megatron import logprobs as module
from nemo_dapo.megatron.logprobs import score_targets
from tests.test_flight_recorder import wait_until_all_ended
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """Of this process alone, over NCCL."""
    with one_rank("cuda") as one:
        yield one


def test_a_collective_behind_a_busy_kernel_is_unfinished_until_it_has_run(group: dist.ProcessGroup) -> None:
    """As the flight recorder has it, which rank a hang is laid to goes by."""
    ones = torch.ones(1, device="cuda")
    dist.all_reduce(ones, group=group)
    torch.cuda.synchronize()
    wait_until_all_ended()
    torch.cuda._sleep(3 * 10**9)  # cycles: a second and more
    dist.all_reduce(ones, group=group, async_op=True)
    (found,) = unfinished()
    assert found.operation == "nccl:all_reduce"
    torch.cuda.synchronize()
    wait_until_all_ended()


def inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, device="cuda") / hidden**0.5).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, vocab, (tokens,), device="cuda")


# bfloat16 keeps 8 bits of the logits: 2^-9 of a logit around 4 is 8e-3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("exchanged", [False, True])
def test_log_probabilities_entropy_and_gradients_are_those_of_log_softmax(
    dtype: torch.dtype, tolerance: float, exchanged: bool, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`exchanged`: with the all-reduces of tensor-parallel ranks, here over NCCL and one rank, which change nothing."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 64 * 1000)  # several chunks
    if exchanged:
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    states, weight, targets = inputs(300, 1000, 64, dtype)
    targets = targets.clamp(max=989)  # rows from 990 on are padding
    logprobs, entropy = score_targets(states, weight, targets, group=group, vocab_size=990, temperature=0.7)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()
    assert states.grad is not None
    assert weight.grad is not None
    found = states.grad.float().clone(), weight.grad.float().clone()

    log_softmax = torch.log_softmax((states.float() @ weight[:990].float().T) / 0.7, -1)
    expected = log_softmax.gather(1, targets[:, None])[:, 0]
    expected_entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=tolerance)
    gradients = torch.autograd.grad(expected.sum() + 0.1 * expected_entropy.sum(), (states, weight))
    for mine, theirs in zip(found, gradients, strict=True):
        assert (mine - theirs.float()).norm() < tolerance * theirs.float().norm()
    assert not found[1][990:].any()  # padding has no gradient


def test_memory_does_not_grow_with_tokens_times_vocabulary(group: dist.ProcessGroup) -> None:
    """16,384 tokens of a vocabulary of 151,936: float32 logits alone would take 9,500 MiB, and their gradient as much."""
    states, weight, targets = inputs(16384, 151936, 128, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, entropy = score_targets(states, weight, targets, group=group, vocab_size=151936, temperature=1.0)
    (logprobs.sum() + entropy.sum()).backward()
    torch.cuda.synchronize()
    # Two and a half chunks of 1,280 MiB (logits, probabilities, the rounded gradient), and the weight's gradient.
    assert torch.cuda.max_memory_allocated() - before < 4096 * MIB


POLICY = """
import json, sys
from pathlib import Path
import torch
from nemo_dapo.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision
from nemo_dapo.losses.dapo import make_loss_fn
from nemo_dapo.megatron import parallel
parallel.initialize(ParallelConfig(timeout_minutes=2.0), seed=1)
from nemo_dapo.megatron.policy import MegatronPolicy
from nemo_dapo.telemetry.metrics import values
from transformers import AutoModelForCausalLM
from tests.policy_scenarios import make_train_batch
path, precision = sys.argv[1], Precision(sys.argv[2])
optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0)
one = ParallelConfig(timeout_minutes=2.0)
policy = MegatronPolicy(ModelConfig(path, precision), one, optimizer, tokens_per_microbatch=128)
batch = make_train_batch()
ours = policy.logprobs(batch)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
gap, tokens = 0.0, 0
for ids, p, mine in zip(
    batch.tokens.split(batch.lengths.tolist()), batch.prompt_lengths.tolist(), ours.split(batch.lengths.tolist())
):
    with torch.no_grad():
        theirs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    gap, tokens = gap + float((theirs[p - 1 :] - mine[p:]).abs().sum()), tokens + len(ids) - p
metrics = values(policy.update(batch, make_loss_fn(AlgorithmConfig()), None))
exported = dict(policy.export_weights())
print(json.dumps({
    "gap": gap / tokens,
    "grad_norm": metrics["grad_norm"],
    "finite": all(bool(weight.isfinite().all()) for weight in exported.values()),
    "layers": sorted({type(module).__name__ for module in policy.model[0].modules()}),
}))
parallel.shut_down()
"""


def run_policy(model: Path, precision: str) -> dict[str, Any]:
    command = [sys.executable, "-c", POLICY, str(model), precision]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="Megatron-core is not installed")
@pytest.mark.parametrize("row", ROWS)
def test_row_of_the_gpu_proof_holds(row: str, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    command = [sys.executable, "-m", "benchmarks.gpu.table", row, "--lines", str(lines)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert lines.read_text().count("\n") > 1


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("megatron", "transformer_engine")),
    reason="Megatron-core and Transformer Engine are not both installed",
)
def test_the_policy_runs_on_transformer_engine_and_agrees_with_hugging_face(tmp_path: Path) -> None:
    # Heads of 64: what Transformer Engine's fused attention takes.
    model = save_tiny_model(tmp_path, hidden=256, heads=4, rope_theta=500000.0)
    found = run_policy(model, "bf16")
    assert any(name.startswith("TE") for name in found["layers"]), found["layers"]
    assert found["finite"]
    assert 0 < found["grad_norm"] < float("inf")
    assert found["gap"] < 0.1  # bfloat16 with logits of this size; a wrong rotary base gives more than 0.3
