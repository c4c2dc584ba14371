"""The reward of the end-to-end runs: a random model is never right, so something else must be, about half of the time."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nemo_dapo.types import Prompt


def even_length(prompt: Prompt, response: str) -> bool:
    """Right for about every second response.

    A file `hold` in the folder $HOLD_FOLDER says in which step the rollout shall stand still, and `held` that it does.
    """
    folder = Path(os.environ.get("HOLD_FOLDER", os.devnull))
    while (folder / "hold").exists() and _steps_done(folder) + 1 >= int((folder / "hold").read_text()):
        (folder / "held").touch()
        time.sleep(0.05)
    return len(response.encode()) % 2 == 0


def _steps_done(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
