"""What the test of a mixture in vLLM runs in a process of its own: `main(FOLDER)` serves one model, then another's weights.

Prints a line of JSON: the largest gap to Hugging Face's log-probabilities at the start, and after each of two updates.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
}
PROMPT = [*range(20, 140, 7)]


def expected(folder: Path) -> list[float]:
    """Log-probability of each token of PROMPT but the first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=torch.tensor([PROMPT])).logits[0], -1)
    picked: list[float] = scores[range(len(PROMPT) - 1), PROMPT[1:]].tolist()
    return picked


def served(llm: Any) -> list[float]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)]


def update(llm: Any, folder: Path) -> None:
    from safetensors.torch import load_file
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from nemo_dapo.rollout.vllm_weights import repack_experts, repack_tied_output

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model = worker.model_runner.model
    initialize_layerwise_reload(model)
    model.load_weights(load_file(folder / "model.safetensors").items())
    finalize_layerwise_reload(model, llm.llm_engine.model_config)
    repack_tied_output(model)
    repack_experts(model)


def main(folder: Path) -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "max_num_seqs": 8}
    llm = LLM(str(folder / "one"), skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    gaps = {}
    for name, model in (("loaded", "one"), ("updated", "other"), ("updated again", "one")):
        if name != "loaded":
            update(llm, folder / model)
        gaps[name] = max(abs(a - b) for a, b in zip(served(llm), expected(folder / model), strict=True))
    print(json.dumps(gaps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
