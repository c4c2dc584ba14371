"""What the policy tests run in child processes: one job a world size, its scenarios in sequence, results in torch files.

Megatron stays out of the pytest process: on a CPU host it needs torch's factories patched (`nemo_dapo.megatron.cpu`).
`main(FOLDER)` runs in a process of its own and forks the ranks; each writes `world<W>-rank<R>.pt`, a dictionary
{scenario: result}, after every scenario, and the traceback under `failed` when one raises, which ends its job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import math
import os
import pickle
import resource
import shutil
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dapo.batching import MicroBatch
from nemo_dapo.config import AlgorithmConfig, DecayStyle, ModelConfig, OptimizerConfig, ParallelConfig, Precision
from nemo_dapo.interfaces import LossFn, NonFiniteGradientError
from nemo_dapo.ledger import Reading, ServerMemory
from nemo_dapo.losses import load_loss_fn
from nemo_dapo.losses.dapo import make_loss_fn
from nemo_dapo.stages import NEXT
from nemo_dapo.telemetry.memory import GIB
from nemo_dapo.telemetry.metrics import values
from nemo_dapo.types import Stage, TrainBatch
from tests.checkpoints import differing
from tests.forks import import_megatron, run_to_their_end
from tests.provider_scenarios import provider_settings

TIMEOUT_MINUTES, SEED = 2.0, 1
VOCAB = 320
ROPE_THETA = 500000.0  # not 10,000: an importer that ignores the model's value must fail
# Wavelengths from 2,048 positions on are stretched: enough to show within 40 positions.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen2_untied": {"family": "qwen2", "tied": False},
    "qwen3_tied": {"family": "qwen3", "tied": True},
    "qwen3_untied": {"family": "qwen3", "tied": False},
    "llama_tied": {"family": "llama", "tied": True},
    "llama_untied": {"family": "llama", "tied": False},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
    "llama_scaled": {"family": "llama", "tied": False, "rope_scaling": LLAMA3_ROPE},
}
UNEVEN = {"three_layers": {"family": "qwen3", "tied": True, "layers": 3}}  # which two pipeline stages share as 2 and 1
NUM_SEQUENCES = 15  # odd: one by one on two ranks leaves one of them an empty micro-batch
LONGEST = 40  # two sequences of 21 to 40 tokens never fit into it: this budget gives one sequence a micro-batch
RARE_TOKEN, RARE_SEQUENCE = VOCAB - 1, 4  # a token that one sequence alone contains


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    sp: bool = False
    overlap: bool = False  # gradients are reduced while others are still computed
    cp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None


OVERLAP = Layout(overlap=True)
TP2, PP2, TP2PP2 = Layout(tp=2, sp=True), Layout(pp=2), Layout(tp=2, pp=2, sp=True)


def make_train_batch(num_sequences: int = NUM_SEQUENCES, seed: int = 0) -> TrainBatch:
    """Random tokens and advantages; sequence RARE_SEQUENCE has RARE_TOKEN in its prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(LONGEST // 2 + 1, LONGEST + 1, (num_sequences,), generator=generator)
    prompt_lengths = torch.randint(2, 9, (num_sequences,), generator=generator)
    tokens = torch.randint(2, RARE_TOKEN, (int(lengths.sum()),), generator=generator)
    if num_sequences > RARE_SEQUENCE:
        tokens[lengths[:RARE_SEQUENCE].sum()] = RARE_TOKEN
    return TrainBatch(
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        rollout_logprobs=torch.zeros(tokens.numel()),
        advantages=torch.randn(num_sequences, generator=generator),
    )


def every_next_token(prefix: list[int]) -> TrainBatch:
    """`prefix` followed by each token of the vocabulary: their log-probabilities are the whole log-softmax."""
    rows = torch.cat([torch.tensor(prefix).repeat(VOCAB, 1), torch.arange(VOCAB).unsqueeze(1)], dim=1)
    lengths = torch.full((VOCAB,), rows.size(1))
    return TrainBatch(rows.flatten(), lengths, lengths - 1, torch.zeros(rows.numel()), torch.zeros(VOCAB))


PREFIX = [5, 7, 250, 11, 300, 3]

# ------------------------------------------------------------------ inside a child


class Job:
    """One child's view of its job: where files lie, and policies under any layout of its ranks."""

    def __init__(self, folder: Path, world_size: int, rank: int) -> None:
        self.folder, self.world_size, self.rank = folder, world_size, rank
        self.laid_out: Layout | None = None  # whose process groups Megatron has

    def join(self, name: str) -> None:
        """Meet the other ranks through a file: no port that another process could take."""
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/{name}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(minutes=TIMEOUT_MINUTES),
        )

    def policy(self, layout: Layout, model: str = "qwen2_tied", *, tokens: int = 128, **options: Any) -> Any:
        """A policy, float32 unless told; Megatron's process groups become those of `layout`."""
        config = ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            sequence_parallel=layout.sp,
            timeout_minutes=TIMEOUT_MINUTES,
            ddp={"overlap_grad_reduce": layout.overlap},
        )
        self.lay_out(layout, config)
        from nemo_dapo.megatron.policy import MegatronPolicy

        optimizer = options.pop("optimizer", OptimizerConfig(lr=1e-3, warmup_steps=0))
        precision = options.pop("precision", Precision.fp32)
        of_model = ("megatron", "lora", "replay_routes")
        config_of_model = {"precision": precision} | {n: options.pop(n) for n in of_model if n in options}
        return MegatronPolicy(
            ModelConfig(path=str(self.folder / "models" / model), **config_of_model),
            config,
            optimizer,
            tokens_per_microbatch=tokens,
            **options,
        )

    def lay_out(self, layout: Layout, config: ParallelConfig) -> None:
        """Groups stay where they do for `layout` too: gloo keeps the threads of old ones, each of which wakes a hundred
        times a second, and a hundred policies leave thousands."""
        from megatron.core import parallel_state, tensor_parallel

        from nemo_dapo.megatron import parallel

        wanted = dataclasses.replace(layout, sp=False, overlap=False)
        if self.laid_out == wanted:
            tensor_parallel.model_parallel_cuda_manual_seed(SEED)
            return
        parallel_state.destroy_model_parallel()
        parallel.initialize(config, SEED)
        self.laid_out = wanted


def weights_of(policy: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in policy.export_weights()}


def logprobs_of_all(policy: Any, batch: TrainBatch) -> Tensor:
    """[T] those of all replicas: each scores what it trains on and leaves 0 elsewhere."""
    from megatron.core import parallel_state

    scored = policy.logprobs(batch)
    dist.all_reduce(scored, group=parallel_state.get_data_parallel_group())
    return scored


def noisy_old_logprobs(policy: Any, batch: TrainBatch) -> Tensor:
    """Old log-probabilities near the policy's own: ratios around 1, some of them clipped, so the loss depends on them."""
    noise = torch.randn(batch.tokens.numel(), generator=torch.Generator().manual_seed(9))
    return logprobs_of_all(policy, batch) + 0.2 * noise


LOSS: LossFn = make_loss_fn(AlgorithmConfig(entropy_coeff=0.01))
# Each divides by something else than the tokens; responses differ in length, so a wrong denominator shows.
VARIANTS: dict[str, LossFn] = {
    "gspo": load_loss_fn(AlgorithmConfig(loss="gspo", clip_low=0.05, clip_high=0.05, entropy_coeff=0.01)),
    "dr_grpo": load_loss_fn(AlgorithmConfig(loss="dr_grpo", loss_length=50, entropy_coeff=0.01)),
}


def full_gradients(policy: Any) -> dict[str, Tensor]:
    """The whole gradient by Hugging Face names, the same on every rank; call after `accumulate_gradients`.

    After the reduce-scatter a data-parallel rank holds its own shard only, so the rest is zeroed and the shards summed;
    tensor and pipeline shards come together by exporting the gradient as if it were the weights.
    """
    for chunk in policy.model:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(dist.get_world_size(group), -1)
                mine = shards[dist.get_rank(group)].clone()
                shards.zero_()
                shards[dist.get_rank(group)] = mine
                dist.all_reduce(bucket.grad_data, group=group)
    parameters = [p for chunk in policy.model for p in chunk.parameters()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.copy_(p.main_grad)
        gradients = weights_of(policy)
        for p, weight in zip(parameters, kept, strict=True):
            p.copy_(weight)
    return gradients


def gradient_with(policy: Any, batch: TrainBatch, loss_fn: LossFn, old: Tensor, budget: int) -> dict[str, Any]:
    policy.max_tokens = budget
    policy._zero_gradients()
    norm, sums = policy.accumulate_gradients(batch, loss_fn, old)
    return {
        "gradient": full_gradients(policy),
        "norm": norm,
        "sums": sums,
        "microbatches": len(policy._microbatches(batch)),
    }


def per_microbatch(num_tokens: int, num_microbatches: int) -> LossFn:
    """The mistake "mean of the micro-batches' means", scaled so that it is right when there is one micro-batch."""

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = LOSS(logprobs, entropy, micro)
        return loss * num_tokens / (micro.mask.sum().clamp(min=1) * num_microbatches), sums

    return loss_fn


def per_rank(num_tokens: int, tokens_of_rank: int, num_ranks: int) -> LossFn:
    """The mistake "each rank divides by its own tokens, then ranks are averaged"."""

    def loss_fn(logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = LOSS(logprobs, entropy, micro)
        return loss * num_tokens / (tokens_of_rank * num_ranks), sums

    return loss_fn


def budgets(batch: TrainBatch) -> dict[str, int]:
    """Token budgets that cut `batch` into 1, 3 and 8 micro-batches on one rank, and into one a sequence."""
    total = int(batch.lengths.sum())
    return {"1": total, "3": math.ceil(total / 3) + 10, "8": 2 * LONGEST, "one_by_one": LONGEST}


def gradients(job: Job) -> dict[str, Any]:
    """The same batch under every token budget, right and with both wrong normalisers."""
    batch = make_train_batch()
    policy = job.policy(Layout())
    old = noisy_old_logprobs(policy, batch)
    tokens = batch.num_response_tokens
    out: dict[str, Any] = {}
    for name, budget in budgets(batch).items():
        out[name] = gradient_with(policy, batch, LOSS, old, budget)
        micros = policy._microbatches(batch)
        mine = sum(int(micro.mask.sum()) for micro in micros)
        wrong = per_microbatch(tokens, len(micros) * job.world_size)
        out[f"{name} per micro-batch"] = gradient_with(policy, batch, wrong, old, budget)
        wrong = per_rank(tokens, mine, job.world_size)
        out[f"{name} per rank"] = gradient_with(policy, batch, wrong, old, budget)
        for variant, loss_fn in VARIANTS.items():
            out[f"{name} {variant}"] = gradient_with(policy, batch, loss_fn, old, budget)
    return out


def first_step(
    layout: Layout, models: Sequence[str] = ("qwen2_tied", "qwen3_untied")
) -> Callable[[Job], dict[str, Any]]:
    def scenario(job: Job) -> dict[str, Any]:
        out = {}
        for model in models:
            policy, batch = job.policy(layout, model), make_train_batch()
            old = noisy_old_logprobs(policy, batch)
            result = gradient_with(policy, batch, LOSS, old, 128)
            metrics = values(policy.update(batch, LOSS, old))
            out[model] = result | {"metrics": metrics, "logprobs_after": logprobs_of_all(policy, batch)}
        return out

    return scenario


def shared_batch(layout: Layout) -> Callable[[Job], dict[str, Any]]:
    """Two optimizer steps from the whole batch, and from the share that `share_batch` leaves on each rank."""

    def scenario(job: Job) -> dict[str, Any]:
        from nemo_dapo.batching import minibatches
        from nemo_dapo.collectives import gather_json
        from nemo_dapo.coordination import share_batch

        whole, out = make_train_batch(), {}
        whole.tokens = whole.tokens.to(torch.int32)
        steps = minibatches(whole.num_sequences, 8, 1)
        for name in ("whole", "share"):
            policy = job.policy(layout)
            batch = whole
            if name == "share":
                owners = functools.partial(policy.owners, minibatches=steps)
                batch = share_batch(whole if job.rank == 0 else None, None, gather_json(policy.replica), owners)
            old = policy.logprobs(batch, steps)
            metrics = []
            for chosen in steps:
                tokens = batch.token_indices(chosen)
                metrics.append(values(policy.update(batch.select(chosen), LOSS, old[tokens] - 0.1)))
            out[name] = {"metrics": metrics, "weights": weights_of(policy), "tokens": batch.tokens.numel()}
            out[name]["old"] = float(old.double().sum())
        return out

    return scenario


def parity(layout: Layout) -> Callable[[Job], dict[str, Any]]:
    """What a Hugging Face model must reproduce, before and after an update, in both forms of export."""

    def scenario(job: Job) -> dict[str, Any]:
        out = {}
        for model in MODELS:
            policy, batch, vocabulary = job.policy(layout, model), make_train_batch(), every_next_token(PREFIX)
            before = policy.logprobs(batch), policy.logprobs(vocabulary)
            policy.update(batch, LOSS, None)
            saved = job.folder / f"export-{job.world_size}-{model}"
            policy.save_hf(saved)
            out[model] = {
                "before": before,
                "after": (policy.logprobs(batch), policy.logprobs(vocabulary)),
                "weights": weights_of(policy),
                "saved": saved,
            }
        return out

    return scenario


OBJECT_COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


def exports(job: Job) -> dict[str, Any]:
    """Two exports with an update in between, the object collectives during each, and what an export without tasks gives."""
    policy, counts = job.policy(TP2PP2, "qwen2_tied"), []
    calls: list[str] = []

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(collective.__name__)
            return collective(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for name in OBJECT_COLLECTIVES:
            patches.enter_context(mock.patch.object(dist, name, counted(getattr(dist, name))))
        for _ in range(2):
            policy.update(make_train_batch(), LOSS, None)
            calls.clear()
            exported = weights_of(policy)
            counts.append(len(calls))
    plain = policy.bridge.export_hf_weights(policy.model, cpu=False, show_progress=False)
    return {"counts": counts, "exported": exported, "plain": {name: one.clone() for name, one in plain}}


def temperature(job: Job) -> Tensor:
    return job.policy(Layout(), temperature=0.7).logprobs(make_train_batch())


def _save(job: Job, policy: Any, name: str, *, portable: bool = True) -> Path:
    path = _folder(job, name)
    policy.take(path, portable=portable).complete()
    return path


def _folder(job: Job, name: str) -> Path:
    path = job.folder / name
    path.mkdir(exist_ok=True)
    dist.barrier()
    return path


def checkpoint(layout: Layout, name: str, *, portable: bool = True) -> Callable[[Job], dict[str, Any]]:
    """Update, save, update; then load into a fresh policy and update again. Another one is taken beside the saved one and
    written, by a thread, after the next update."""

    def scenario(job: Job) -> dict[str, Any]:
        batch, policy = make_train_batch(), job.policy(layout)
        policy.update(batch, LOSS, None)
        path = _save(job, policy, name, portable=portable)
        behind = _folder(job, f"{name}-behind")
        taken = policy.take(behind, portable=portable, apart=True)
        out = {"saved": weights_of(policy), "next_metrics": values(policy.update(batch, LOSS, None))}
        with ThreadPoolExecutor(1) as thread:
            thread.submit(taken.write).result()
        dist.barrier()
        taken.finish()
        dist.barrier()
        out["written behind differs in"] = differing(path, behind)
        return out | {"next": weights_of(policy)} | {"loaded": load_and_update(job, layout, path)}

    return scenario


def refused_saves(job: Job) -> dict[str, str]:
    """What is said where there is no memory for a copy, and where files must be smaller than they are."""
    policy, said = job.policy(Layout()), {}
    policy.update(make_train_batch(), LOSS, None)
    with mock.patch("psutil.virtual_memory", return_value=mock.Mock(available=1000)):
        said["no memory"] = error_of(lambda: policy.take(_folder(job, "no memory"), apart=True))
    taken = policy.take(_folder(job, "small files"), apart=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        said["small files"] = error_of(taken.write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return said


def load_and_update(job: Job, layout: Layout, path: Path) -> dict[str, Any]:
    """A fresh policy from `path`: its weights and its next update."""
    policy = job.policy(layout)
    policy.load(path)
    weights = weights_of(policy)
    metrics = values(policy.update(make_train_batch(), LOSS, None))
    return {"weights": weights, "next": weights_of(policy), "metrics": metrics}


def forgetful_load(job: Job) -> dict[str, Tensor]:
    """The weights after the next update, had Adam forgotten its first moments."""
    policy = job.policy(Layout())
    policy.load(job.folder / "ck1")
    for optimizer in policy.optimizer.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
    policy.update(make_train_batch(), LOSS, None)
    return weights_of(policy)


def load_from(layout: Layout, name: str) -> Callable[[Job], dict[str, Any]]:
    return lambda job: load_and_update(job, layout, job.folder / name)


BASE_OPTIONS = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, decay_steps=12, decay_style=DecayStyle.linear)
CHANGED_OPTIONS: dict[str, Any] = {
    "lr": 2e-3,
    "min_lr": 5e-4,
    "weight_decay": 0.5,
    "clip_grad": 1e-3,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_eps": 1e-3,
    "warmup_steps": 6,
    "decay_steps": 6,
    "decay_style": DecayStyle.constant,
}


def changed_options(job: Job) -> dict[str, Any]:
    """After three updates: a checkpoint continued under each option changed alone, by `load` and by hand."""
    batch, policy = make_train_batch(), job.policy(Layout(), optimizer=BASE_OPTIONS)
    for _ in range(3):
        policy.update(batch, LOSS, None)
    path = _save(job, policy, "options")

    def loaded(options: OptimizerConfig) -> Any:
        fresh = job.policy(Layout(), optimizer=options)
        fresh.load(path)
        return fresh

    source = loaded(BASE_OPTIONS)
    out = {}
    for name, value in {"nothing": None, **CHANGED_OPTIONS}.items():
        options = BASE_OPTIONS if value is None else dataclasses.replace(BASE_OPTIONS, **{name: value})
        continued, by_hand = loaded(options), job.policy(Layout(), optimizer=options)
        transplant(source, by_hand)
        out[name] = {
            "groups": [
                {key: one for key, one in g.items() if key != "params"} for g in continued.optimizer.param_groups
            ],
            "lr": continued.update(batch, LOSS, None)["lr"].value,
            "lr by hand": by_hand.update(batch, LOSS, None)["lr"].value,
            "weights": weights_of(continued),
            "weights by hand": weights_of(by_hand),
        }
    return out


@torch.no_grad()
def transplant(source: Any, target: Any) -> None:
    """Weights, moments and the number of steps of one policy into another of the same layout; no option."""
    for a, b in zip(source.model[0].parameters(), target.model[0].parameters(), strict=True):
        b.copy_(a)
    for a, b in zip(source.optimizer.chained_optimizers, target.optimizer.chained_optimizers, strict=True):
        for ours, theirs in zip(a.optimizer.param_groups, b.optimizer.param_groups, strict=True):
            theirs["step"] = ours["step"]
            for p, q in zip(ours["params"], theirs["params"], strict=True):
                q.copy_(p)
                b.optimizer.state[q] = {key: moment.clone() for key, moment in a.optimizer.state[p].items()}
    target.scheduler.num_steps = source.scheduler.num_steps
    target.scheduler.step(0)


class Payload:
    """What an attacker would pickle: unpickled, it creates the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def payloads(job: Job) -> dict[str, Any]:
    """What `load` says of a checkpoint with a payload in one of three places, and which payloads were executed."""
    folder = job.folder / "payloads"
    said, executed = {}, []
    for place in (infect_table, infect_common, infect_shard):
        copy, marker = folder / place.__name__, folder / f"{place.__name__}.executed"
        shutil.copytree(job.folder / "ck1", copy)
        place(copy, Payload(marker))
        said[place.__name__] = error_of(lambda at=copy: job.policy(Layout()).load(at))  # type: ignore[misc]
        if marker.exists():
            executed.append(place.__name__)
    pickle.loads(pickle.dumps(Payload(folder / "control")))
    return {"said": said, "executed": executed, "control": (folder / "control").exists()}


def infect_table(path: Path, payload: Payload) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(payload))


def infect_common(path: Path, payload: Payload) -> None:
    torch.save({"scheduler": payload}, path / "common.pt")


def infect_shard(path: Path, payload: Payload) -> None:
    """An object behind the last byte of a shard, to which the table of contents leads."""
    table = pickle.loads((path / ".metadata").read_bytes())  # our own
    index = next(iter(table.storage_data))
    info = table.storage_data[index]
    file = path / info.relative_path
    offset = file.stat().st_size
    with file.open("ab") as shard:
        torch.save([payload], shard)
    table.storage_data[index] = dataclasses.replace(info, offset=offset, length=file.stat().st_size - offset)
    (path / ".metadata").write_bytes(pickle.dumps(table))


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return ""


def unreadable(job: Job) -> dict[str, str]:
    """What `load` says of what it cannot read."""
    cut = job.folder / "cut"
    shutil.copytree(job.folder / "ck1", cut)
    shard = cut / "__0_1.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    without = job.folder / "without common.pt"
    shutil.copytree(job.folder / "ck1", without)
    (without / "common.pt").unlink()
    return {
        "cut shard": error_of(lambda: job.policy(Layout()).load(cut)),
        "no common.pt": error_of(lambda: job.policy(Layout()).load(without)),
        "another model": error_of(lambda: job.policy(Layout(), "qwen3_untied").load(job.folder / "ck1")),
    }


def checkpoint_without_padding(job: Job) -> dict[str, Any]:
    """A checkpoint under Megatron's own count of bucket padding: what `keep_bucket_padding` is for."""
    from nemo_dapo.megatron import checkpoint as module

    keep, module.keep_bucket_padding = module.keep_bucket_padding, lambda model: None
    try:
        return checkpoint(TP2PP2, "unpadded")(job)
    finally:
        module.keep_bucket_padding = keep


def saved_twice(job: Job) -> list[bytes]:
    """This rank's files of the same state, lying by rank, saved after other things lay in memory."""
    policy, files = job.policy(Layout()), []
    policy.update(make_train_batch(), LOSS, None)
    for number in range(2):
        noise = [torch.full((256 * (i + 1),), float(number + 1)) for i in range(40)]
        del noise
        path = _save(job, policy, f"twice {number}", portable=False)
        files.append(b"".join(one.read_bytes() for one in sorted(path.glob(f"__{job.rank}_*.distcp"))))
    return files


def another_layout(job: Job) -> str:
    """What is said of a checkpoint whose optimizer states lie by rank, of TP2, under TP2 x PP2."""
    return error_of(lambda: job.policy(TP2PP2).load(job.folder / "ck2 by rank"))


def stage_round(layout: Layout, precision: Precision) -> Callable[[Job], dict[str, Any]]:
    """Two updates with all memory on the device; then the same with a round through every stage between them."""
    in_words: dict[str, Any] = {"precision": precision, "with_reference": True}

    def scenario(job: Job) -> dict[str, Any]:
        batch, folder = make_train_batch(), f"stages-{job.world_size}-{layout.tp}{layout.pp}{precision.value}"
        plain = job.policy(layout, **in_words)
        expected: dict[str, Any] = {"first": values(plain.update(batch, LOSS, None)), "scores": plain.logprobs(batch)}
        expected |= {"reference": plain.reference_logprobs(batch), "next": values(plain.update(batch, LOSS, None))}
        expected |= {"weights": weights_of(plain)}

        policy = job.policy(layout, **in_words, offload=True)
        seen: dict[Stage | str, Any] = {"refused": refused_orders(policy)}
        got: dict[str, Any] = {"first": values(policy.update(batch, LOSS, None))}
        held = held_tensors(policy)
        before = {name: tensor.clone() for name, tensor in held.items()}
        _save(job, policy, f"{folder}-train")
        for stage in (Stage.sync, Stage.generate):
            policy.enter(stage)
            policy.enter(stage)
            seen |= {stage: {name: tensor.untyped_storage().nbytes() for name, tensor in held.items()}}
            seen["refused"] |= refused_orders(policy)
            _save(job, policy, f"{folder}-{stage.value}", portable=stage is Stage.sync)
        seen["refused verbs"] = [error_of(verb) for verb in (policy.export_weights, lambda: policy.logprobs(batch))]
        policy.enter(Stage.score)
        got |= {"scores": policy.logprobs(batch), "reference": policy.reference_logprobs(batch)}
        seen["reference after use"] = sum(p.untyped_storage().nbytes() for p in policy.reference[0].parameters())
        seen["refused update"] = error_of(lambda: policy.update(batch, LOSS, None))
        policy.enter(Stage.train)
        seen["equal"] = {name: torch.equal(tensor, before[name]) for name, tensor in held.items()}
        seen["gradients"] = {float(b.grad_data.abs().max()) for c in policy.model for b in c.buffers}
        got |= {"next": values(policy.update(batch, LOSS, None)), "weights": weights_of(policy)}
        for name in ("train", "sync", "generate"):
            loaded = job.policy(layout, **in_words)
            loaded.load(job.folder / f"{folder}-{name}")
            seen[f"loaded {name}"] = all(
                torch.equal(tensor, before[key]) for key, tensor in held_tensors(loaded).items() if key != "gradients"
            )
        return {"expected": expected, "got": got, "seen": seen}

    return scenario


def weights_alone(job: Job) -> dict[str, Any]:
    """A policy that is not to be trained reads a checkpoint, rests on the host, and is exported and scored."""
    policy, batch = job.policy(Layout(), trainable=False, offload=True), make_train_batch()
    policy.load(job.folder / "ck1")
    parameters = list(policy.model[0].parameters())
    refused = error_of(lambda: policy.update(batch, LOSS, None))
    policy.enter(Stage.sync)
    out = {"weights": weights_of(policy), "refused": refused, "optimizer": policy.optimizer}
    policy.enter(Stage.generate)
    out["bytes"] = sum(p.untyped_storage().nbytes() for p in parameters)
    policy.enter(Stage.score)
    trained = job.policy(Layout())
    trained.load(job.folder / "ck1")
    return out | {"scores": policy.logprobs(batch), "trained scores": trained.logprobs(batch)}


def held_tensors(policy: Any) -> dict[str, Tensor]:
    """Parameters, master weights, moments, and the flat buffer of the gradients."""
    named = {f"parameter {i} {n}": p.data for i, c in enumerate(policy.model) for n, p in c.named_parameters()}
    inner = policy.optimizer.chained_optimizers[0].optimizer
    for i, (tensor, state) in enumerate(inner.state.items()):
        named |= {f"master {i}": tensor.data} | {f"{key} {i}": value for key, value in state.items()}
    return named | {"gradients": policy.model[0].buffers[0].grad_data}


def refused_orders(policy: Any) -> dict[tuple[Stage, Stage], str]:
    """What is said of every stage that may not follow the present one."""
    wrong = [stage for stage in Stage if stage not in (policy.stage, *NEXT[policy.stage])]
    return {(policy.stage, stage): error_of(functools.partial(policy.enter, stage)) for stage in wrong}


def ledger_of_made_up_readings(job: Job) -> dict[Any, Any]:
    """Rank 1 alone is short of memory, first for the servers' weights, then for their cache."""
    policy = job.policy(Layout(), offload=True, servers=ServerMemory(weights=10 * GIB, cache=40 * GIB))
    out: dict[Any, Any] = {}
    policy.update(make_train_batch(), LOSS, None)
    short = Reading(free=5 * GIB, total=80 * GIB, allocated=30 * GIB, reserved=33 * GIB)
    roomy = Reading(free=60 * GIB, total=80 * GIB, allocated=2 * GIB, reserved=3 * GIB)
    for stage in (Stage.sync, Stage.generate):
        policy.memory.read = lambda: short if job.rank == 1 else roomy
        try:
            policy.enter(stage)
        except RuntimeError as error:
            out[stage] = type(error).__name__, str(error), policy.stage
        policy.memory.read = lambda: roomy
        policy.enter(stage)
    return out | {"metrics": policy.memory_record(), "then": policy.memory_record()}


def shrink(job: Job) -> dict[str, Any] | None:
    """The job ends; rank 0 goes on alone and loads what all four saved."""
    from nemo_dapo.megatron import parallel

    parallel.shut_down()
    job.laid_out = None
    if job.rank:
        return None
    job.world_size = 1
    job.join("alone")
    by_rank = load_and_update(job, Layout(), job.folder / "ck4 by rank")
    return load_and_update(job, Layout(), job.folder / "ck4") | {"by rank": by_rank}


def non_finite(layout: Layout) -> Callable[[Job], dict[str, Any]]:
    """A weight that is NaN (it reaches one sequence), then an advantage that is; then a good update."""

    def attempt(policy: Any, batch: TrainBatch) -> dict[str, Any]:
        before = {name: p.detach().clone() for name, p in policy.model[0].named_parameters()}
        try:
            policy.update(batch, LOSS, None)
        except NonFiniteGradientError as error:
            after = dict(policy.model[0].named_parameters())
            same = all(torch.equal(after[name].nan_to_num(7.0), p.nan_to_num(7.0)) for name, p in before.items())
            return {"ranks": error.ranks, "sequences": error.sequences, "message": str(error), "untouched": same}
        return {}

    def scenario(job: Job) -> dict[str, Any]:
        policy, batch = job.policy(layout, "qwen3_untied", tokens=LONGEST), make_train_batch()
        embeddings = [p for n, p in policy.model[0].named_parameters() if "word_embeddings" in n]
        tokens_of_rank = {int(s) for micro in policy._microbatches(batch) for s in micro.sequence.unique()}
        rows = [(e, RARE_TOKEN - (e.size(0) * (job.rank % layout.tp))) for e in embeddings]
        rows = [(e, row) for e, row in rows if 0 <= row < e.size(0)]
        kept = [e[row].detach().clone() for e, row in rows]
        with torch.no_grad():
            for e, row in rows:
                e[row] = math.nan
        weight = attempt(policy, batch)
        with torch.no_grad():
            for (e, row), before in zip(rows, kept, strict=True):
                e[row] = before
        poisoned = make_train_batch()
        poisoned.advantages[RARE_SEQUENCE] = math.nan
        advantage = attempt(policy, poisoned)
        metrics = values(policy.update(batch, LOSS, None))
        clean = job.policy(layout, "qwen3_untied", tokens=LONGEST)
        return {
            "holds_sequence": RARE_SEQUENCE in tokens_of_rank,
            "weight": weight,
            "advantage": advantage,
            "metrics": metrics,
            "clean_metrics": values(clean.update(batch, LOSS, None)),
        }

    return scenario


def own_gradient(job: Job) -> dict[Any, Any]:
    """Whether this rank's gradient counts as finite when its own shard, or another one, holds what it should not.

    `reduced`: the reduce-scatter has begun, as `overlap_grad_reduce` has it.
    """
    from nemo_dapo.megatron.culprits import own_parts

    buffer = job.policy(Layout()).model[0].buffers[0]
    out: dict[Any, Any] = {}
    for reduced in (False, True):
        buffer.ddp_config.overlap_grad_reduce = reduced
        for shard in range(job.world_size):
            buffer.grad_data.zero_()
            buffer.buckets[0].grad_data.view(job.world_size, -1)[shard, 0] = math.nan
            finite = all(bool(part.isfinite().all()) for part in own_parts(buffer))
            out["reduced" if reduced else "local", "own shard" if shard == job.rank else "other shard"] = finite
    return out


def reference_model(job: Job) -> dict[str, Any]:
    loss_fn = make_loss_fn(AlgorithmConfig(kl_coeff=0.1))
    policy, batch = job.policy(Layout(), with_reference=True), make_train_batch()
    out: dict[str, Any] = {"start": policy.logprobs(batch), "reference": [], "kl": []}
    for _ in range(3):
        reference = policy.reference_logprobs(batch)
        out["reference"].append(reference)
        out["kl"].append(policy.update(batch, loss_fn, None, reference)["kl"].value)
    return out | {"end": policy.logprobs(batch), "reference_end": policy.reference_logprobs(batch)}


SCHEDULES = {
    "constant": OptimizerConfig(lr=1e-3, warmup_steps=4),
    "linear": OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, decay_steps=6, decay_style=DecayStyle.linear),
}


def learning_rates(job: Job) -> dict[str, list[float]]:
    batch = make_train_batch(2)
    out = {}
    for name, optimizer in SCHEDULES.items():
        policy = job.policy(Layout(), optimizer=optimizer)
        out[name] = [policy.update(batch, LOSS, None)["lr"].value for _ in range(8)]
    return out


def packed_attention(job: Job) -> dict[str, Any]:
    """PackedSDPA with 4 query and 2 key-value heads on a pack of 3 sequences."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_dapo.megatron.attention import PackedSDPA

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    config.attention_dropout = 0.0
    attention = PackedSDPA(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(17, heads, 8, generator=generator) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=11, max_seqlen_kv=11)
    out = attention(q, k, v, None, packed_seq_params=packed)
    return {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "out": out}


def sharded_scores(job: Job) -> dict[str, Any]:
    """`score_targets` of 2 vocabulary shards of 96 rows; with 90 of them real the second holds nothing but padding."""
    from nemo_dapo.megatron.logprobs import score_targets

    everyone = dist.group.WORLD
    assert everyone is not None
    out = {}
    for name, vocab_size in (("both", 150), ("padding", 90)):
        hidden, weight, targets = score_inputs(vocab_size, rows=192)
        shard = weight.chunk(2)[job.rank].clone().requires_grad_()
        hidden.requires_grad_()
        logprobs, entropy = score_targets(
            hidden, shard, targets, group=everyone, vocab_size=vocab_size, temperature=0.7
        )
        out[name] = with_gradients(logprobs, entropy, hidden, shard)
    return out


def with_gradients(logprobs: Tensor, entropy: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Scores [T], and the gradients of `score_objective` in what they were computed from."""
    score_objective(logprobs, entropy).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
    }


def score_inputs(vocab_size: int, *, rows: int, tokens: int = 23, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [rows, H] with huge padding rows, targets [T]; the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, hidden, generator=generator)
    weight[vocab_size:] = 100.0  # padding that took part would win every softmax
    states = torch.randn(tokens, hidden, generator=generator)
    return states, weight, torch.randint(0, vocab_size, (tokens,), generator=generator)


def score_objective(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A scalar in which each output of each token has a weight of its own."""
    weights = torch.linspace(-1.0, 2.0, logprobs.numel(), dtype=logprobs.dtype)
    return (weights * logprobs).sum() + (weights.flip(0) * entropy).sum()


SCENARIOS: dict[int, dict[str, Callable[[Job], Any]]] = {
    1: {
        "first_step": first_step(Layout()),
        "checkpoint": checkpoint(Layout(), "ck1"),
        "refused saves": refused_saves,
        "forgetful load": forgetful_load,
        "weights alone": weights_alone,
        "changed options": changed_options,
        "payloads": payloads,
        "unreadable": unreadable,
        "gradients": gradients,
        "parity": parity(Layout()),
        "temperature": temperature,
        "reference_model": reference_model,
        "learning_rates": learning_rates,
        "uneven": first_step(Layout(), [*UNEVEN]),
        "provider_settings": provider_settings,
        "packed_attention": packed_attention,
    },
    2: {  # those of one layout side by side: see Job.lay_out
        "stages tp2": stage_round(TP2, Precision.bf16),
        "first_step tp2": first_step(TP2),
        "parity": parity(TP2),
        "by rank tp2": checkpoint(TP2, "ck2 by rank", portable=False),
        "stages pp2": stage_round(PP2, Precision.fp32),
        "first_step pp2": first_step(PP2),
        "non_finite pp2": non_finite(PP2),
        "checkpoint pp2": checkpoint(PP2, "ck2"),
        "uneven pp2": first_step(PP2, [*UNEVEN]),
        "stages dp2": stage_round(Layout(), Precision.bf16),
        "stages dp2 fp32": stage_round(Layout(), Precision.fp32),
        "ledger": ledger_of_made_up_readings,
        "own_gradient": own_gradient,
        "sharded_scores": sharded_scores,
        "first_step dp2": first_step(Layout()),
        "first_step overlap": first_step(OVERLAP),
        "gradients": gradients,
        "non_finite dp2": non_finite(Layout()),
        "shared_batch dp2": shared_batch(Layout()),
        "saved twice": saved_twice,
    },
    4: {
        "first_step tp2pp2": first_step(TP2PP2),
        "exports": exports,
        "checkpoint": checkpoint(TP2PP2, "ck4"),
        "checkpoint without padding": checkpoint_without_padding,
        "load from one rank": load_from(TP2PP2, "ck1"),
        "by rank under another layout": another_layout,
        "shared_batch tp2": shared_batch(TP2),
        "by rank on twice the replicas": load_from(TP2, "ck2 by rank"),
        "by rank dp4": checkpoint(Layout(), "ck4 by rank", portable=False),
        "load on one rank": shrink,
    },
}


def run_rank(folder: Path, world_size: int, rank: int) -> None:
    """One rank's scenarios in sequence, in a fresh process."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    file = folder / f"world{world_size}-rank{rank}.pt"
    job = Job(folder, world_size, rank)
    job.join(f"meet{world_size}")
    for name, scenario in SCENARIOS[world_size].items():
        try:
            results[name] = scenario(job)
        except Exception:
            results["failed"] = f"scenario {name!r} on rank {rank} of {world_size}:\n{traceback.format_exc()}"
            torch.save(results, file)
            raise
        torch.save(results, file)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(folder: Path) -> None:
    import_megatron()
    for world_size in SCENARIOS:
        run_to_their_end([(run_rank, (folder, world_size, rank)) for rank in range(world_size)])
