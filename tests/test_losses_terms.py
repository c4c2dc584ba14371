"""The loss of a micro-batch: Eq. 8, the KL term, the entropy bonus and importance weights put together."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_dapo.batching import MicroBatch, pack
from nemo_dapo.config import AlgorithmConfig, KLEstimator
from nemo_dapo.losses import load_loss_fn
from nemo_dapo.losses.dapo import make_loss_fn
from nemo_dapo.types import TrainBatch


def micro_batch(*, old: float | None = None, ref: float | None = None, rollout: float = -1.0) -> MicroBatch:
    """One sequence of 2 prompt and 2 response tokens, advantage 2: mask 0 1 1 0; log-probabilities alike on all tokens."""
    batch = TrainBatch(
        tokens=torch.tensor([3, 4, 5, 6]),
        lengths=torch.tensor([4]),
        prompt_lengths=torch.tensor([2]),
        rollout_logprobs=torch.full((4,), rollout),
        advantages=torch.tensor([2.0]),
    )
    return pack(batch, [0], old_logprobs=filled(old), ref_logprobs=filled(ref))


def filled(value: float | None) -> Tensor | None:
    return None if value is None else torch.full((4,), value)


def scores(value: float = -1.0) -> tuple[Tensor, Tensor]:
    return torch.full((4,), value, requires_grad=True), torch.full((4,), 0.5, requires_grad=True)


def test_on_the_first_update_the_ratio_is_one_and_its_gradient_the_advantage() -> None:
    logprobs, entropy = scores()
    loss, sums = make_loss_fn(AlgorithmConfig())(logprobs, entropy, micro_batch())
    loss.backward()
    assert loss.item() == -4.0  # 2 tokens x advantage 2
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, -2.0, -2.0, 0.0]
    assert entropy.grad is None or not entropy.grad.any()
    assert sums["tokens"] == 2
    assert sums["entropy"] == 1.0


def test_later_updates_compare_with_the_old_policy_and_clip() -> None:
    logprobs, entropy = scores(-1.0 + math.log(1.5))  # ratio 1.5 > 1 + 0.28
    loss, sums = make_loss_fn(AlgorithmConfig())(logprobs, entropy, micro_batch(old=-1.0))
    loss.backward()
    assert loss.item() == pytest.approx(-2 * 1.28 * 2)
    assert sums["clipped_high"] == 2
    assert logprobs.grad is None or not logprobs.grad.any()


def test_the_entropy_bonus_lowers_the_loss_on_response_tokens_only() -> None:
    logprobs, entropy = scores()
    loss, _ = make_loss_fn(AlgorithmConfig(entropy_coeff=0.1))(logprobs, entropy, micro_batch())
    loss.backward()
    assert loss.item() == pytest.approx(-4.0 - 0.1 * 2 * 0.5)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([0.0, -0.1, -0.1, 0.0])


@pytest.mark.parametrize(
    ("estimator", "per_token"),
    [(KLEstimator.k1, 0.3), (KLEstimator.k2, 0.045), (KLEstimator.k3, math.exp(-0.3) - 1 + 0.3)],
)
def test_the_kl_term_is_added_with_its_coefficient(estimator: KLEstimator, per_token: float) -> None:
    logprobs, entropy = scores(-1.0)
    config = AlgorithmConfig(kl_coeff=0.5, kl_estimator=estimator)
    loss, sums = make_loss_fn(config)(logprobs, entropy, micro_batch(ref=-1.3))
    assert sums["kl"].item() == pytest.approx(2 * per_token, rel=1e-5)
    assert loss.item() == pytest.approx(-4.0 + 0.5 * 2 * per_token, rel=1e-5)


def test_without_a_kl_coefficient_the_reference_is_not_needed() -> None:
    _, sums = make_loss_fn(AlgorithmConfig())(*scores(), micro_batch())
    assert "kl" not in sums


def test_importance_weights_scale_the_advantages_up_to_their_cap() -> None:
    logprobs, entropy = scores(-1.0)
    loss_fn = make_loss_fn(AlgorithmConfig(importance_cap=2.0))
    mild, _ = loss_fn(logprobs, entropy, micro_batch(rollout=-1.0 - math.log(1.5)))
    wild, _ = loss_fn(logprobs, entropy, micro_batch(rollout=-9.0))
    assert mild.item() == pytest.approx(-4.0 * 1.5, rel=1e-5)
    assert wild.item() == pytest.approx(-4.0 * 2.0, rel=1e-5)


def test_numbers_at_masked_positions_never_leak() -> None:
    micro = micro_batch(old=-1.0, ref=-1.3)
    logprobs, entropy = scores()
    holes = torch.tensor([math.nan, 0.0, 0.0, math.inf])
    assert micro.old_logprobs is not None
    assert micro.ref_logprobs is not None
    micro.old_logprobs += holes
    micro.ref_logprobs += holes
    micro.rollout_logprobs += holes
    micro.advantages += holes
    config = AlgorithmConfig(kl_coeff=0.5, entropy_coeff=0.1, importance_cap=2.0)
    loss, sums = make_loss_fn(config)(logprobs + holes, entropy + holes, micro)
    loss.backward()
    clean, clean_sums = make_loss_fn(config)(*scores(), micro_batch(old=-1.0, ref=-1.3))
    assert loss.item() == clean.item()
    assert {k: v.item() for k, v in sums.items()} == {k: v.item() for k, v in clean_sums.items()}
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_a_micro_batch_without_sequences_adds_nothing() -> None:
    full = TrainBatch(torch.tensor([3, 4]), torch.tensor([2]), torch.tensor([1]), torch.zeros(2), torch.ones(1))
    empty = pack(full, [], old_logprobs=torch.zeros(2), ref_logprobs=torch.zeros(2))
    logprobs, entropy = torch.zeros(1, requires_grad=True), torch.zeros(1)
    loss, sums = make_loss_fn(AlgorithmConfig(kl_coeff=0.5, entropy_coeff=0.1))(logprobs, entropy, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(value.item() for value in sums.values())
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


def test_a_loss_of_ones_own_is_found_where_the_run_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vanilla policy gradient, in a module that nothing of ours knows."""
    (tmp_path / "my_losses.py").write_text(
        "def policy_gradient(config):\n"
        "    def loss_fn(logprobs, entropy, micro):\n"
        "        return config.clip_high * -(micro.advantages * logprobs)[micro.mask].sum(), {}\n"
        "    return loss_fn\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loss_fn = load_loss_fn(AlgorithmConfig(loss="my_losses:policy_gradient", clip_high=0.5))
    assert loss_fn(*scores(-3.0), micro_batch())[0].item() == 0.5 * 2 * 2 * 3  # 2 tokens, advantage 2, -log p = 3
    for wrong, said in (
        ("my_losses:nothing", "has no function 'nothing'"),
        ("no_such_module:f", "ModuleNotFoundError"),
    ):
        with pytest.raises(ValueError, match=f"algorithm.loss '{wrong}': .*{said}"):
            load_loss_fn(AlgorithmConfig(loss=wrong))
