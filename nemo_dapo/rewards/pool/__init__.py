"""Verdicts from killable child processes.

    pool (trainer process: lanes, limits, blame; flow: what is in flight) -> process (one worker, as the trainer sees it)
        -> keeper (ends what the worker started) -> worker (the child); decoding (ids to text) at both ends

A worker imports this package too: nothing here may need torch or Hydra.
"""

from nemo_dapo.rewards.pool.pool import RewardPool

__all__ = ["RewardPool"]
