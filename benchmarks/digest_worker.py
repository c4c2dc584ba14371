"""An extension of vLLM's workers that tells what bytes its parameters have: `rollout.vllm.worker_extension_cls`."""

from __future__ import annotations

from typing import Any

import torch
import xxhash


class Digest:
    """Beside vLLM's own worker class, whose model it reads."""

    model_runner: Any

    def parameter_digest(self) -> str:
        """Of all parameters and buffers by name, in the layout that the kernels read."""
        digest = xxhash.xxh3_128()
        for name, value in sorted(self.model_runner.get_model().state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
