"""Sums of two integers with a worked solution: the demo's problems, generated, never downloaded.

A problem is `372+9805=?`; its solution adds column by column from the right, each line `digit+digit+carry=carry digit`,
with one more line for a carry that is left over:

    2+5+0=07
    7+0+0=07
    3+8+0=11
    0+9+1=10
    0+0+1=01
    Answer: 10177

The last line is what `nemo_dapo.rewards.math.verify` reads. Four digits need at most 60 characters.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from nemo_dapo.config import DataSetConfig
from nemo_dapo.data.problem import Problem

Split = Literal["train", "eval"]

OPTIONS = frozenset({"split", "num_problems", "seed", "max_digits"})
EVAL_SHARE = 8  # one problem in so many is held out


@dataclass(frozen=True)
class Sum:
    """The problem a + b; a, b >= 0."""

    a: int
    b: int

    @property
    def problem(self) -> str:
        return f"{self.a}+{self.b}=?"

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def solution(self) -> str:
        return worked_solution(self.a, self.b)

    @property
    def split(self) -> Split:
        """The half of the world this problem belongs to, whatever the seed; a + b and b + a go together."""
        low, high = sorted((self.a, self.b))
        digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
        return "eval" if int.from_bytes(digest[:8], "big") % EVAL_SHARE == 0 else "train"


def problems(config: DataSetConfig) -> Iterator[Problem]:
    """The sums that `config` asks for; its `split` is train or eval."""
    for item in generate(config.num_problems, config.seed, config.max_digits, _split(config.split)):
        yield Problem(item.problem, item.answer, source="arithmetic")


def worked_solution(a: int, b: int) -> str:
    """The column-by-column scratchpad of a + b, ending in `Answer: <sum>`."""
    return _scratchpad(a, b, carried=lambda carry: carry, summed=lambda total: total)


def imperfect_solution(a: int, b: int, rng: random.Random, *, forget_carry: float, miscount: float) -> str:
    """The scratchpad of a + b by a learner who sometimes forgets to carry and now and then miscounts by one.

    A carry of 1 is forgotten with probability `forget_carry`, a column miscounted with `miscount`; all that follows is
    right given what was written. So problems without a carry are easy, and each carry halves the chance, say: difficulty
    is mixed, and what there is to learn is one habit rather than every cell of the addition table.
    """

    def carried(carry: int) -> int:
        return 0 if rng.random() < forget_carry else carry

    def summed(total: int) -> int:
        return max(total + rng.choice((-1, 1)), 0) if rng.random() < miscount else total

    return _scratchpad(a, b, carried=carried, summed=summed)


def _scratchpad(a: int, b: int, *, carried: Callable[[int], int], summed: Callable[[int], int]) -> str:
    lines, digits, carry = [], [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        left, right = (a // 10**place) % 10, (b // 10**place) % 10
        carry = carried(carry)
        total = summed(left + right + carry)
        lines.append(f"{left}+{right}+{carry}={total:02d}")
        digits.append(total % 10)
        carry = total // 10
    if carried(carry):
        lines.append("0+0+1=01")
        digits.append(1)
    # The answer reads the lines' last digits upwards, in every case: a rule that a small model learns in a minute.
    return "\n".join([*lines, f"Answer: {''.join(map(str, reversed(digits)))}"])


def generate(num_problems: int, seed: int, max_digits: int, split: Split = "train") -> list[Sum]:
    """`num_problems` different sums of `split`, the same for the same arguments.

    The number of digits of each operand is uniform on 1..max_digits, so that difficulty is mixed. Train and eval
    problems are disjoint for any two seeds, because a problem's split follows from its text. Raises ValueError when
    there are not so many different problems.
    """
    if max_digits < 1 or num_problems < 1:
        raise ValueError(
            f"arithmetic data needs max_digits >= 1 and num_problems >= 1, got max_digits={max_digits}, "
            f"num_problems={num_problems}: set both in the data set's configuration"
        )
    rng = random.Random(f"{seed} {split}")
    found: dict[Sum, None] = {}
    max_draws = 200 * num_problems + 10_000  # a small space runs out of new problems
    for _ in range(max_draws):
        problem = Sum(_operand(rng, max_digits), _operand(rng, max_digits))
        if problem.split == split:
            found.setdefault(problem)
        if len(found) == num_problems:
            return list(found)
    raise ValueError(
        f"num_problems={num_problems} asks for more different {split} sums than max_digits={max_digits} gives: "
        f"{len(found)} were found; lower num_problems or raise max_digits"
    )


def _split(name: str) -> Split:
    for split in get_args(Split):
        if name == split:
            return split
    raise ValueError(f"split={name!r} of arithmetic data must be train or eval (the problems held out of any training)")


def _operand(rng: random.Random, max_digits: int) -> int:
    digits = rng.randint(1, max_digits)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)
