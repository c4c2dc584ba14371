"""The schema of a run: every option, its type, its default, its range and, in the comment beside it, its meaning.

The defaults are the paper's (arXiv 2503.14476, section 4.1) and the public recipe's. YAML under `conf/` holds deltas.
Megatron-core's and vLLM's own options pass through `model.megatron` and `rollout.vllm` by their upstream names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from nemo_dapo.config.ranges import number
from nemo_dapo.types import MAX_SCORE

A_YEAR = 365 * 24 * 3600.0  # seconds; clocks and timers overflow not far above
LAST_PORT = 65535
MIN_TEMPERATURE = 0.01  # vllm.sampling_params raises a smaller one to this, and the trainer would score another


class Precision(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class Fp8(Enum):
    none = "none"
    blockwise = "blockwise"


class DecayStyle(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class KLEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class SequenceRatio(Enum):
    none = "none"
    mean = "mean"
    product = "product"


class RewardStyle(Enum):
    math = "math"
    dapo = "dapo"


class Resume(Enum):
    auto = "auto"
    never = "never"


class Offload(Enum):
    auto = "auto"
    always = "always"
    never = "never"


class Portable(Enum):
    last = "last"
    always = "always"


class OnFailedSave(Enum):
    stop = "stop"
    go_on = "go_on"


class PartialAnswers(Enum):
    keep = "keep"
    discard = "discard"


class InflightCache(Enum):
    keep = "keep"
    recompute = "recompute"


class Placement(Enum):
    local = "local"
    colocated = "colocated"
    dedicated = "dedicated"
    attach = "attach"


class Transport(Enum):
    host = "host"
    device = "device"


@dataclass
class LoraConfig:
    rank: int = number(0, at_least=1, also=(0,))  # of the adapters that train in place of the weights; 0 = no adapters
    alpha: float = number(32.0, above=0)  # an adapter's product is multiplied by alpha / rank
    # Megatron's layers that get one: attention's inputs and output, and the two of the feed-forward network
    target_modules: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])


@dataclass
class ModelConfig:
    path: str = MISSING  # a Hugging Face directory: config.json, *.safetensors, tokenizer
    precision: Precision = Precision.bf16  # of weights and activations, in the trainer and in vLLM
    # logits of bfloat16 weights summed up and kept in float32, in the trainer and in vLLM, whose roundings differ
    fp32_logits: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    # products of the layers in 8 bits, scaled by blocks of 1 x 128 and 128 x 128, on Hopper GPUs; weights stay bf16
    fp8: Fp8 = Fp8.none
    # a mixture's updates send each token to the experts of the pass that scored it before, not to those of a newer router
    replay_routes: bool = False
    megatron: dict[str, Any] = field(default_factory=dict)  # fields of Megatron-core's TransformerConfig


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = number(1, at_least=1)  # ranks that share each layer
    pipeline_model_parallel_size: int = number(1, at_least=1)  # ranks that the layers are dealt to
    # parts that each pipeline rank's layers are cut into, worked on in turn, which shortens the pipeline's idle time
    virtual_pipeline_model_parallel_size: int = number(1, at_least=1)
    context_parallel_size: int = number(1, at_least=1)  # ranks that the tokens of each sequence are dealt to
    expert_model_parallel_size: int = number(1, at_least=1)  # ranks that a mixture's experts are dealt to
    # ranks that share each expert; null = 1 where experts are dealt to ranks, else as many as share a layer
    expert_tensor_parallel_size: int | None = number(None, at_least=1)
    sequence_parallel: bool = False  # splits the tokens of norms and dropout over the tensor-parallel ranks
    timeout_minutes: float = number(30.0, above=0, at_most=A_YEAR / 60)  # of one collective between trainer ranks
    # seconds without a sign of life of a rank, whatever it is at, after which the run ends and names it; 0 = never
    heartbeat_timeout: float = number(120.0, at_least=3, at_most=A_YEAR, also=(0,))
    ddp: dict[str, Any] = field(default_factory=dict)  # fields of Megatron-core's DistributedDataParallelConfig


@dataclass
class OptimizerConfig:
    lr: float = number(1e-6, above=0, at_most=1)  # learning rate of AdamW, after the warm-up
    min_lr: float = number(0.0, at_least=0, at_most=1)  # where the decay ends
    weight_decay: float = number(0.1, at_least=0, at_most=1)  # decoupled, of matrices
    clip_grad: float = number(1.0, at_least=0)  # norm that the whole gradient is scaled down to; 0 = none
    adam_beta1: float = number(0.9, at_least=0, below=1)  # decay of the gradient's running mean
    adam_beta2: float = number(0.999, at_least=0, below=1)  # decay of the squared gradient's running mean
    adam_eps: float = number(1e-8, above=0, below=1)  # added to the denominator
    # optimizer steps before the first one at the full rate: the public recipe's 10 rollout steps x 16 updates
    warmup_steps: int = number(160, at_least=0)
    decay_steps: int = number(0, at_least=0)  # optimizer steps from the start to `min_lr`; 0 = never decays
    decay_style: DecayStyle = DecayStyle.constant  # of the learning rate after the warm-up
    max_refused_updates: int = number(3, at_least=1)  # non-finite gradients in a row after which the run stops
    megatron: dict[str, Any] = field(default_factory=dict)  # fields of Megatron-core's OptimizerConfig


@dataclass
class RolloutConfig:
    python: str = ""  # interpreter with vLLM; empty = this one
    # where servers run: local = beside rank 0; colocated = on every node of the trainer; dedicated = on `nodes` nodes of
    # their own, whose agents register with rank 0; attach = yours, at the addresses `servers`
    placement: Placement = Placement.local
    # how weights get to the servers: host = through the memory of each serving node, which keeps them; device = straight
    # into GPUs, by CUDA IPC where trainer and server share them, else by NCCL, and no node keeps a copy
    transport: Transport = Transport.host
    num_servers: int = number(1, at_least=1)  # vLLM servers on each node that serves
    nodes: int = number(0, at_least=0)  # of placement=dedicated
    servers: list[str] = field(default_factory=list)  # of placement=attach: http://host:port of each
    # host:port at which rank 0 listens for agents; empty = a free port, on all addresses where other hosts are to join
    listen: str = ""
    min_servers: int = number(1, at_least=1)  # fewer that serve, for longer than a restart may take, end the run
    lease_seconds: float = number(20.0, at_least=2, at_most=A_YEAR)  # silence after which a node is given up
    host: str = "127.0.0.1"  # the servers listen here; on nodes beside rank 0's, on the node's own address instead
    port: int = number(0, at_least=1, at_most=LAST_PORT, also=(0,))  # of a node's first server; 0 = a free one
    # what requests to the servers must carry, else the file's content, else NEMO_DAPO_API_KEY, else a random one a run
    api_key: str = ""
    api_key_file: str = ""  # holds the key in one line; a key on the command line is refused
    visible_devices: list[str] = field(default_factory=list)  # CUDA_VISIBLE_DEVICES, one entry a server of a node
    # of the samples trained on
    temperature: float = number(1.0, at_least=MIN_TEMPERATURE, at_most=100, why="colder samples are all the same")
    top_p: float = number(1.0, above=0, at_most=1)  # keep only the likeliest tokens that hold this much probability
    top_k: int = number(-1, at_least=1, also=(-1, 0))  # keep only the k likeliest tokens; -1 or 0 = all
    max_prompt_length: int = number(2048, at_least=1)  # tokens; longer prompts are dropped and counted
    max_response_length: int = number(20480, at_least=1)  # tokens; longer responses are cut
    max_concurrent_sequences: int = number(1024, at_least=1)  # in flight on one server, at most
    # a server gets more sequences while a smaller share of its key-value cache is in use; on preemption it gets fewer
    kv_cache_target: float = number(0.85, above=0, at_most=1)
    # m: the weights that a token is sampled under may be this many pushes older than those that train on it. Then groups
    # that a step does not need stay for later ones, and generation goes on while the trainer updates; 0 = as in the paper
    max_staleness: int = number(0, at_least=0, at_most=64)
    # answers bring the experts that each of their tokens went to, for model.replay_routes: vLLM on GPUs alone tells them
    return_routes: bool = False
    # key-value cache of answers that are being generated when new weights come: kept, or recomputed under them
    inflight_cache: InflightCache = InflightCache.keep
    partial_answers: PartialAnswers = PartialAnswers.keep  # of a server that died: gone on with elsewhere, or discarded
    start_timeout: float = number(900.0, above=0, at_most=A_YEAR)  # seconds until a server must be healthy
    request_timeout: float = number(3600.0, above=0, at_most=A_YEAR)  # seconds for one sample
    # seconds in which nothing comes of a server's open requests, or of its pause for an update; then it is restarted
    progress_timeout: float = number(300.0, above=0, at_most=A_YEAR)
    sync_timeout: float = number(600.0, above=0, at_most=A_YEAR)  # seconds for one weight update
    max_logprob_gap: float = number(0.05, above=0)  # mean |trainer - vLLM|; a larger one at the start refuses to train
    replay: str = (
        ""  # rollouts/ folder of a run recorded with logger.rollout_tokens, played back in place of any server
    )
    vllm: dict[str, Any] = field(default_factory=dict)  # engine arguments of `vllm serve`, by their long names

    def __post_init__(self) -> None:
        """vLLM's command line takes `max-model-len` for max_model_len: whoever looks for an option finds it here."""
        self.vllm = {name.replace("-", "_"): value for name, value in self.vllm.items()}


@dataclass
class DataSetConfig:
    format: str = MISSING  # how a row becomes a problem: a module of nemo_dapo.data.formats, or one of yours
    path: str = (
        ""  # file or pattern of files (.parquet, .jsonl, .json); with `hub`, a name there or a folder downloaded
    )
    hub: bool = False  # a `path` that is no file is read as a Hugging Face data set; nothing is downloaded without this
    subset: str = ""  # on the hub: configuration of the data set, such as `main` of openai/gsm8k
    split: str = "train"  # on the hub; and of arithmetic: train, or eval for the problems held out of any training
    weight: float = number(1.0, above=0)  # share of the draws in a mixture, whatever the sizes
    # of format=columns: which column holds problem and answer, and source; other keys become metadata; a dot reaches into a
    # nested column (reward_model.ground_truth)
    columns: dict[str, str] = field(default_factory=dict)
    num_problems: int = number(0, at_least=0)  # of format=arithmetic: how many are generated
    seed: int = number(0, at_least=0)  # of format=arithmetic
    max_digits: int = number(4, at_least=1)  # of format=arithmetic: of each summand
    max_problems: int = number(0, at_least=0)  # keep the first n after removing repeats; 0 = all
    samples: int = number(0, at_least=0)  # of an evaluation set: k of its avg@k; 0 = evaluation.samples
    streaming: bool = False  # on the hub: read without storing; files are always streamed
    options: dict[str, Any] = field(default_factory=dict)  # what a format of your own needs beyond these


@dataclass
class DataConfig:
    train: dict[str, DataSetConfig] = field(default_factory=dict)  # training sets, each under a name of your own
    eval: dict[str, DataSetConfig] = field(default_factory=dict)  # evaluation sets, each under a name of your own
    template: str = "dapo"  # dapo (the public recipe's), plain, or a text with {problem}
    system_prompt: str = ""  # before each problem that brings none
    use_chat_template: bool = True  # the tokenizer's; without one, or with false, the turns stand one after another
    chat_template_options: dict[str, Any] = field(default_factory=dict)  # such as enable_thinking: false
    exclude_eval: bool = True  # training drops, and counts, the problems of the evaluation sets
    # resume on other data, weights, seed or template than the checkpoint's, which is otherwise refused; says what changed
    accept_changed: bool = False
    # curriculum: a problem answered all right in its last k visits is skipped; 0 = never
    skip_solved_visits: int = number(0, at_least=0)


@dataclass
class OverlongConfig:
    buffer: int = number(4096, at_least=0)  # tokens before max_response_length over which the penalty grows; 0 = none
    factor: float = number(1.0, at_least=0)  # the penalty at max_response_length


@dataclass
class RewardTermConfig:
    function: str = MISSING  # package.module:name, or the http(s) address of a reward service
    weight: float = number(1.0)  # of its score in the sum; below 0 punishes


@dataclass
class RewardConfig:
    style: RewardStyle = (
        RewardStyle.math
    )  # math judges mathematically; dapo is the public recipe's strict `Answer:` rule
    # package.module:name instead of the style's verifier; decides `correct`: true, or for a number above 0
    function: str = ""
    extra: dict[str, RewardTermConfig] = field(default_factory=dict)  # add to the score, never to the verdict
    correct: float = number(1.0, at_least=-MAX_SCORE, at_most=MAX_SCORE)  # score of a right answer
    incorrect: float = number(-1.0, at_least=-MAX_SCORE, at_most=MAX_SCORE)  # score of a wrong answer
    correct_above: float = number(
        0.0
    )  # a function's number is a right answer above this; partial credit wants more than 0
    # share of a step's samples on which the verifier may fail; above it the run stops. 1 = never
    max_error_rate: float = number(0.5, at_least=0, at_most=1)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    answer_patterns: list[str] = field(default_factory=list)  # regular expressions with one group; empty = built in
    workers: int = number(8, at_least=1)  # processes that judge answers
    timeout: float = number(10.0, above=0, at_most=A_YEAR)  # seconds an item
    memory_mb: int = number(2048, at_least=0, at_most=2**40)  # a worker's address space; 0 = unlimited


@dataclass
class AlgorithmConfig:
    prompts_per_step: int = number(512, at_least=1)  # N, the informative groups a step trains on
    group_size: int = number(16, at_least=2, why="Eq. 9 compares the samples of a group")  # G, the samples of a prompt
    minibatch_size: int = number(512, at_least=1)  # sequences an optimizer step
    # dapo (Eq. 8), cispo, dr_grpo, gspo, or package.module:name of a function (AlgorithmConfig) -> LossFn of your own
    loss: str = "dapo"
    loss_length: int = number(0, at_least=0)  # tokens; dr_grpo divides every response by it, whatever its own length
    overlong_filter: bool = False  # truncated responses enter neither the loss nor the tokens that divide it
    clip_low: float = number(0.2, above=0, at_most=1)  # the ratio is clipped below at 1 - clip_low
    clip_high: float = number(0.28, above=0)  # the ratio is clipped above at 1 + clip_high
    # bound on the ratio where the advantage is negative; null = none
    dual_clip: float | None = number(None, above=1, why="the public recipe uses 10, or null")
    normalize_std: bool = True  # divide a group's advantages by their standard deviation (Eq. 9)
    kl_coeff: float = number(0.0, at_least=0)  # of the divergence from the starting model; the paper has none
    kl_estimator: KLEstimator = KLEstimator.k3  # of that divergence, a token
    entropy_coeff: float = number(0.0, at_least=0)  # of a bonus on the policy's entropy
    # importance correction by the ratio of trainer to vLLM probabilities: a token weighs its ratio, at most this; 0 = off
    importance_cap: float = number(0.0, at_least=1, also=(0,), why="0 switches the correction off")
    importance_low: float = number(0.0, at_least=0, at_most=1)  # tokens of a lower ratio leave the loss; 0 = none do
    # tokens of a higher ratio leave the loss; 0 = none do
    importance_high: float = number(0.0, at_least=1, also=(0,), why="0 is no bound")
    # ratio by which whole responses leave the loss: their tokens' geometric mean or product; none = they never do
    importance_sequence: SequenceRatio = SequenceRatio.none
    importance_sequence_low: float = number(0.0, at_least=0, at_most=1)  # responses of a lower one leave; 0 = none do
    # responses of a higher one leave; 0 = none do
    importance_sequence_high: float = number(0.0, at_least=1, also=(0,), why="0 is no bound")
    dynamic_sampling: bool = True  # drop groups that are all right or all wrong and sample others (Eq. 11)
    # groups sampled a step, at most this many times prompts_per_step
    max_attempts: float = number(10.0, at_least=1, at_most=1e6)
    max_empty_steps: int = number(
        3, at_least=0
    )  # in a row without any group to train on, then the run stops; 0 = never


@dataclass
class TrainerConfig:
    max_steps: int = number(1000, at_least=1)  # rollout steps
    tokens_per_microbatch: int = number(22528, at_least=1)  # packed tokens in one micro-batch
    # the policy's memory rests on the host while the servers generate: auto = where they share its GPUs
    offload: Offload = Offload.auto


@dataclass
class CheckpointConfig:
    every: int = number(10, at_least=0)  # rollout steps; 0 = only at the end
    keep: int = number(2, at_least=0)  # newest ones; 0 = all
    # which can be loaded under other tensor and pipeline parallel sizes: that of the last of max_steps, or all; gathered on
    # few ranks, in more time and memory
    portable: Portable = Portable.last
    # written while the training goes on, from a copy in host memory; the last one is not
    asynchronous: bool = False
    resume: Resume = Resume.auto  # go on from the run's newest checkpoint, or never
    on_signal: bool = False  # SIGTERM, SIGINT and SIGUSR1 save before they end the run
    on_failed_save: OnFailedSave = OnFailedSave.stop  # a full disk ends the run, or it goes on without that checkpoint
    export: bool = True  # write the trained model as a Hugging Face folder at the end


@dataclass
class EvaluationConfig:
    every: int = number(10, at_least=0)  # rollout steps; 0 = never
    at_start: bool = False  # also before the first step
    samples: int = number(32, at_least=1)  # k of avg@k
    temperature: float = number(1.0, at_least=MIN_TEMPERATURE, at_most=100, also=(0,))  # 0 = greedy
    top_p: float = number(0.7, above=0, at_most=1)  # the likeliest tokens that hold this much probability
    top_k: int = number(-1, at_least=1, also=(-1, 0))  # the k likeliest tokens; -1 or 0 = all
    max_response_length: int = number(0, at_least=0)  # tokens; 0 = rollout.max_response_length
    save_responses: bool = False  # into the per-problem JSONL
    # of examples/evaluate.py: a run's checkpoints/step_*, whose weights replace those of model.path
    checkpoint: str = ""


@dataclass
class LoggerConfig:
    tensorboard: bool = True  # event files under the run's folder
    wandb_project: str = ""  # of Weights & Biases; empty = not used
    progress: bool = True  # bars on the console
    rollout_every: int = number(0, at_least=0)  # rollout steps between Parquet dumps of all samples; 0 = none
    rollout_max_mb: int = number(256, at_least=1)  # bound on one dump
    rollout_tokens: bool = (
        False  # token ids and log-probabilities in the dumps too: with every step, they can be replayed
    )


@dataclass
class RunConfig:
    name: str = "dapo"  # of the run
    output_dir: str = "runs/${name}"  # everything the run writes; the same folder again resumes it
    seed: int = number(1234, at_least=0)  # of data order and sampling
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
