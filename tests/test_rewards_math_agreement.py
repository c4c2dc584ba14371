"""A tenth of `benchmarks/agreement.py`: no generated wrong answer is paid, no generated right one refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from agreement import Suite, suites


@pytest.mark.parametrize("suite", suites(0.1, seed=1), ids=lambda suite: suite.name)
def test_generated_answers_are_judged_rightly(suite: Suite) -> None:
    assert len(suite.cases) > 50
    assert not suite.run().failures, str(suite)
    assert not suite.errors
