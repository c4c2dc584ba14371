"""The loss of a micro-batch, a sum over its response tokens: one file a loss, or the user's own."""

from __future__ import annotations

from nemo_dapo.config import AlgorithmConfig
from nemo_dapo.interfaces import LossFn
from nemo_dapo.losses import cispo, dapo, dr_grpo, gspo
from nemo_dapo.user_code import user_function

LOSSES = {
    "dapo": dapo.make_loss_fn,
    "cispo": cispo.make_loss_fn,
    "dr_grpo": dr_grpo.make_loss_fn,
    "gspo": gspo.make_loss_fn,
}


def load_loss_fn(config: AlgorithmConfig) -> LossFn:
    """The loss that `algorithm.loss` names: one of ours, or what the user's function makes of `config`.

    Raises ValueError for a name that cannot be used.
    """
    make = LOSSES.get(config.loss) or user_function(config.loss, "algorithm.loss", f" or one of {sorted(LOSSES)}")
    loss_fn: LossFn = make(config)
    return loss_fn
