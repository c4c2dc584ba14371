"""Tokens a second through `VLLMEngine` by either route, and seconds a weight update: `python benchmarks/rollout.py`.

Builds a model of about 0.8 M parameters and samples groups of it as a training step does: in each round, each shape by our
route and by vLLM's own JSON route, in turn, so that both meet the same machine. Every answer has its full length. The CPU
time of the servers beside the wall time tells a busy machine from a slow route. The last line is JSON: medians over the
rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from nemo_dapo.config import Precision, RolloutConfig
from nemo_dapo.rollout import client
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.types import Prompt, SamplingParams
from tests.tiny import save_tiny_model

CPU_OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 256}
GROUP = 16
ROUTES = {"frames": True, "json": False}


@dataclass(frozen=True)
class Shape:
    """So many samples of so many tokens."""

    samples: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> Shape:
        samples, _, tokens = text.partition("x")
        return cls(int(samples), int(tokens))

    def __str__(self) -> str:
        return f"{self.samples}x{self.tokens}"


def server_cpu_seconds(engine: VLLMEngine) -> float:
    """CPU time of all processes of all servers so far."""
    guardians = [psutil.Process(s.pid) for s in engine.servers.servers if s.pid]
    times = [p.cpu_times() for guardian in guardians for p in guardian.children(recursive=True)]
    return sum(t.user + t.system for t in times)


def never_stop(engine: VLLMEngine) -> None:
    """Let every answer run to its greatest length: both routes then send the same number of tokens."""
    request_body = client.request_body

    def endless(prompt: Prompt, params: SamplingParams, stops: list[int], priority: int | None = None) -> bytes:
        body = json.loads(request_body(prompt, params, [], priority))
        body["sampling_params"]["ignore_eos"] = True
        return json.dumps(body).encode()

    client.request_body = endless  # type: ignore[assignment]
    engine.requests.stop_token_ids = []


def use_route(engine: VLLMEngine, has_frames: bool) -> None:
    engine.upkeep.asked = [dataclasses.replace(asked, has_frames=has_frames) for asked in engine.upkeep.asked]


async def rollout(engine: VLLMEngine, shape: Shape) -> None:
    """Sample groups of `GROUP` at once."""
    params = SamplingParams(max_tokens=shape.tokens)
    prompts = [Prompt(str(i), tuple(range(40 + i, 72 + i)), "", "") for i in range(shape.samples // GROUP)]
    groups = await asyncio.gather(*(engine.generate(prompt, GROUP, params) for prompt in prompts))
    assert sum(len(sample.token_ids) for group in groups for sample in group) == shape.samples * shape.tokens


def measure(engine: VLLMEngine, shape: Shape, route: str) -> float:
    """Tokens a second."""
    use_route(engine, ROUTES[route])
    begin, cpu = time.perf_counter(), server_cpu_seconds(engine)
    asyncio.run(rollout(engine, shape))
    wall, cpu = time.perf_counter() - begin, server_cpu_seconds(engine) - cpu
    tokens = shape.samples * shape.tokens
    print(
        f"  {shape} {route:6}: {wall:6.2f} s = {tokens / wall:6.0f} tokens/s, {tokens / cpu:6.0f} a CPU second",
        flush=True,
    )
    return tokens / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Shape.of, nargs="+", default=[Shape(64, 1024), Shape(256, 64)], metavar="SxT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--vllm", type=json.loads, default={}, help="more of rollout.vllm, as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model(Path(folder) / "model", layers=5, hidden=128, rope_theta=500000.0, max_positions=2048)
        model = AutoModelForCausalLM.from_pretrained(path)
        config = RolloutConfig(
            num_servers=args.servers,
            max_prompt_length=64,
            max_response_length=max(shape.tokens for shape in args.shapes),
            vllm={**CPU_OPTIONS, **args.vllm},
        )
        started, tokenizer = time.perf_counter(), AutoTokenizer.from_pretrained(path)
        with VLLMEngine.start(config, path, Precision.fp32, Path(folder), tokenizer, seed=0) as engine:
            print(f"start {time.perf_counter() - started:.1f} s, {model.num_parameters() / 1e6:.2f} M parameters")
            never_stop(engine)
            asyncio.run(rollout(engine, Shape(GROUP, 8)))  # what the first request alone pays
            updates: list[float] = []
            speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
            for version in range(1, args.rounds + 1):
                begin = time.perf_counter()
                engine.update_weights(model.named_parameters(), version)
                updates.append(time.perf_counter() - begin)
                print(f"round {version}: update {updates[-1]:.3f} s", flush=True)
                for shape in args.shapes:
                    for route in sorted(ROUTES, reverse=bool(version % 2)):  # each route first in half of the rounds
                        speeds[str(shape), route].append(measure(engine, shape, route))
    result: dict[str, Any] = {"update_seconds": round(median(updates), 3), "rounds": args.rounds}
    for shape in map(str, args.shapes):
        medians = {route: round(median(speeds[shape, route])) for route in ROUTES}
        result[shape] = {**medians, "ratio": round(medians["frames"] / medians["json"], 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
