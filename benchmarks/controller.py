"""What rank 0's own work costs, from a step's first byte to its packed micro-batches: `python benchmarks/controller.py`.

Stand-in servers, processes of their own, send frames of `wire` over real sockets, as vLLM's route does; everything on this
side is the product: `VLLMEngine`, `GroupSampler`, `make_batch`, `share_batch` to processes that stand for all but one of
`--replicas` data-parallel replicas, the plan, and rank 0's own micro-batches. Rewards are constant: reward workers make the
text of an answer, and judge it, in processes of their own. Lines say CPU seconds of this process, all threads, a stage; the
last line is JSON. `--scale 64` is the same with a 64th of the groups, for a quick look.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from nemo_dapo.algorithm import group_advantages
from nemo_dapo.batching import make_batch, minibatches, pack, plan_minibatches
from nemo_dapo.collected import Collected
from nemo_dapo.config import RolloutConfig
from nemo_dapo.coordination import share_batch
from nemo_dapo.garbage import no_full_collections
from nemo_dapo.hf_folder import ExpectedWeights
from nemo_dapo.rollout import wire
from nemo_dapo.rollout.engine import VLLMEngine
from nemo_dapo.rollout.weights.ledger import Ledger
from nemo_dapo.rollout.weights.send import Sender
from nemo_dapo.sampling import GroupSampler
from nemo_dapo.types import Prompt, Sample, SamplingParams, TrainBatch, Verdict
from tests.stand_in_server import StandInServers

VOCAB_SIZE = 150_000
PACE_SECONDS = 0.005  # between two rounds in which a server sends frames
BEAT_SECONDS = 0.005


# ---------------------------------------------------------------- the other side


def encoded_answer(tokens: int, seed: int) -> list[bytes]:
    """The chunks of one answer's body, a frame each, as uvicorn writes them."""
    random = np.random.default_rng(seed)
    ids: Any = random.integers(0, VOCAB_SIZE, tokens, np.int32)
    logprobs: Any = -random.random(tokens, np.float32)
    starts = range(0, tokens, wire.TOKENS_PER_FRAME)
    chunks = []
    for number, first in enumerate(starts):
        piece = slice(first, first + wire.TOKENS_PER_FRAME)
        if number + 1 < len(starts):
            frame = wire.encode(wire.TOKENS, number, first, ids[piece], logprobs[piece])
        else:
            frame = wire.encode_final(
                number, first, ids[piece], logprobs[piece], finish_reason="length", versions=[[0, 0, tokens]]
            )
        chunks.append(b"%x\r\n%b\r\n" % (len(frame), frame))
    chunks[-1] += b"0\r\n\r\n"
    return chunks


class Answers(asyncio.Protocol):
    """One connection of a stand-in server; `open_` holds what all of them have still to send."""

    def __init__(self, samples: list[list[bytes]], open_: deque[tuple[asyncio.Transport, Iterator[bytes]]]) -> None:
        self.samples, self.open, self.received = samples, open_, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n") + 4) >= 4:
            found = re.search(rb"(?i)content-length: (\d+)", self.received[:end])
            size = int(found[1]) if found else 0
            if len(self.received) < end + size:
                return
            is_sample = self.received.startswith(b"POST " + wire.ROUTE.encode())
            self.received = self.received[end + size :]
            if is_sample:
                self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                self.samples.append(self.samples.pop(0))
                self.open.append((self.transport, iter(self.samples[-1])))
            else:  # /metrics: the counter that proves progress
                said = b"vllm:generation_tokens_total{} %d\n" % time.monotonic_ns()
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))


def serve(ready: Connection, tokens: int, frames_per_second: float) -> None:
    """A server for ever: its open answers get a frame each in turn, at most so many a second (0: as fast as they go)."""
    asyncio.run(_serve(ready, [encoded_answer(tokens, seed) for seed in range(16)], frames_per_second))


async def _serve(ready: Connection, samples: list[list[bytes]], frames_per_second: float) -> None:
    open_: deque[tuple[asyncio.Transport, Iterator[bytes]]] = deque()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answers(samples, open_), "127.0.0.1", 0, backlog=8192)
    ready.send(server.sockets[0].getsockname()[1])
    due, before = 0.0, loop.time()
    while True:
        await asyncio.sleep(PACE_SECONDS)
        now = loop.time()
        # What a late round missed is not made up for: frames would come in heaps.
        due = min(due + (now - before) * frames_per_second, frames_per_second / 20) if frames_per_second else len(open_)
        before = now
        for _ in range(min(int(due), len(open_))):
            due -= 1
            transport, frames = open_.popleft()
            if transport.is_closing():
                continue
            if (frame := next(frames, None)) is not None:
                transport.write(frame)
                open_.append((transport, frames))


@contextlib.contextmanager
def stand_in_servers(count: int, tokens: int, frames_per_second: float) -> Iterator[list[str]]:
    """Addresses of `count` servers in processes of their own."""
    fork = multiprocessing.get_context("fork")
    processes, urls = [], []
    for _ in range(count):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=serve, args=(there, tokens, frames_per_second / count), daemon=True))
        processes[-1].start()
        urls.append(f"http://127.0.0.1:{here.recv()}")
    try:
        yield urls
    finally:
        for process in processes:
            process.kill()
            process.join()


# ---------------------------------------------------------------- this side


class Alternating:
    """In place of a rewarder: every other sample is right, or all are in the groups that are not to be informative."""

    def __init__(self, informative: float) -> None:
        self.informative, self.judged = informative, 0

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        self.judged += 1
        mixed = int(self.judged * self.informative) > int((self.judged - 1) * self.informative)
        return [Verdict(correct=i % 2 == 0 or not mixed) for i in range(len(samples))]


class Prompts:
    """In place of a data set."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.count = tokens, 0

    def next(self) -> Prompt:
        self.count += 1
        return Prompt(str(self.count), tuple(range(self.count, self.count + self.tokens)), "", "")


class Heart:
    """Beats in an event loop; the longest time between two beats is the longest time that the loop was blocked.

    `wall` holds what the clock says, `cpu` the CPU seconds of the loop's thread meanwhile: what is left of it where other
    processes take the cores.
    """

    def __init__(self) -> None:
        self.wall = self.cpu = self.thread_seconds = 0.0

    async def beat(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(BEAT_SECONDS)
            self.wall = max(self.wall, time.perf_counter() - wall - BEAT_SECONDS)
            self.thread_seconds = time.thread_time()
            self.cpu = max(self.cpu, self.thread_seconds - cpu)


class Stages:
    """CPU seconds of the process, all threads, and wall seconds, a stage."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.system: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cpu, system, wall = time.process_time(), os.times().system, time.perf_counter()
        yield
        self.cpu[name], self.wall[name] = time.process_time() - cpu, time.perf_counter() - wall
        self.system[name] = os.times().system - system


def engine_for(urls: list[str], args: argparse.Namespace) -> VLLMEngine:
    config = RolloutConfig(
        num_servers=len(urls),
        max_prompt_length=args.prompt_tokens,
        max_response_length=args.tokens,
        max_concurrent_sequences=args.in_flight // len(urls),
    )
    servers: Any = StandInServers(*urls)
    ledger, sender = Ledger(servers.places, "float32"), Sender(lambda: ExpectedWeights({}))
    return VLLMEngine(config, servers, ledger, sender, [VOCAB_SIZE - 1], VOCAB_SIZE)


async def rollout(
    engine: VLLMEngine, args: argparse.Namespace, hearts: list[Heart], stages: Stages
) -> tuple[Collected, TrainBatch]:
    """One step's groups and batch, as the controller has them, with a heart in both event loops: the engine's and its."""
    sampler = GroupSampler(
        engine,
        Alternating(args.informative),
        Prompts(args.prompt_tokens),  # type: ignore[arg-type]
        group_size=args.group,
        params=SamplingParams(max_tokens=args.tokens),
        dynamic_sampling=args.informative < 1,
    )
    beats: list[Future[None] | asyncio.Task[None]] = [
        engine.loop.submit(hearts[0].beat()),
        asyncio.create_task(hearts[1].beat()),
    ]
    try:
        with stages("receive and judge"), no_full_collections():
            collected = await sampler.collect(args.groups)
        scores = torch.tensor([[float(v.correct) for v in g.verdicts] for g in collected.groups])
        with stages("make_batch"):
            return collected, await asyncio.to_thread(make_batch, collected.groups, group_advantages(scores))
    finally:
        for beat in beats:
            beat.cancel()


# ---------------------------------------------------------------- the other ranks


@contextlib.contextmanager
def other_ranks(args: argparse.Namespace) -> Iterator[None]:
    """A gloo job of this process, rank 0, and others, each of which receives the shares of several replicas."""
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=receive, args=(folder, rank, args), daemon=True) for rank in range(1, args.ranks + 1)
        ]
        for process in ranks:
            process.start()
        join(folder, 0, args)
        try:
            yield
        finally:
            dist.destroy_process_group()
            for process in ranks:
                process.kill()
                process.join()


def join(folder: str, rank: int, args: argparse.Namespace) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks + 1)


def receive(folder: str, rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    join(folder, rank, args)
    share(None, args)


def share(batch: TrainBatch | None, args: argparse.Namespace) -> TrainBatch:
    """A rank's part of rank 0's batch, once all others have theirs."""
    part = share_batch(batch, None, range(args.ranks + 1), functools.partial(owners, args=args))
    dist.barrier()
    return part


def owners(lengths: Tensor, args: argparse.Namespace) -> Tensor:
    """Replica 0 is rank 0's, the others go round the ranks that stand for them."""
    owner = torch.empty(lengths.numel(), dtype=torch.int64)
    for replica, microbatches in enumerate(planned(lengths, args)):
        owner[[i for sequences in microbatches for i in sequences]] = 1 + (replica - 1) % args.ranks if replica else 0
    return owner


def planned(lengths: Tensor, args: argparse.Namespace) -> list[list[list[int]]]:
    """The plan of 16 mini-batches, the paper's number."""
    return plan_minibatches(
        lengths,
        minibatches(lengths.numel(), -(-lengths.numel() // 16), 1),
        max_tokens=args.prompt_tokens + args.tokens,
        hidden_size=5120,
        data_parallel_size=args.replicas,
    )


def packed(part: TrainBatch, args: argparse.Namespace) -> int:
    """Plan all of it and pack this rank's own, as each rank does; returns the number of micro-batches."""
    return len([pack(part, sequences) for sequences in planned(part.lengths, args)[0]])


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=512, help="N")
    parser.add_argument("--group", type=int, default=16, help="G")
    parser.add_argument("--tokens", type=int, default=20480, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--in-flight", type=int, default=8192, help="samples, over all servers")
    parser.add_argument("--frames-per-second", type=float, default=8000, help="of all servers; 0: as fast as they go")
    parser.add_argument(
        "--informative", type=float, default=1.0, help="share of the groups; below 1 others are dropped"
    )
    parser.add_argument("--replicas", type=int, default=128, help="data-parallel ones")
    parser.add_argument("--ranks", type=int, default=8, help="processes that receive the other replicas' shares")
    parser.add_argument("--scale", type=int, default=1, help="divide groups, samples in flight and replicas by it")
    args = parser.parse_args()
    for name in ("groups", "in_flight", "replicas"):
        setattr(args, name, max(getattr(args, name) // args.scale, 1))
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    stages, hearts = Stages(), [Heart(), Heart()]
    with (
        other_ranks(args),
        stand_in_servers(args.servers, args.tokens, args.frames_per_second) as urls,
        engine_for(urls, args) as engine,
    ):
        asyncio.run(engine.upkeep.look(0))  # what this imports, the start of real servers would have imported
        before = psutil.Process().memory_info().rss / 2**30
        collected, batch = asyncio.run(rollout(engine, args, hearts, stages))
        tokens, kept, dropped = collected.generated_tokens, len(collected.groups), len(collected.dropped)
        del collected  # as the trainer does, which keeps the prompts' names alone
        with stages("share"):
            batch = share(batch, args)
        with stages("plan and pack"):
            microbatches = packed(batch, args)

    print(f"{kept} groups kept, {dropped} dropped; {microbatches} micro-batches on rank 0")
    for name, cpu in stages.cpu.items():
        wall, system = stages.wall[name], stages.system[name]
        print(f"{name:20} {cpu:8.2f} s CPU, {system:.2f} s of it in the kernel, {wall:8.2f} s wall")
    print(f"{'  engine loop':20} {hearts[0].thread_seconds:8.2f} s CPU")
    for name, heart in zip(("engine", "sampler"), hearts, strict=True):
        print(f"{name} loop blocked for at most {1e3 * heart.wall:.0f} ms, {1e3 * heart.cpu:.0f} ms of it at work")
    print(f"memory {before:.2f} GiB before, {peak_gib():.2f} GiB at most")
    print(
        json.dumps(
            {
                "cpu_seconds": round(sum(stages.cpu.values()), 2),
                "peak_gib": round(peak_gib(), 2),
                "bytes_per_token": round(sum(map(len, encoded_answer(args.tokens, 0))) / args.tokens, 2),
                "longest_block_ms": round(1e3 * max(heart.wall for heart in hearts), 1),
                "tokens": tokens,
            }
        )
    )


if __name__ == "__main__":
    main()
