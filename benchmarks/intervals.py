"""How often the 95 % interval of avg@n covers the truth: sets of N problems drawn again and again from a known population.

    python benchmarks/intervals.py [--trials 4000] [--samples 32]

A problem's success rate is drawn from a Beta distribution, n samples of it by that rate; the truth is the Beta's mean.
Student's t quantile stands beside the normal one that it replaced.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import numpy as np

from nemo_dapo import evaluation

SHAPES = {"uniform": (1.0, 1.0), "skewed": (0.5, 1.5), "very skewed": (0.3, 3.0), "all or nothing": (0.1, 0.1)}
NORMAL = 1.959964


def coverage(problems: int, samples: int, shape: tuple[float, float], trials: int, rng: np.random.Generator) -> float:
    """The share of `trials` sets whose interval holds the population's mean."""
    a, b = shape
    rates = rng.beta(a, b, (trials, problems))
    values = rng.binomial(samples, rates) / samples
    intervals = [evaluation.estimate(row.tolist(), samples) for row in values]
    return float(np.mean([one.low <= a / (a + b) <= one.high for one in intervals]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    print(f"n = {arguments.samples}, {arguments.trials} trials each; standard error of a coverage about 0.004")
    for problems in (10, 30, 100):
        for name, shape in SHAPES.items():
            rng = np.random.default_rng(0)
            student = coverage(problems, arguments.samples, shape, arguments.trials, rng)
            with patch.object(evaluation, "stdtrit", lambda degrees, p: NORMAL):
                rng = np.random.default_rng(0)
                normal = coverage(problems, arguments.samples, shape, arguments.trials, rng)
            print(f"N = {problems:3}  {name:14}  t {student:.3f}  normal {normal:.3f}", flush=True)


if __name__ == "__main__":
    main()
