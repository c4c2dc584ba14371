"""The schema of a run: every option, its type, its default and the checks between options.

The defaults are the paper's (arXiv 2503.14476, section 4.1) and the public recipe's. YAML under `conf/` holds deltas.
Megatron-core's and vLLM's own options pass through `model.megatron` and `rollout.vllm` by their upstream names.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MIN_CPU_HEAD_SIZE = 32  # vllm.v1.attention.backends.cpu_attn: get_supported_head_sizes


class Precision(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class DecayStyle(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class KLEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class RewardStyle(Enum):
    math = "math"
    dapo = "dapo"


class Resume(Enum):
    auto = "auto"
    never = "never"


class DataFormat(Enum):
    arithmetic = "arithmetic"
    dapo_math = "dapo_math"
    gsm8k = "gsm8k"
    columns = "columns"


@dataclass
class ModelConfig:
    path: str = MISSING  # a Hugging Face directory: config.json, *.safetensors, tokenizer
    precision: Precision = Precision.bf16
    megatron: dict[str, Any] = field(default_factory=dict)  # fields of Megatron-core's TransformerConfig


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    timeout_minutes: float = 30.0  # of one collective between trainer ranks


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    warmup_steps: int = 160  # optimizer steps: the public recipe's 10 rollout steps x 16 updates
    decay_steps: int = 0  # optimizer steps from the start to `min_lr`; 0 = never decays
    decay_style: DecayStyle = DecayStyle.constant
    max_refused_updates: int = 3  # non-finite gradients in a row after which the run stops


@dataclass
class RolloutConfig:
    python: str = ""  # interpreter with vLLM; empty = this one
    num_servers: int = 1
    host: str = "127.0.0.1"
    port: int = 0  # of the first server; 0 = a free one
    api_key: str = ""  # needed when `host` is not loopback; empty = a random one a run
    visible_devices: list[str] = field(default_factory=list)  # CUDA_VISIBLE_DEVICES, one entry a server
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_prompt_length: int = 2048
    max_response_length: int = 20480
    max_concurrent_sequences: int = 1024  # in flight on one server
    start_timeout: float = 900.0  # seconds until a server must be healthy
    request_timeout: float = 3600.0  # seconds for one group of samples
    sync_timeout: float = 600.0  # seconds for one weight update
    max_logprob_gap: float = 0.05  # mean |trainer - vLLM|; a larger one at step 0 refuses to train
    vllm: dict[str, Any] = field(default_factory=dict)  # engine arguments of `vllm serve`, by their long names


@dataclass
class DataSetConfig:
    format: DataFormat = MISSING
    path: str = ""  # file or pattern of files (.parquet, .jsonl), or name on the hub when `hub` is true
    hub: bool = False
    subset: str = ""  # on the hub: configuration of the data set, such as `main` of openai/gsm8k
    split: str = "train"  # on the hub; and of arithmetic: train, or eval for the problems held out of any training
    weight: float = 1.0  # share of the draws in a mixture, whatever the sizes
    # format = columns: which column holds what; a dot reaches into a nested one (reward_model.ground_truth)
    columns: dict[str, str] = field(default_factory=dict)  # problem, answer; source; other keys become metadata
    # format = arithmetic: problems are generated
    num_problems: int = 0
    seed: int = 0
    max_digits: int = 4
    max_problems: int = 0  # keep the first n after removing repeats; 0 = all
    samples: int = 0  # of an evaluation set: k of its avg@k; 0 = evaluation.samples
    streaming: bool = False  # on the hub: read without storing; files are always streamed


@dataclass
class DataConfig:
    train: dict[str, DataSetConfig] = field(default_factory=dict)
    eval: dict[str, DataSetConfig] = field(default_factory=dict)
    template: str = "dapo"  # a name in nemo_dapo.data.template, or text with {problem}
    system_prompt: str = ""
    use_chat_template: bool = True
    chat_template_options: dict[str, Any] = field(default_factory=dict)  # such as enable_thinking: false
    exclude_eval: bool = True  # training drops, and counts, the problems of the evaluation sets
    # curriculum: a problem answered all right in its last k visits is skipped; 0 = never
    skip_solved_visits: int = 0


@dataclass
class OverlongConfig:
    buffer: int = 4096  # tokens before max_response_length over which the penalty grows; 0 = none
    factor: float = 1.0


@dataclass
class RewardTermConfig:
    function: str = MISSING  # package.module:name, or the http(s) address of a reward service
    weight: float = 1.0


@dataclass
class RewardConfig:
    style: RewardStyle = RewardStyle.math
    function: str = ""  # package.module:name instead of the style's verifier; decides `correct`
    extra: dict[str, RewardTermConfig] = field(default_factory=dict)  # add to the score, never to the verdict
    correct: float = 1.0
    incorrect: float = -1.0
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    answer_patterns: list[str] = field(default_factory=list)  # regular expressions with one group; empty = built in
    workers: int = 8
    timeout: float = 10.0  # seconds an item
    memory_mb: int = 2048  # a worker


@dataclass
class AlgorithmConfig:
    prompts_per_step: int = 512  # N
    group_size: int = 16  # G
    minibatch_size: int = 512  # sequences an optimizer step
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    normalize_std: bool = True
    kl_coeff: float = 0.0
    kl_estimator: KLEstimator = KLEstimator.k3
    entropy_coeff: float = 0.0
    importance_cap: float = 0.0  # truncated importance sampling of trainer against vLLM probabilities; 0 = off
    dynamic_sampling: bool = True
    max_attempts: float = 10.0  # groups sampled a step, at most this many times prompts_per_step


@dataclass
class TrainerConfig:
    max_steps: int = 1000  # rollout steps
    tokens_per_microbatch: int = 22528  # packed tokens in one micro-batch


@dataclass
class CheckpointConfig:
    every: int = 10  # rollout steps; 0 = only at the end
    keep: int = 2  # newest ones
    resume: Resume = Resume.auto
    export: bool = True  # write the trained model as a Hugging Face folder at the end


@dataclass
class EvaluationConfig:
    every: int = 10  # rollout steps; 0 = never
    at_start: bool = False
    samples: int = 32  # k of avg@k
    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = -1
    max_response_length: int = 0  # 0 = rollout.max_response_length
    save_responses: bool = False  # into the per-problem JSONL
    checkpoint: str = (
        ""  # of examples/evaluate.py: a run's checkpoints/step_*, whose weights replace those of model.path
    )


@dataclass
class LoggerConfig:
    tensorboard: bool = True
    wandb_project: str = ""
    progress: bool = True
    rollout_every: int = 0  # rollout steps between Parquet dumps of all samples; 0 = none
    rollout_max_mb: int = 256  # bound on one dump


@dataclass
class RunConfig:
    name: str = "dapo"
    output_dir: str = "runs/${name}"
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class OpenDataConfig(DataConfig):
    """Hydra cannot add a key to a dict of dataclasses on the command line: here it may; `typed` checks it after."""

    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)


@dataclass
class OpenRunConfig(RunConfig):
    data: DataConfig = field(default_factory=OpenDataConfig)


def register() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of every top-level YAML's defaults list."""
    ConfigStore.instance().store(name="schema", node=OpenRunConfig)


def typed(config: DictConfig) -> RunConfig:
    """Plain typed objects of a composed configuration. Raises ValueError that names the key and, for a misspelt one, what
    it may have meant."""
    try:
        plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True, throw_on_missing=True))
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    assert isinstance(run, RunConfig)
    return run


def explain(error: Exception) -> str:
    """One line for what Hydra or OmegaConf found wrong: the key, the reason and, for a misspelt key, the nearest one."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause).splitlines()[0].replace(OpenRunConfig.__name__, RunConfig.__name__)
        return f"{cause.full_key or 'configuration'}: {reason}{_nearest(cause)}"
    reason = str(error).partition("Config search path")[0]  # where Hydra looked does not help: conf/ is the only place
    where = getattr(error, "override", None) or "configuration"  # of an argument that Hydra cannot parse
    return f"{where}: {' '.join(reason.split())}"


def _nearest(error: OmegaConfBaseException) -> str:
    names = [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
    near = [] if error.key in names else difflib.get_close_matches(str(error.key), names)
    return f"; did you mean {near[0]}?" if near else ""


def validate(config: RunConfig, world_size: int) -> None:
    """Check the options against each other, the model's folder and the number of ranks, before anything starts.

    Raises one ValueError that lists every contradiction found: value, expectation, remedy.
    """
    problems = [
        *_check_algorithm(config),
        *_check_lengths(config),
        *_check_optimizer(config.optimizer),
        *_check_rollout(config),
        *_check_data(config),
        *_check_evaluation(config),
        *_check_model(config, world_size),
    ]
    _refuse(problems)


def validate_evaluation(config: RunConfig, world_size: int) -> None:
    """The same for examples/evaluate.py, which trains nothing and is one process."""
    problems = [*_check_evaluation(config), *_check_lengths(config), *_check_folder(config.model)]
    if not config.data.eval:
        problems.append(
            "data.eval is empty; choose sets (benchmark=[aime24,math500]) or name one: "
            "+data.eval.mine={format: columns, path: …}"
        )
    if world_size > 1:
        problems.append(
            f"{world_size} ranks were started; start it without torchrun: rollout.num_servers=N serves faster"
        )
    chosen = config.evaluation.checkpoint
    if chosen and not (Path(chosen) / "policy").is_dir():
        problems.append(
            f"evaluation.checkpoint={chosen!r} has no folder policy/; name one of runs/<name>/checkpoints/step_*"
        )
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("configuration:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _check_algorithm(config: RunConfig) -> Iterator[str]:
    a = config.algorithm
    size = a.prompts_per_step * a.group_size
    if a.prompts_per_step < 1:
        yield f"algorithm.prompts_per_step={a.prompts_per_step} must be at least 1"
    if a.group_size < 2:
        yield f"algorithm.group_size={a.group_size} must be at least 2: Eq. 9 compares the samples of a group"
    if a.minibatch_size < 1 or size % a.minibatch_size:
        yield (
            f"algorithm.minibatch_size={a.minibatch_size} must divide prompts_per_step * group_size = "
            f"{a.prompts_per_step} * {a.group_size} = {size}"
        )
    for name in ("clip_low", "clip_high"):
        if getattr(a, name) <= 0:
            yield f"algorithm.{name}={getattr(a, name)} must be positive; the paper's are 0.2 and 0.28"
    if a.dual_clip is not None and a.dual_clip <= 1:
        yield f"algorithm.dual_clip={a.dual_clip} must exceed 1 (the public recipe uses 10), or be null"
    if a.max_attempts < 1:
        yield f"algorithm.max_attempts={a.max_attempts} must be at least 1 times prompts_per_step"
    if a.importance_cap and a.importance_cap < 1:
        yield f"algorithm.importance_cap={a.importance_cap} must be at least 1, or 0 to switch the correction off"
    if a.kl_coeff < 0:
        yield f"algorithm.kl_coeff={a.kl_coeff} must not be negative"


def _check_lengths(config: RunConfig) -> Iterator[str]:
    rollout, overlong = config.rollout, config.reward.overlong
    longest = rollout.max_prompt_length + rollout.max_response_length
    if config.trainer.tokens_per_microbatch < longest:
        yield (
            f"trainer.tokens_per_microbatch={config.trainer.tokens_per_microbatch} must hold one sequence: "
            f"max_prompt_length + max_response_length = {longest}"
        )
    if not 0 <= overlong.buffer <= rollout.max_response_length:
        yield (
            f"reward.overlong.buffer={overlong.buffer} must lie within rollout.max_response_length="
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


def _check_optimizer(o: OptimizerConfig) -> Iterator[str]:
    if o.decay_style is not DecayStyle.constant and o.decay_steps <= o.warmup_steps:
        yield (
            f"optimizer.decay_steps={o.decay_steps} must exceed warmup_steps={o.warmup_steps} for "
            f"decay_style={o.decay_style.value}; it counts optimizer steps from the start"
        )
    if not 0 <= o.min_lr <= o.lr:
        yield f"optimizer.min_lr={o.min_lr} must lie between 0 and optimizer.lr={o.lr}"


def _check_rollout(config: RunConfig) -> Iterator[str]:
    r = config.rollout
    if r.temperature <= 0:
        yield f"rollout.temperature={r.temperature} must be positive: greedy samples of a group are all the same"
    if (r.top_p < 1 or r.top_k > 0) and not config.algorithm.importance_cap:
        yield (
            f"rollout.top_p={r.top_p}, top_k={r.top_k} cut the distribution that the trainer scores whole; set 1.0 and -1, "
            "or algorithm.importance_cap to correct for it"
        )
    if r.visible_devices and len(r.visible_devices) != r.num_servers:
        yield f"rollout.visible_devices has {len(r.visible_devices)} entries for num_servers={r.num_servers}; give one each"


def _check_data(config: RunConfig) -> Iterator[str]:
    if not config.data.train:
        yield "data.train is empty; choose a group (data=gsm8k) or name a set: +data.train.mine={format: columns, path: …}"
    if config.evaluation.every and not config.data.eval:
        yield f"evaluation.every={config.evaluation.every} but data.eval is empty; name a set, or set it to 0"


def _check_evaluation(config: RunConfig) -> Iterator[str]:
    e = config.evaluation
    counts = {"evaluation": e.samples} | {f"data.eval.{k}": v.samples for k, v in config.data.eval.items() if v.samples}
    if e.temperature < 0:
        yield f"evaluation.temperature={e.temperature} must not be negative"
    for name, samples in counts.items():
        if samples < 1:
            yield f"{name}.samples={samples} must be at least 1"
        if e.temperature == 0 and samples > 1:
            yield f"{name}.samples={samples} with evaluation.temperature=0 copies one greedy answer: set 1 or a temperature"


def _check_folder(model: ModelConfig) -> Iterator[str]:
    if not (Path(model.path) / "config.json").is_file():
        yield (
            f"model.path={model.path!r} has no config.json; give a Hugging Face model folder "
            "(for the demo: python examples/demo/prepare.py)"
        )


def _check_model(config: RunConfig, world_size: int) -> Iterator[str]:
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    if tp < 1 or pp < 1 or world_size % (tp * pp):
        yield (
            f"parallel: {world_size} ranks are no multiple of tensor_model_parallel_size * pipeline_model_parallel_size = "
            f"{tp} * {pp}; start torchrun with --nproc-per-node (and --nnodes) to match, or change parallel="
        )
    if p.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true splits tokens over tensor-parallel ranks, but there is 1; set it to false"
    exported = Path(config.output_dir) / "trained"
    if config.checkpoint.export and Path(config.model.path).resolve() == exported.resolve():
        yield (
            f"model.path={config.model.path!r} is where this run writes its trained model; change output_dir (or name), "
            "or set checkpoint.export=false"
        )
    missing = list(_check_folder(config.model))
    yield from missing
    if missing:
        return
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    for name, parts, option in (
        ("num_attention_heads", tp, "tensor"),
        ("num_key_value_heads", tp, "tensor"),
        ("vocab_size", tp, "tensor"),
        ("num_hidden_layers", pp, "pipeline"),
    ):
        if parts > 0 and model.get(name, 0) % parts:
            yield f"parallel.{option}_model_parallel_size={parts} does not divide the model's {name}={model[name]}"
    yield from _check_head_size(model)


def _check_head_size(model: dict[str, Any]) -> Iterator[str]:
    """vLLM's attention on a CPU host has no kernels for smaller heads."""
    import torch  # here: the schema alone needs no torch

    size = model.get("head_dim") or model.get("hidden_size", 0) // max(model.get("num_attention_heads", 1), 1)
    if 0 < size < MIN_CPU_HEAD_SIZE and not torch.cuda.is_available():
        yield (
            f"model.path: the model's head_dim={size} must be at least {MIN_CPU_HEAD_SIZE} for vLLM on a host without "
            "CUDA: take a model with fewer, larger heads"
        )
