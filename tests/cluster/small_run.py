"""The smallest run of the real job: a random model of 0.3 M parameters, four prompts of four samples a step."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.cluster.host import ROOT

GROUPS, SAMPLES = 4, 4  # of a step


def options(folder: Path, *, steps: int) -> list[str]:
    """Of a run of `steps` steps on the model at `folder/model`, with float32 so that trainer and vLLM agree to rounding."""
    return [
        "experiment=demo",
        f"model.path={folder / 'model'}",
        "data.train.arithmetic.num_problems=20",
        "data.eval.arithmetic.num_problems=4",
        "reward.function=tests.end_to_end_rewards:even_length",
        "reward.timeout=300",
        "reward.overlong.buffer=0",
        "rollout.max_response_length=16",
        "rollout.vllm.max_model_len=64",
        f"algorithm.prompts_per_step={GROUPS}",
        f"algorithm.group_size={SAMPLES}",
        "algorithm.minibatch_size=8",
        "algorithm.dynamic_sampling=false",
        f"trainer.max_steps={steps}",
        "evaluation.every=0",
        "evaluation.at_start=false",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "checkpoint.export=false",
        "logger.tensorboard=false",
        "logger.rollout_every=1",
        "logger.rollout_tokens=true",
    ]


def environment(folder: Path, run_dir: Path) -> dict[str, str]:
    """What the job files of examples/slurm read, with one rank a node."""
    return {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RANKS_PER_NODE": "1",
        "RUN_DIR": str(run_dir),
        "HOLD_FOLDER": str(folder),
        "PATH": os.environ["PATH"],
    }
