"""Generated tokens a second through `VLLMEngine`, and seconds a weight update: `python benchmarks/rollout.py [--help]`.

Builds a model of about 0.8 M parameters, samples groups of it as a training step does, and prints one line a round. The
CPU time beside the wall time tells a busy machine from a slow setting.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.types import Prompt, SamplingParams
from tests.tiny import save_tiny_model

CPU_OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 256}


def server_cpu_seconds(engine: VLLMEngine) -> float:
    """CPU time of all processes of all servers so far."""
    guardians = [psutil.Process(s.process.pid) for s in engine.servers.servers if s.process]
    times = [p.cpu_times() for guardian in guardians for p in guardian.children(recursive=True)]
    return sum(t.user + t.system for t in times)


async def rollout(engine: VLLMEngine, prompts: int, group: int, max_tokens: int) -> int:
    """Sample `prompts` groups of `group` at once; returns the number of tokens."""
    params = SamplingParams(max_tokens=max_tokens)
    tasks = [
        engine.generate(Prompt(str(i), tuple(range(40 + i, 72 + i)), "", ""), group, params) for i in range(prompts)
    ]
    return sum(len(sample.token_ids) for group in await asyncio.gather(*tasks) for sample in group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--vllm", type=json.loads, default={}, help="more of rollout.vllm, as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model(Path(folder) / "model", layers=5, hidden=128, rope_theta=500000.0)
        model = AutoModelForCausalLM.from_pretrained(path)
        config = RolloutConfig(
            num_servers=args.servers,
            max_prompt_length=64,
            max_response_length=args.max_tokens,
            vllm={**CPU_OPTIONS, **args.vllm},
        )
        started = time.perf_counter()
        with VLLMEngine.start(
            config, path, Precision.fp32, Path(folder), AutoTokenizer.from_pretrained(path), seed=0
        ) as engine:
            print(f"start {time.perf_counter() - started:.1f} s, {model.num_parameters() / 1e6:.2f} M parameters")
            for version in range(1, args.rounds + 1):
                begin = time.perf_counter()
                engine.update_weights(model.named_parameters(), version)
                synced, cpu = time.perf_counter(), server_cpu_seconds(engine)
                tokens = asyncio.run(rollout(engine, args.prompts, args.group, args.max_tokens))
                wall = time.perf_counter() - synced
                print(
                    f"round {version}: update {synced - begin:.3f} s, {tokens} tokens in {wall:.2f} s = "
                    f"{tokens / wall:.0f} tokens/s, {tokens / (server_cpu_seconds(engine) - cpu):.0f} tokens per CPU second"
                )


if __name__ == "__main__":
    main()
