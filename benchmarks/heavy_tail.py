"""A task of heavy-tailed answers: the demo's sums, by a learner who writes the columns down before adding them, many times.

    python benchmarks/heavy_tail.py --output build/tasks/tail

An answer begins with copies of one line, the digits of each column from the right behind the letter of the answer's way,
and ends as the demo's:

    b25703809
    b25703809
    2+5+0=07
    …
    Answer: 10177

Of each way the number of lines is geometric, with a mean of its own: together a mixture whose tail is heavy, about 25 to
1,000 tokens with a median of 60. Right or wrong is what the sum is, and that comes last: who samples ahead has it written
under the newest weights of the answer. The digits stand a line above, always as far, so a small model finds them however
long the answer is.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.demo import prepare  # noqa: E402
from nemo_dapo.data.formats.arithmetic import Sum, generate  # noqa: E402

QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class Way:
    """How often it is chosen, and the mean number of its lines."""

    letter: str
    share: float
    lines: float


@dataclass(frozen=True)
class HeavyTail(prepare.Recipe):
    """The demo's recipe with such answers."""

    ways: tuple[Way, ...] = (Way("a", 0.6, 2.0), Way("b", 0.25, 7.0), Way("c", 0.15, 30.0))
    max_response: int = 1024
    max_positions: int = 1056
    pass_tokens: int = 2048
    first_steps: int = 800
    first_lr: float = 3e-3
    steps: int = 250
    lr: float = 1e-3
    miscount: float = 0.0

    @property
    def stages(self) -> list[prepare.Recipe]:
        """First the sums, on answers of a line or two, of which an update takes a third of the time; then the lengths."""
        short = tuple(replace(way, lines=1.5) for way in self.ways)
        return [replace(self, ways=short, steps=self.first_steps, lr=self.first_lr), self]

    def response(self, one: Sum, rng: random.Random) -> str:
        """One that would be cut is drawn again."""
        while True:
            text = self.written_down(one, rng) + super().response(one, rng)
            if len(text) < self.max_response:  # a token a character, and the end
                return text

    def written_down(self, one: Sum, rng: random.Random) -> str:
        (way,) = rng.choices(self.ways, [way.share for way in self.ways])
        lines = 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / way.lines))
        return f"{way.letter}{columns(one, self.max_digits)}\n" * lines

    @property
    def sources(self) -> list[str]:
        return [*super().sources, __file__]


def columns(one: Sum, digits: int) -> str:
    """Both operands' digits of each column, from the right: 2570 of 72+5."""
    a, b = (str(number).zfill(digits)[::-1] for number in (one.a, one.b))
    return "".join(map("".join, zip(a, b, strict=True)))


def recipe() -> HeavyTail:
    """On the demo's problems."""
    demo = prepare.recipe_of("demo", seed=0)
    return HeavyTail(template=demo.template, max_digits=demo.max_digits)


def quantiles(lengths: list[int]) -> list[int]:
    return [sorted(lengths)[min(int(q * len(lengths)), len(lengths) - 1)] for q in QUANTILES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "tasks" / "tail")
    parser.add_argument("--count", type=int, default=128, help="of answers that are sampled and measured")
    args = parser.parse_args()
    torch.set_num_threads(2)
    tail = recipe()
    prepare.prepare(args.output, tail)
    model: Any = AutoModelForCausalLM.from_pretrained(args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    problems = generate(args.count, 1, tail.max_digits, "eval")
    answers = prepare.sample(model, [prepare.prompt_ids(one, tokenizer, tail) for one in problems], tail.max_response)
    print(f"tokens of an answer, quantiles {QUANTILES}: {quantiles([len(ids) + 1 for ids in answers])}")


if __name__ == "__main__":
    main()
