"""GRPOTrainer of TRL on problems of a file; run by versus_trl.py, in an environment that has TRL and not this package.

    python benchmarks/trl_job.py MODEL PROBLEMS OUTPUT '{"steps": 20, …}'

PROBLEMS holds a JSON object a line, `prompt` and `answer`. For each generated batch a line goes to OUTPUT: seconds since
training began, completion tokens, share of right answers.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ANSWER = re.compile(r"Answer: (-?\d+)")


class Record(TrainerCallback):
    """Writes what each batch brought, and is its reward function."""

    __name__ = "right_or_wrong"

    def __init__(self, path: Path) -> None:
        self.file, self.began = path.open("w"), 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **rest: Any
    ) -> list[float]:
        said = [ANSWER.findall(text) for text in completions]
        right = [bool(found) and found[-1] == expected for found, expected in zip(said, answer, strict=True)]
        line = {
            "seconds": time.monotonic() - self.began,
            "tokens": sum(map(len, completion_ids)),
            "accuracy": sum(right) / len(right),
        }
        print(json.dumps(line), file=self.file, flush=True)
        return [1.0 if one else -1.0 for one in right]


def main() -> None:
    model, problems, output, options = sys.argv[1:]
    asked = json.loads(options)
    torch.set_num_threads(asked["threads"])
    config = GRPOConfig(
        output_dir=f"{output}.trl",
        loss_type="dapo",
        learning_rate=asked["lr"],
        lr_scheduler_type="linear",
        warmup_steps=asked["warmup_steps"],
        max_steps=asked["steps"] * asked["updates"],
        weight_decay=0.1,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        num_generations=asked["group_size"],
        per_device_train_batch_size=asked["minibatch_size"],
        steps_per_generation=asked["updates"],
        max_completion_length=asked["max_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=asked["seed"],
    )
    record = Record(Path(output))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=record,
        args=config,
        train_dataset=Dataset.from_json(problems),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[record],
    )
    trainer.train()


if __name__ == "__main__":
    main()
