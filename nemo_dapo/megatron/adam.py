"""The AdamW of a host without Transformer Engine and apex, whose state Megatron-core's checkpoints can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer


class GroupStepAdamW(torch.optim.AdamW):
    """AdamW that keeps `step` in the parameter group, as apex's and Transformer Engine's fused Adam do.

    torch keeps one step a parameter. Megatron-core's parameter-wise checkpoint format treats every entry of a parameter's
    state as a tensor of the parameter's size and fails on load (`KeyError: 'step'`); its `state_dict` still asks torch's
    AdamW for the parameters' steps, so they are put in for the time of a step and of a `state_dict`.
    """

    def step(self, closure: Any = None) -> Any:
        self._put_steps_in()
        loss = super().step(closure)
        self._take_steps_out()
        return loss

    def state_dict(self) -> dict[str, Any]:
        self._allocate_moments()
        self._put_steps_in()
        state = super().state_dict()
        state["state"] = {i: dict(entries) for i, entries in state["state"].items()}
        self._take_steps_out()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._take_steps_out()

    def _allocate_moments(self) -> None:
        # Before the first step torch has no state: a fresh optimizer, which a resumed run loads into, would have no step.
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state.get(parameter):
                    self.state[parameter] = {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}

    def _put_steps_in(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state.get(parameter):
                    self.state[parameter]["step"] = torch.tensor(float(group.get("step", 0)))

    def _take_steps_out(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if "step" in self.state.get(parameter, {}):
                    group["step"] = int(self.state[parameter].pop("step"))


@contextmanager
def step_kept_in_the_group() -> Iterator[None]:
    """Inside, where Megatron-core falls back to torch's AdamW, it builds this one; with fused Adams nothing changes."""
    plain = torch.optim.AdamW
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        torch.optim.AdamW = GroupStepAdamW  # type: ignore[misc]
    try:
        yield
    finally:
        torch.optim.AdamW = plain  # type: ignore[misc]
