"""Ten updates against Hugging Face's model under PyTorch's AdamW: gradient, clipping, decay and schedule together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adamw_scenarios import LAYOUTS
from tests.child import run_module
from tests.parallel_matrix import distance


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adamw")
    run_module("adamw_scenarios", folder)
    return {ranks: torch.load(folder / f"world{ranks}.pt") for ranks in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "model"), [(ranks, model) for ranks in LAYOUTS for model in LAYOUTS[ranks]])
def test_ten_updates_are_those_of_a_plain_loop(results: dict[int, dict[str, Any]], ranks: int, model: str) -> None:
    ours, plain = results[ranks][model], results[1][f"{model}, plain"]
    assert ours["weights"].keys() >= plain["weights"].keys()
    weights = {name: ours["weights"][name] for name in plain["weights"]}
    assert distance(weights, plain["weights"]) < 1e-5
    for name, weight in plain["weights"].items():  # no small tensor hides in the sum
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-3, atol=2e-5, msg=f"{name}: {{}}".format)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    assert min(plain["norms"]) > 0.05  # every gradient is clipped
