"""The checks of a typed configuration before anything starts: ranges, options against each other, the model's folder."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_dapo.config import model_family, reserved
from nemo_dapo.config.layout import check_layout
from nemo_dapo.config.placement import check_placement, check_staleness
from nemo_dapo.config.prompts import check_prompts, remark_on_prompts
from nemo_dapo.config.ranges import out_of_range
from nemo_dapo.config.schema import (
    LAST_PORT,
    AlgorithmConfig,
    DecayStyle,
    Fp8,
    OptimizerConfig,
    Placement,
    Precision,
    RewardConfig,
    RunConfig,
    SequenceRatio,
    Transport,
)

LOSSES = ("dapo", "cispo", "dr_grpo", "gspo")  # as in losses/, which must not be imported here
ADAPTED_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
HOPPER = (9, 0)  # compute capability
FP8_MULTIPLE = 16  # of both sizes of a matrix in an FP8 product (transformer_engine: assert_dim_for_fp8_exec)
SPLIT_SIZES = ("hidden_size", "intermediate_size")
FUNCTION = re.compile(r"[\w.]+:\w+|https?://.+")


def validate(config: RunConfig, world_size: int) -> None:
    """Check every number's range, then the options against each other, the model's folder and the number of ranks.

    Raises one ValueError that lists all that was found: value, expectation, remedy. Reads the model's `config.json` alone.
    """
    _refuse(out_of_range(config))  # first: what follows divides by some of these numbers
    model, unreadable = _read_model(config.model.path)
    _refuse(
        [
            *_check_run(config),
            *_check_algorithm(config.algorithm),
            *_check_lengths(config, model),
            *_check_optimizer(config.optimizer),
            *_check_rollout(config),
            *_check_record(config),
            *_check_reward(config.reward),
            *_check_data(config),
            *check_prompts(config.data, config.reward),
            *_check_evaluation(config),
            *check_layout(config, model, world_size),
            *_check_model(config, model),
            *_check_adapters(config, model),
            *_check_replay(config, model),
            *_check_fp8(config, model),
            *_check_passed_through(config),
            *unreadable,
        ]
    )


def validate_evaluation(config: RunConfig, world_size: int) -> None:
    """The same for examples/evaluate.py, which trains nothing and is one process."""
    _refuse(out_of_range(config))
    model, unreadable = _read_model(config.model.path)
    problems = [
        *_check_run(config),
        *check_placement(config.rollout),
        *_check_evaluation(config),
        *_check_lengths(config, model),
        *_check_reward(config.reward),
        *check_prompts(config.data, config.reward),
        *unreadable,
    ]
    if model is not None:
        problems += model_family.check_sizes(config.model.path, model)
    if not config.data.eval:
        problems.append(
            "data.eval is empty; choose sets (benchmark=[aime24,math500]) or name one: "
            "data.eval.mine={format: columns, path: …}"
        )
    if world_size > 1:
        problems.append(
            f"{world_size} ranks were started; start it without torchrun: rollout.num_servers=N serves faster"
        )
    if config.rollout.placement is Placement.colocated:
        problems.append(
            "rollout.placement=colocated serves on the nodes of a trainer, and there is none; set local or dedicated"
        )
    if config.rollout.transport is Transport.device:
        problems.append(
            "rollout.transport=device is of a trainer's ranks, and there is none; set rollout.transport=host"
        )
    chosen = config.evaluation.checkpoint
    if chosen and not (Path(chosen) / "policy").is_dir():
        problems.append(
            f"evaluation.checkpoint={chosen!r} has no folder policy/; name one of runs/<name>/checkpoints/step_*"
        )
    elif chosen and model is not None:  # vLLM alone serves many more families
        problems += model_family.check_trainable(config.model.path, model)
    _refuse(problems)


def remarks(config: RunConfig) -> list[str]:
    """What is probably not meant, but may be: a line each, for a user to read before the run goes on."""
    return list(remark_on_prompts(config.data, config.reward))


def _read_model(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The model's config.json, or None and why it cannot be read."""
    try:
        return model_family.read(path), []
    except ValueError as error:
        return None, [str(error)]


def _refuse(problems: Iterable[str]) -> None:
    lines = [f"\n  - {problem}" for problem in problems]
    if lines:
        raise ValueError("configuration:" + "".join(lines))


def _check_run(config: RunConfig) -> Iterator[str]:
    if not config.name.strip():
        yield f"name={config.name!r} must not be empty: it names the run's folder; set name=my-run"
    if not config.output_dir.strip():
        yield f"output_dir={config.output_dir!r} must not be empty: the run writes there; leave it out for runs/<name>"


def _check_algorithm(a: AlgorithmConfig) -> Iterator[str]:
    size = a.prompts_per_step * a.group_size
    if size % a.minibatch_size:
        yield (
            f"algorithm.minibatch_size={a.minibatch_size} must divide prompts_per_step * group_size = "
            f"{a.prompts_per_step} * {a.group_size} = {size}"
        )
    if a.loss not in LOSSES and not FUNCTION.fullmatch(a.loss):
        yield (
            f"algorithm.loss={a.loss!r} must be one of {', '.join(LOSSES)}, or package.module:name of a function "
            "(AlgorithmConfig) -> LossFn"
        )
    if a.loss == "dr_grpo" and not a.loss_length:
        yield (
            "algorithm.loss=dr_grpo divides by algorithm.loss_length=0: set it to rollout.max_response_length, as "
            "algorithm=dr_grpo does"
        )
    yield from _check_importance(a)
    if a.dual_clip is not None and a.loss in ("cispo", "gspo"):
        yield f"algorithm.loss={a.loss} has no dual clip, but algorithm.dual_clip={a.dual_clip}: set it to null"


def _check_importance(a: AlgorithmConfig) -> Iterator[str]:
    of_tokens = {name: getattr(a, name) for name in ("importance_cap", "importance_low", "importance_high")}
    for name, value in of_tokens.items():
        if a.loss == "gspo" and value:
            yield f"algorithm.loss=gspo clips whole responses, algorithm.{name}={value} is of single tokens: set it to 0"
    bounds = f"algorithm.importance_sequence_low={a.importance_sequence_low}, _high={a.importance_sequence_high}"
    is_bounded = bool(a.importance_sequence_low or a.importance_sequence_high)
    if is_bounded and a.importance_sequence is SequenceRatio.none:
        yield f"{bounds} bound no ratio: set algorithm.importance_sequence=mean or product, or both to 0"
    if not is_bounded and a.importance_sequence is not SequenceRatio.none:
        yield f"algorithm.importance_sequence={a.importance_sequence.value} without a bound, {bounds}: set one, or none"


def _check_lengths(config: RunConfig, model: dict[str, Any] | None) -> Iterator[str]:
    rollout, overlong = config.rollout, config.reward.overlong
    longest = rollout.max_prompt_length + rollout.max_response_length
    if config.trainer.tokens_per_microbatch < longest:
        yield (
            f"trainer.tokens_per_microbatch={config.trainer.tokens_per_microbatch} must hold one sequence: "
            f"max_prompt_length + max_response_length = {longest}"
        )
    if overlong.buffer > rollout.max_response_length:
        yield (
            f"reward.overlong.buffer={overlong.buffer} must not exceed rollout.max_response_length="
            f"{rollout.max_response_length}; set it to 0 for no penalty"
        )
    limit = rollout.vllm.get("max_model_len") or longest
    if not isinstance(limit, int):
        yield f"rollout.vllm.max_model_len={limit!r} must be a whole number of tokens, such as {longest}"
        return
    if limit < longest:
        yield f"rollout.vllm.max_model_len={limit} must hold max_prompt_length + max_response_length = {longest}"
    evaluated = rollout.max_prompt_length + config.evaluation.max_response_length
    if evaluated > limit:
        yield (
            f"evaluation.max_response_length={config.evaluation.max_response_length} with max_prompt_length="
            f"{rollout.max_prompt_length} must fit the servers' {limit} tokens; lower it, or set "
            f"rollout.vllm.max_model_len={evaluated}"
        )
    if model is not None:
        asked_by = (
            "rollout.vllm.max_model_len" if limit != longest else "rollout.max_prompt_length + max_response_length"
        )
        yield from model_family.check_positions(config.model.path, model, limit, asked_by)


def _check_optimizer(o: OptimizerConfig) -> Iterator[str]:
    if o.decay_style is not DecayStyle.constant and o.decay_steps <= o.warmup_steps:
        yield (
            f"optimizer.decay_steps={o.decay_steps} must exceed warmup_steps={o.warmup_steps} for "
            f"decay_style={o.decay_style.value}; it counts optimizer steps from the start"
        )
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr={o.min_lr} must not exceed optimizer.lr={o.lr}"


def _check_rollout(config: RunConfig) -> Iterator[str]:
    r = config.rollout
    if r.top_p < 1 or r.top_k > 0:
        # vLLM's probabilities are those among the kept tokens. A ratio to them is the true one times the kept mass: with
        # algorithm.importance_cap it would weigh every token down, and correct nothing.
        yield (
            f"rollout.top_p={r.top_p}, top_k={r.top_k} cut the distribution that the trainer scores whole, and "
            "algorithm.importance_cap cannot correct for it: vLLM's probabilities are those among the kept tokens; set "
            "1.0 and -1 (evaluation has its own)"
        )
    yield from check_placement(r)
    yield from check_staleness(r, config.algorithm)
    if r.visible_devices and len(r.visible_devices) != r.num_servers:
        yield f"rollout.visible_devices has {len(r.visible_devices)} entries for num_servers={r.num_servers}; give one each"
    if r.api_key_file and not Path(r.api_key_file).is_file():
        yield f"rollout.api_key_file={r.api_key_file!r} is no file; name one that holds the key in one line"
    if r.port and r.port + r.num_servers - 1 > LAST_PORT:
        yield (
            f"rollout.port={r.port} leaves no ports for num_servers={r.num_servers}, which count up to {LAST_PORT}; lower "
            "it, or set it to 0 for free ones"
        )


def _check_record(config: RunConfig) -> Iterator[str]:
    """Options of recording and replaying rollouts."""
    if config.logger.rollout_tokens and not config.logger.rollout_every:
        yield "logger.rollout_tokens=true with logger.rollout_every=0 records nothing; set rollout_every=1 for every step"
    if not config.rollout.replay:
        return
    replay, run_dir = Path(config.rollout.replay).resolve(), Path(config.output_dir).resolve()
    if not any(replay.glob("step_*.parquet")):
        yield f"rollout.replay={config.rollout.replay!r} holds no step_*.parquet; name the rollouts/ folder of a run"
    if replay.is_relative_to(run_dir):
        yield f"rollout.replay={config.rollout.replay!r} lies in this run's own folder; set another output_dir"
    if config.evaluation.every or config.evaluation.at_start:
        yield "rollout.replay has no answers to evaluation problems; set evaluation.every=0 evaluation.at_start=false"


def _check_reward(r: RewardConfig) -> Iterator[str]:
    if r.correct <= r.incorrect:
        yield (
            f"reward.correct={r.correct} must exceed reward.incorrect={r.incorrect}, or right answers are not preferred; "
            "the paper's are 1 and -1"
        )
    functions = {"reward.function": r.function} | {f"reward.extra.{k}.function": v.function for k, v in r.extra.items()}
    for name, function in functions.items():
        if function and not FUNCTION.fullmatch(function):
            yield f"{name}={function!r} must be package.module:name, or an http(s) address: my_package.rewards:my_function"


def _check_data(config: RunConfig) -> Iterator[str]:
    if not config.data.train:
        yield "data.train is empty; choose a group (data=gsm8k) or name a set: data.train.mine={format: columns, path: …}"
    if config.evaluation.every and not config.data.eval:
        yield f"evaluation.every={config.evaluation.every} but data.eval is empty; name a set, or set it to 0"


def _check_evaluation(config: RunConfig) -> Iterator[str]:
    e = config.evaluation
    counts = {"evaluation": e.samples} | {f"data.eval.{k}": v.samples for k, v in config.data.eval.items() if v.samples}
    for name, samples in counts.items():
        if e.temperature == 0 and samples > 1:
            yield f"{name}.samples={samples} with evaluation.temperature=0 copies one greedy answer: set 1 or a temperature"


def _check_passed_through(config: RunConfig) -> Iterator[str]:
    yield from reserved.problems("model.megatron", config.model.megatron)
    yield from reserved.problems("optimizer.megatron", config.optimizer.megatron)
    yield from reserved.problems("parallel.ddp", config.parallel.ddp)
    if "head_dtype" in (config.rollout.vllm.get("hf_overrides") or {}):
        yield "rollout.vllm.hf_overrides sets head_dtype on one side alone; set model.fp32_logits=true for both"


def _check_adapters(config: RunConfig, model: dict[str, Any] | None) -> Iterator[str]:
    lora, tp = config.model.lora, config.parallel.tensor_model_parallel_size
    if not lora.rank:
        return
    if lora.rank % tp:
        yield (
            f"model.lora.rank={lora.rank} is dealt to parallel.tensor_model_parallel_size={tp} ranks, which does not "
            f"divide it; set it to a multiple of {tp}"
        )
    unknown = [name for name in lora.target_modules if name not in ADAPTED_LAYERS]
    if unknown or not lora.target_modules:
        yield f"model.lora.target_modules={lora.target_modules} must be some of {', '.join(ADAPTED_LAYERS)}"
    of_experts = [name for name in lora.target_modules if name.startswith("linear_fc")]
    if of_experts and model_family.num_experts(model or {}):
        yield (
            f"model.lora.target_modules has {', '.join(of_experts)}, which of a mixture are its experts': they get no "
            "adapters here; set it to [linear_qkv,linear_proj]"
        )
    if (model or {}).get("kv_lora_rank"):
        yield (
            f"model.lora.rank={lora.rank}, but multi-latent attention, which the model has, gets no adapters here; set it "
            "to 0"
        )


def _check_replay(config: RunConfig, model: dict[str, Any] | None) -> Iterator[str]:
    if config.rollout.return_routes:
        yield from _check_returned_routes(config)
    if not config.model.replay_routes:
        return
    if model is not None and not model_family.num_experts(model):
        yield "model.replay_routes=true replays the routes of a mixture of experts, but the model is dense; set it to false"
    if config.model.megatron.get("moe_router_fusion"):
        yield (
            "model.megatron.moe_router_fusion=true chooses experts before it looks at the routes of "
            "model.replay_routes=true; leave one of the two out"
        )


def _check_returned_routes(config: RunConfig) -> Iterator[str]:
    if not config.model.replay_routes:
        yield "rollout.return_routes=true brings routes that nothing follows; set model.replay_routes=true, or leave it out"
    vllm = config.rollout.vllm
    if int(vllm.get("pipeline_parallel_size") or 1) > 1 or vllm.get("enable_prefix_caching") is False:
        yield (
            "rollout.return_routes=true needs vLLM without pipeline parallelism and with its prefix cache; leave "
            "rollout.vllm.pipeline_parallel_size and enable_prefix_caching out"
        )


def _check_fp8(config: RunConfig, model: dict[str, Any] | None) -> Iterator[str]:
    fp8, tp = config.model.fp8, config.parallel.tensor_model_parallel_size
    if fp8 is Fp8.none:
        return
    if config.model.precision is not Precision.bf16:
        yield f"model.fp8={fp8.value} beside model.precision={config.model.precision.value}: set model.precision=bf16"
    if (problem := _no_fp8_here()) is not None:
        yield f"model.fp8={fp8.value} needs Transformer Engine and Hopper GPUs or newer: {problem}; set model.fp8=none"
    shares = {name: model[name] / tp for name in SPLIT_SIZES if model and model.get(name)}
    shares |= {"model.lora.rank": config.model.lora.rank / tp}
    for name, share in shares.items():
        if share % FP8_MULTIPLE:
            yield (
                f"model.fp8={fp8.value} takes multiples of {FP8_MULTIPLE}: {name} over "
                f"parallel.tensor_model_parallel_size={tp} is {share:g}; split it over fewer ranks, or set model.fp8=none"
            )


def _no_fp8_here() -> str | None:
    import torch  # here: the schema alone needs no torch

    if not torch.cuda.is_available():
        return "there is no GPU here"
    if importlib.util.find_spec("transformer_engine") is None:
        return "this interpreter has no transformer_engine"
    capability = torch.cuda.get_device_capability()
    return None if capability >= HOPPER else f"this GPU's compute capability is {capability[0]}.{capability[1]}"


def _check_model(config: RunConfig, model: dict[str, Any] | None) -> Iterator[str]:
    exported = Path(config.output_dir) / "trained"
    if config.checkpoint.export and Path(config.model.path).resolve() == exported.resolve():
        yield (
            f"model.path={config.model.path!r} is where this run writes its trained model; change output_dir (or name), "
            "or set checkpoint.export=false"
        )
    if model is not None:
        yield from model_family.check_trainable(config.model.path, model)
        yield from model_family.check_sizes(config.model.path, model)
