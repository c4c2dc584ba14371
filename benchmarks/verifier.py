"""Throughput and latency of the math verifier in a RewardPool: `python benchmarks/verifier.py [--workers 2]`.

Prints samples a second on the GSM8K model solutions and on MATH-like LaTeX answers (made here: one sixth of each group is
the truth in another spelling, the rest are other values), and the latency of single items with the hostile corpus mixed in.
"""
# ruff: noqa: E501

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path

from nemo_dapo.rewards.pool import RewardPool
from nemo_dapo.types import Prompt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hostile_answers import TRUTH, hostile_responses  # noqa: E402

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
Groups = list[tuple[Prompt, list[str]]]
LATEX_FORMS = [
    r"\frac{%d}{%d}", r"%d\sqrt{%d}", r"\frac{%d+\sqrt{%d}}{2}", r"(%d, %d)", r"\left[%d, %d\right)", r"%dx^2+%dx", r"\frac{%d\pi}{%d}",
    r"x=%d, y=%d", r"\begin{pmatrix} %d & 1 \\ 0 & %d \end{pmatrix}", r"\{%d, %d\}", r"%d-%di", r"%d^\circ %d'", r"%d%d", r"%d,%03d",
]  # fmt: skip


def prompt(truth: str) -> Prompt:
    return Prompt(uid="u", token_ids=(), problem="", ground_truth=truth)


def gsm8k_groups() -> Groups:
    lines = (ROOT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        (
            prompt(row["ground_truth"].rpartition("A:")[2].strip()),
            [row[m]["solution"].replace("\nA:", "\nAnswer:") for m in MODELS] * 4,
        )
        for row in rows
    ]


def latex_groups(count: int = 1000) -> Groups:
    draw = random.Random(0)
    steps = "We compute $\\frac{a}{b}+\\sqrt{c}$ and so on. " * 40
    groups = []
    for _ in range(count):
        form = draw.choice(LATEX_FORMS)
        values = [(draw.randint(2, 99), draw.randint(2, 99)) for _ in range(16)]
        answers = [(form % value).replace(r"\frac", draw.choice([r"\frac", r"\dfrac"])) for value in values]
        groups.append((prompt(form % values[0]), [f"{steps}\n\\boxed{{{answer}}}" for answer in answers]))
    return groups


def throughput(pool: RewardPool, name: str, groups: Groups) -> None:
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        verdicts = pool.score_all(groups)
        rates.append(sum(map(len, verdicts)) / (time.perf_counter() - start))
    print(f"{name}: {len(groups)} groups, samples/s (3 rounds): {', '.join(f'{rate:,.0f}' for rate in rates)}")


def latency(pool: RewardPool, groups: Groups) -> None:
    """Latency from submission to verdict of single responses, 32 in flight, a third of them hostile."""
    ordinary = [(p, [text]) for p, texts in groups for text in texts[:1]]
    hostile = [(prompt(TRUTH), [text]) for text in hostile_responses()]
    items = ordinary[: 2 * len(hostile)] + hostile
    random.Random(0).shuffle(items)
    taken: list[float] = []

    async def run() -> None:
        slots = asyncio.Semaphore(32)

        async def one(p: Prompt, texts: list[str]) -> None:
            async with slots:
                start = time.perf_counter()
                await pool.score_texts(p, texts)
                taken.append(time.perf_counter() - start)

        await asyncio.gather(*(one(*item) for item in items))

    asyncio.run(run())
    taken.sort()
    p50, p99 = taken[len(taken) // 2], taken[int(0.99 * len(taken))]
    print(
        f"latency, {len(items)} items, 32 in flight: p50 {1e3 * p50:.1f} ms, p99 {1e3 * p99:.0f} ms, max {1e3 * taken[-1]:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    with RewardPool("nemo_dapo.rewards.math:verify", workers=parser.parse_args().workers) as pool:
        gsm8k = gsm8k_groups()
        throughput(pool, "GSM8K solutions", gsm8k)
        throughput(pool, "MATH-like LaTeX", latex_groups())
        for worker in list(pool._live):
            worker.abort()
        throughput(pool, "GSM8K solutions, every worker just killed", gsm8k)
        latency(pool, gsm8k)
        print(f"counts: {dict(pool.counts)}")


if __name__ == "__main__":
    main()
