"""How good a model is: avg@k, pass@k and maj@k of a Hugging Face folder, or of a training checkpoint, on problem sets.

    python examples/evaluate.py model.path=<folder> benchmark=[aime24,aime25,math500]
    python examples/evaluate.py model.path=<folder> 'data.eval.mine={format: columns, path: mine.jsonl}'
    python examples/evaluate.py model.path=<folder> evaluation.checkpoint=runs/<name>/checkpoints/step_000100 …

Prints one line a set; writes `summary.json` and, a line a problem, `problems.jsonl` under `output_dir`, or where an earlier
evaluation lies there, under `output_dir`_2, _3 and so on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from nemo_dapo import config as schema
from nemo_dapo import entry
from nemo_dapo.config import RunConfig
from nemo_dapo.data.check import check_data
from nemo_dapo.ending import Ending

if TYPE_CHECKING:
    from nemo_dapo.evaluation import EvaluationResult
    from nemo_dapo.rollout.engine import VLLMEngine

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "evaluate.yaml"


def check(config: RunConfig) -> None:
    """Raises ValueError for options that contradict each other, or where a model or a set to evaluate is missing."""
    schema.validate_evaluation(config, entry.world_size())
    check_data(replace(config.data, train={}))
    if config.evaluation.checkpoint:
        entry.require("megatron.core", "megatron.bridge")


def load_checkpoint(config: RunConfig, engine: VLLMEngine) -> None:
    """Give the servers, which started on model.path, the weights of a training checkpoint of any parallel layout.

    One process loads its weights: for models beyond one device use the run's exported `trained/` folder.
    Raises ValueError for a damaged one and for one of another model or other adapters.
    """
    from nemo_dapo import checkpoint, origin
    from nemo_dapo.megatron import parallel
    from nemo_dapo.rollout import sharing
    from nemo_dapo.stages import Stages, put_to_sleep
    from nemo_dapo.types import Stage

    parallel.initialize(config.parallel, config.seed)
    place = Path(config.evaluation.checkpoint)
    group, model = parallel.control_group(config.parallel.timeout_minutes), Path(config.model.path)
    checkpoint.require_whole(place, model, group)
    state = json.loads((place / "state.json").read_text())
    origin.require_same_adapters(state, config.model)
    offload = sharing.offloads(config)
    weights = sharing.weight_bytes(config.rollout, model, config.model.precision)
    servers = put_to_sleep(engine, weights, group) if offload else None
    from nemo_dapo.megatron.policy import MegatronPolicy

    tokens = config.trainer.tokens_per_microbatch
    policy = MegatronPolicy(
        config.model,
        config.parallel,
        config.optimizer,
        tokens_per_microbatch=tokens,
        trainable=False,
        offload=offload,
        servers=servers,
    )
    policy.load(place / "policy")
    stages = Stages(policy, engine)
    stages.enter(Stage.sync)
    engine.update_weights(policy.export_weights(), 1)
    stages.enter(Stage.generate)
    parallel.shut_down()


def run(config: RunConfig) -> EvaluationResult:
    """Serves the model, samples and judges every set of `data.eval`."""
    from transformers import AutoTokenizer

    from nemo_dapo.data.load import load_run_data
    from nemo_dapo.detokenizer import decoder_of
    from nemo_dapo.evaluation import evaluate
    from nemo_dapo.rewards.pool import RewardPool
    from nemo_dapo.rollout.command import with_the_head_of
    from nemo_dapo.rollout.engine import VLLMEngine

    config.data.train = {}
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data = load_run_data(config.data, tokenizer, config.rollout.max_prompt_length)
    for report in data.reports:
        print(report, flush=True)
    model_path, output = Path(config.model.path), Path(config.output_dir)
    rollout = with_the_head_of(config.model, config.rollout)
    with (
        RewardPool.from_config(config.reward, tokenizer, printed=output / "rewards.log") as rewarder,
        VLLMEngine.start(rollout, model_path, config.model.precision, output, tokenizer, config.seed) as engine,
    ):
        if config.evaluation.checkpoint:
            load_checkpoint(config, engine)
        return asyncio.run(
            evaluate(
                engine,
                rewarder,
                {one.name: one.prompts for one in data.eval},
                config.evaluation,
                decode=decoder_of(tokenizer),
                max_response_length=config.rollout.max_response_length,
                samples={name: one.samples for name, one in config.data.eval.items()},
                max_concurrent_sequences=config.rollout.max_concurrent_sequences * config.rollout.num_servers,
                progress=config.logger.progress,
            )
        )


def unused(folder: Path) -> Path:
    """`folder`, or the first of folder_2, folder_3, … that holds no evaluation yet."""
    others = (folder.with_name(f"{folder.name}_{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([folder], others) if not (place / "summary.json").exists())


def main(cfg: DictConfig, ending: Ending) -> None:
    """Evaluate; a bad configuration, an error or a signal ends it as `Ending` says."""
    from nemo_dapo.rollout import sharing

    entry.quiet_libraries()
    with ending.ends_the_process():
        config = schema.typed(cfg)
        check(config)
        if config.evaluation.checkpoint:
            config.rollout = sharing.with_sleep(config)
        output = unused(Path(config.output_dir))
        config.output_dir = str(output)
        ending.output_dir = output
        result = run(config)
        result.write_jsonl(output / "problems.jsonl")
        result.write_summary(output / "summary.json")
        for one in result.sets.values():
            print(one, flush=True)
        print(f"written to {output}: summary.json, problems.jsonl", flush=True)


if __name__ == "__main__":
    entry.start(main, CONFIG, ("torch", "transformers"), check)
