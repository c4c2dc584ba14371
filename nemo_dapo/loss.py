"""The loss of a micro-batch, a sum over its response tokens: composed from `algorithm.py`, or the user's own."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_dapo import algorithm
from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig
from nemo_dapo.interfaces import LossFn
from nemo_dapo.user_code import user_function


def load_loss_fn(config: AlgorithmConfig) -> LossFn:
    """The loss of a run: `make_loss_fn(config)`, or what the function that `algorithm.loss` names makes of `config`.

    Raises ValueError for a name that cannot be used.
    """
    make = user_function(config.loss, "algorithm.loss") if config.loss else make_loss_fn
    loss_fn: LossFn = make(config)
    return loss_fn


def make_loss_fn(config: AlgorithmConfig) -> LossFn:
    """Eq. 8 without its normaliser, plus, where their coefficients are not 0, the KL term and the entropy bonus."""

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        mask, advantages = micro.mask, micro.advantages
        # On the first update of a step theta_old is theta: the ratio is 1 and only its gradient matters.
        old_logprobs = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
        if config.importance_cap:
            advantages = advantages * algorithm.importance_weights(
                old_logprobs, micro.rollout_logprobs, mask, cap=config.importance_cap
            )
        loss, sums = algorithm.dapo_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        assert entropy is not None
        entropy = torch.where(mask, entropy, 0.0)
        sums["entropy"] = entropy.detach().sum()
        sums["gap"] = algorithm.logprob_gap(old_logprobs, micro.rollout_logprobs, mask)["gap"]
        if config.entropy_coeff:
            loss = loss - config.entropy_coeff * entropy.sum()
        if config.kl_coeff:
            assert micro.ref_logprobs is not None
            kl = algorithm.kl_penalty(
                torch.where(mask, logprobs, 0.0),
                torch.where(mask, micro.ref_logprobs, 0.0),
                estimator=config.kl_estimator.value,
            ).sum()
            sums["kl"] = kl.detach()
            loss = loss + config.kl_coeff * kl
        return loss, sums

    return loss_fn
