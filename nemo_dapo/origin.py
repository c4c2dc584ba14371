"""The model that a run started from: what its checkpoints say of it, by which a resume with another one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_dapo import hf_folder
from nemo_dapo.checkpoint import has_weights_alone
from nemo_dapo.config import ModelConfig
from nemo_dapo.config.schema import LoraConfig


def adapters(lora: LoraConfig) -> dict[str, Any]:
    """What makes adapters what they are, by option; of a run without any its rank, 0."""
    found: dict[str, Any] = {"model.lora.rank": lora.rank}
    if not lora.rank:
        return found
    return found | {"model.lora.alpha": lora.alpha, "model.lora.target_modules": sorted(lora.target_modules)}


def require_same_model(state: Mapping[str, Any], model: ModelConfig) -> None:
    """Raises ValueError that names how the model that `state` was saved with differs from `model`, or what it trains."""
    precision = model.precision.value
    differing = hf_folder.differences(state["model"], hf_folder.fingerprint(Path(model.path)))
    differing += [f"model.precision {state['precision']} -> {precision}"] if state["precision"] != precision else []
    if differing:
        raise ValueError(
            f"the checkpoint of step {state['step']} is of another model than model.path={model.path}: "
            f"{'; '.join(differing)}; restore the model that the run started from, or start anew with another name= or "
            "checkpoint.resume=never"
        )
    require_same_adapters(state, model)


def require_same_adapters(state: Mapping[str, Any], model: ModelConfig) -> None:
    """Raises ValueError where `state` was saved with other adapters than `model` has, with some against none, or reverse.

    What a checkpoint holds of them has no meaning under another `alpha`, and no place under another rank.
    """
    if has_weights_alone(state) and model.lora.rank:
        raise ValueError(
            f"the checkpoint of step {state['step']} has weights alone, and model.lora.rank={model.lora.rank} trains "
            f"adapters beside those of model.path={model.path}, which stay as they are: name the folder that it was made "
            "of as model.path, with another name= or checkpoint.resume=never, or set model.lora.rank=0"
        )
    now = adapters(model.lora)
    saved = state.get("adapters", now)
    if differing := [
        f"{name} {saved[name]} -> {now[name]}" for name in saved if saved[name] != now.get(name, saved[name])
    ]:
        raise ValueError(
            f"the checkpoint of step {state['step']} is of other adapters: {'; '.join(differing)}; take the options of the "
            "run that wrote it, or start anew with another name= or checkpoint.resume=never"
        )
