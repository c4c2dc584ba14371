"""How far apart trainer and vLLM are with bfloat16 weights, by where logits are rounded: `benchmarks/logits.py MODEL`.

The servers sample once with bfloat16 logits and once with float32 ones (`model.fp32_logits`); the policy scores each
sample both ways. Prints a line a pair, mean and largest distance in nats a token, and as its last line JSON. Weights are
the model's own on both sides, not transferred.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

import torch

from nemo_dapo.config import ModelConfig, OptimizerConfig, ParallelConfig, Precision, RolloutConfig
from nemo_dapo.megatron import parallel
from nemo_dapo.rollout.command import with_the_head_of
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.types import Prompt, Sample, SamplingParams, TrainBatch


def sampled(model: ModelConfig, args: argparse.Namespace, folder: Path) -> list[tuple[Prompt, Sample]]:
    """Random prompts and vLLM's answers to them."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, args.first_ids, (args.prompts, 16), generator=generator).tolist()
    prompts = [Prompt(uid=str(i), token_ids=tuple(row), problem="", ground_truth="") for i, row in enumerate(ids)]
    rollout = RolloutConfig(max_prompt_length=16, max_response_length=args.tokens)
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    params = SamplingParams(max_tokens=args.tokens)
    with VLLMEngine.start(
        with_the_head_of(model, rollout), Path(model.path), model.precision, folder, tokenizer, 1
    ) as engine:

        async def all_of_them() -> list[list[Sample]]:
            return list(await asyncio.gather(*(engine.generate(prompt, 1, params) for prompt in prompts)))

        return list(zip(prompts, (one for (one,) in asyncio.run(all_of_them())), strict=True))


def batch_of(pairs: list[tuple[Prompt, Sample]]) -> TrainBatch:
    tokens = [torch.tensor([*prompt.token_ids, *sample.token_ids.tolist()]) for prompt, sample in pairs]
    theirs = [torch.tensor([0.0] * len(p.token_ids) + list(s.logprobs)) for p, s in pairs]
    return TrainBatch(
        tokens=torch.cat(tokens),
        lengths=torch.tensor([len(row) for row in tokens]),
        prompt_lengths=torch.tensor([len(prompt.token_ids) for prompt, _ in pairs]),
        rollout_logprobs=torch.cat(theirs).float(),
        advantages=torch.zeros(len(pairs)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--first-ids", type=int, default=300, help="prompts are of ids below this")
    args = parser.parse_args()
    models = {exact: ModelConfig(args.model, Precision.bf16, fp32_logits=exact) for exact in (False, True)}
    one = ParallelConfig()
    with tempfile.TemporaryDirectory() as folder:
        batches = {exact: batch_of(sampled(models[exact], args, Path(folder) / str(exact))) for exact in models}
    parallel.initialize(one, seed=1)
    from nemo_dapo.megatron.policy import MegatronPolicy

    gaps: dict[str, dict[str, float]] = {}
    for scored, model in models.items():
        policy = MegatronPolicy(model, one, OptimizerConfig(), tokens_per_microbatch=4096, trainable=False)
        for served, batch in batches.items():
            apart = (policy.logprobs(batch) - batch.rollout_logprobs).abs()
            name = f"vLLM {'float32' if served else 'bfloat16'}, trainer {'float32' if scored else 'bfloat16'}"
            gaps[name] = {"mean": float(apart.sum()) / batch.num_response_tokens, "largest": float(apart.max())}
            print(f"{name}: mean {gaps[name]['mean']:.2e}, largest {gaps[name]['largest']:.2e}", flush=True)
    parallel.shut_down()
    print(json.dumps(gaps))


if __name__ == "__main__":
    main()
