"""The policy: a Megatron-core GPTModel behind five verbs (logprobs, update, export_weights, take, load).

Every method is collective. Packed micro-batches run through Megatron's own schedules; the loss is summed over tokens and
divided once, by Megatron, by the number of response tokens of the whole mini-batch over all data-parallel ranks
(`calculate_per_token_loss`). Metrics are sums divided by the same number.

Shapes: T packed tokens of a micro-batch, B sequences of a batch.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemo_dapo.batching import MicroBatch, pack, plan_minibatches, scatter_logprobs
from nemo_dapo.config import ModelConfig, OptimizerConfig, ParallelConfig, Precision
from nemo_dapo.interfaces import LossFn, NonFiniteGradientError
from nemo_dapo.ledger import ServerMemory
from nemo_dapo.megatron import adapters, checkpoint, saving, weights
from nemo_dapo.megatron.context_parallel import slice_microbatch
from nemo_dapo.megatron.culprits import Culprits
from nemo_dapo.megatron.head import ScoringHead
from nemo_dapo.megatron.memory import PolicyMemory
from nemo_dapo.megatron.moe import ExpertLoad
from nemo_dapo.megatron.optimizer import ddp_config, make_optimizer
from nemo_dapo.megatron.parallel import all_reduce, device, full_float32
from nemo_dapo.megatron.provider import make_provider, tokens_multiple
from nemo_dapo.megatron.router_replay import RouterReplay
from nemo_dapo.mismatch import Mismatch
from nemo_dapo.telemetry.metrics import Max, Mean, Metric
from nemo_dapo.types import Stage, TrainBatch

log = logging.getLogger(__name__)


class MegatronPolicy:
    """Implements `nemo_dapo.interfaces.Policy`. `parallel.initialize` must have been called."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        *,
        tokens_per_microbatch: int,
        temperature: float = 1.0,
        with_reference: bool = False,
        trainable: bool = True,
        offload: bool = False,
        servers: ServerMemory | None = None,
    ) -> None:
        """Without `trainable` it has weights alone, to load, score and export: no gradients, no optimizer states.

        With `offload` memory leaves the device where a stage does not need it; `servers` is what they take of it then.
        """
        if model.precision is Precision.fp32:
            full_float32()
        self.max_tokens, self.fp8 = tokens_per_microbatch, model.fp8
        self.ddp_options = parallel.ddp
        self.source = Path(model.path)
        self.bridge = weights.load_bridge(model.path)
        self.provider = make_provider(self.bridge, model, parallel)
        self.is_adapted = model.lora.rank > 0
        if self.is_adapted:
            self.provider.register_pre_wrap_hook(functools.partial(adapters.add, options=model.lora))
        self.head = ScoringHead(int(self.bridge.hf_pretrained.config.vocab_size), temperature, model.fp32_logits)
        self.model = self._build(trainable=trainable)
        self.exporter = weights.Exporter(self.bridge, self.model)
        self.reference = self._build(trainable=False) if with_reference and not self.is_adapted else None
        self.optimizer: Any = None
        self.scheduler: Any = None
        if trainable:
            checkpoint.keep_bucket_padding(self.model)
            self.optimizer, self.scheduler = make_optimizer(self.model, self.provider, optimizer)
            self._wire_schedule()
        self.expert_load = ExpertLoad(self.model)
        self.replay = RouterReplay(self.model if model.replay_routes else [])
        self.memory = PolicyMemory(self.model, self.optimizer, self.reference, moves=offload, servers=servers)
        self.culprits = Culprits()
        self.mismatch = Mismatch()

    def _build(self, *, trainable: bool) -> list[Any]:
        on_gpu = torch.cuda.is_available()
        model = self.provider.provide_distributed_model(
            ddp_config=ddp_config(self.ddp_options),
            wrap_with_ddp=trainable,
            use_cpu_initialization=not on_gpu,
            data_parallel_random_init=False,
        )
        for chunk in model:
            self.head.install(unwrap_model(chunk))
            chunk.train(trainable)
            if not (trainable and self.is_adapted):  # its base stays frozen
                chunk.requires_grad_(trainable)
        return model

    def _wire_schedule(self) -> None:
        """Tell Megatron's pipeline schedule, which reads them from the model's configuration, of gradients."""
        config = unwrap_model(self.model[0]).config
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._finalize_gradients
        if self.model[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.model]
            config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    # ---------------------------------------------------------------- memory

    @property
    def stage(self) -> Stage:
        return self.memory.stage

    def enter(self, stage: Stage) -> None:
        """See PolicyMemory.enter, and nemo_dapo.stages for who holds what in each stage."""
        self.memory.enter(stage)

    def memory_record(self) -> dict[str, Metric]:
        return self.memory.take_metrics()

    # ---------------------------------------------------------------- forward

    def _forward(self, micro: MicroBatch, chunk: Any) -> Tensor:
        out: Tensor = chunk(
            input_ids=micro.tokens.unsqueeze(0),
            position_ids=micro.positions.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=_sequences_of(micro),
            **self.head.arguments(unwrap_model(chunk), micro.targets),
        )
        return out

    @property
    def replica(self) -> int:
        """This rank's data-parallel replica."""
        return parallel_state.get_data_parallel_rank()

    def owners(self, lengths: Tensor, minibatches: Sequence[Tensor]) -> Tensor:
        """[B] int64: the replica that trains on each sequence."""
        owners = torch.empty(lengths.numel(), dtype=torch.int64)
        for replica, microbatches in enumerate(self._plan(lengths, minibatches)):
            owners[list(itertools.chain.from_iterable(microbatches))] = replica
        return owners

    def _plan(self, lengths: Tensor, minibatches: Sequence[Tensor] | None) -> list[list[list[int]]]:
        return plan_minibatches(
            lengths,
            [torch.arange(lengths.numel())] if minibatches is None else minibatches,
            max_tokens=self.max_tokens,
            hidden_size=self.provider.hidden_size,
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            # The interleaved schedule works in rounds of as many micro-batches as there are stages.
            rounds_of=parallel_state.get_pipeline_model_parallel_world_size() if len(self.model) > 1 else 1,
        )

    def _microbatches(
        self, batch: TrainBatch, minibatches: Sequence[Tensor] | None = None, **logprobs: Tensor | None
    ) -> list[MicroBatch]:
        """This rank's part of its replica's packed share of `batch`; without `minibatches` that is one."""
        cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        chunks = 2 * cp if cp > 1 else 1
        tp = self.provider.tensor_model_parallel_size if self.provider.sequence_parallel else 1
        multiple_of = tokens_multiple(
            self.fp8, context_chunks=chunks * tp, ranks_of_tokens=cp * tp, on_gpu=torch.cuda.is_available()
        )
        mine = self._plan(batch.lengths, minibatches)[self.replica]
        filled = batch.lengths + -batch.lengths % chunks
        # The interleaved schedule of two stages mixes up the shapes that it sends to the next stage and to the one before,
        # which are the same rank: there all packs are equally long.
        at_least = max(int(filled[s].sum()) for s in mine) if len(self.model) > 1 else 0
        packed: Any = functools.partial(
            pack, batch, multiple_of=multiple_of, sequence_multiple=chunks, at_least=at_least
        )
        packs = (packed(sequences, **logprobs) for sequences in mine)
        return [slice_microbatch(micro, cp, cp_rank) for micro in packs]

    def _run(self, model: list[Any], forward_step: Any, microbatches: list[MicroBatch], *, train: bool) -> list[Any]:
        iterators = [iter(microbatches) for _ in model]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(microbatches),
            seq_length=self.max_tokens,
            micro_batch_size=1,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    def logprobs(self, batch: TrainBatch, minibatches: Sequence[Tensor] | None = None) -> Tensor:
        """Log-probability of every response token that this replica trains on: [T] float32 on the host, 0 elsewhere.

        Where routes are replayed, a batch that has none gets those of this pass, which its updates then follow.
        """
        if not self.replay.will_record(batch):
            return self._logprobs_of(self.model, batch, minibatches, self.replay)
        self.replay.begin_recording(batch)
        scored = self._logprobs_of(self.model, batch, minibatches, self.replay)
        batch.routes = self._over_the_replica(self.replay.take_recorded())
        return scored

    def reference_logprobs(self, batch: TrainBatch, minibatches: Sequence[Tensor] | None = None) -> Tensor:
        """The same under the frozen reference model; raises when the policy was built without one.

        That of an adapted policy is the policy without its adapters.
        """
        if self.is_adapted:
            with adapters.switched_off(self.model):
                return self._logprobs_of(self.model, batch, minibatches, RouterReplay([]))
        assert self.reference is not None, "built with with_reference=False"
        with self.memory.reference_here():
            return self._logprobs_of(self.reference, batch, minibatches, RouterReplay([]))

    @torch.no_grad()
    def _logprobs_of(
        self, model: list[Any], batch: TrainBatch, minibatches: Sequence[Tensor] | None, replay: RouterReplay
    ) -> Tensor:
        self.memory.require(Stage.score, Stage.train)

        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
            micro = next(iterator).to(device())
            with replay.routing(micro, chunk):
                out = self._forward(micro, chunk)
            return out, lambda scores, non_loss_data: scores[0, :, 0]

        microbatches = self._microbatches(batch, minibatches)
        scored = self._run(model, forward_step, microbatches, train=False)
        replay.finish()
        total = torch.zeros(batch.tokens.numel(), dtype=torch.float32)
        if self._reports():
            total = scatter_logprobs(microbatches, scored, total.numel())
        return self._over_the_replica(total)

    def _over_the_replica(self, parts: Tensor) -> Tensor:
        """The sum over the ranks that share one replica's tokens and layers."""
        total = all_reduce(parts, group=parallel_state.get_model_parallel_group())
        return all_reduce(total, group=parallel_state.get_context_parallel_group())

    # ---------------------------------------------------------------- update

    def update(
        self,
        batch: TrainBatch,
        loss_fn: LossFn,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None = None,
    ) -> dict[str, Metric]:
        """One optimizer step on `batch`; old_logprobs and ref_logprobs [T] are aligned with `batch.tokens`.

        Returns the loss function's metrics and `loss` as means over response tokens, `grad_norm` (before clipping) with
        the largest one, `lr`, and how a mixture's experts were loaded, the same on every rank. Raises
        NonFiniteGradientError, on every rank and with the weights untouched, instead of stepping.
        """
        self.memory.require(Stage.train)
        self._zero_gradients()
        grad_norm, means = self.accumulate_gradients(batch, loss_fn, old_logprobs, ref_logprobs)
        if not math.isfinite(grad_norm):
            self._zero_gradients()
            raise NonFiniteGradientError(grad_norm, *self.culprits.gather())
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.scheduler.step(increment=1)
        norms: dict[str, Metric] = {"grad_norm": Mean(grad_norm, 1), "grad_norm_max": Max(grad_norm)}
        return means | norms | {"lr": Mean(float(lr), 1)}

    def accumulate_gradients(
        self,
        batch: TrainBatch,
        loss_fn: LossFn,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None = None,
    ) -> tuple[float, dict[str, Metric]]:
        """Forward and backward over all micro-batches: the reduced gradient is left in the optimizer's buffers.

        Returns its norm and the metrics; the gradient is that of (sum of the loss over tokens) / (number of tokens), or
        / (sum of the loss function's `denominator`).
        """
        self.culprits.clear()
        self.mismatch.clear()

        def loss_func(scores: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logprobs, entropy = scores[0].unbind(-1)
            self.culprits.see_tokens(logprobs, micro)
            self.mismatch.see(logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs, micro)
            loss, sums = loss_fn(logprobs, entropy, micro)
            sums = {"loss": loss.detach(), "denominator": micro.mask.sum()} | sums
            return loss, sums["denominator"].int(), sums

        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
            micro = next(iterator).to(device())
            with self.expert_load.counting(micro), self.replay.routing(micro, chunk):
                out = self._forward(micro, chunk)
            return out, functools.partial(loss_func, micro=micro)

        microbatches = self._microbatches(batch, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
        per_microbatch = self._run(self.model, forward_step, microbatches, train=True)
        self.replay.finish()
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        apart = self.mismatch.metrics(all_reduce, counts=self._reports())
        means = self._token_means(batch, loss_fn, per_microbatch)
        return grad_norm, means | apart | self.expert_load.take_metrics()

    def _token_means(self, batch: TrainBatch, loss_fn: LossFn, sums: list[dict[str, Tensor]]) -> dict[str, Metric]:
        """All ranks' sums over the response tokens of the whole batch; the loss over its own denominator."""
        # Ranks of other pipeline stages computed no loss: an empty micro-batch tells them its metrics' names.
        anything = torch.zeros(batch.tokens.numel())
        empty = pack(batch, [], old_logprobs=anything, ref_logprobs=anything)
        nothing = torch.zeros(empty.tokens.numel())
        names = sorted({"loss", "denominator", *loss_fn(nothing, nothing, empty)[1]})
        totals = torch.zeros(len(names), dtype=torch.float64)
        if self._reports():
            for row in sums:
                totals += torch.tensor([float(row[name]) for name in names], dtype=torch.float64)
        everywhere = dict(zip(names, all_reduce(totals).tolist(), strict=True))
        denominator, tokens = everywhere.pop("denominator"), batch.num_response_tokens
        return {name: Mean(total, denominator if name == "loss" else tokens) for name, total in everywhere.items()}

    def _zero_gradients(self) -> None:
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _finalize_gradients(self, model: list[Any], *args: Any, **kwargs: Any) -> None:
        """Megatron's reduction over ranks, after a look at this rank's own gradient."""
        self.culprits.see_gradient(model)
        finalize_model_grads(model, *args, **kwargs)

    def _reports(self) -> bool:
        """Whether this rank speaks for its part of a replica's tokens: one tensor-parallel rank of the last stage does."""
        return (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    # ---------------------------------------------------------------- weights

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, by its Hugging Face name, full, on every rank."""
        self.memory.require(Stage.score, Stage.train, Stage.sync)
        return self.exporter.export()

    def save_hf(self, path: Path) -> None:
        """Write the policy as a Hugging Face directory. Raises on rank 0 where it is not written, or not whole."""
        self.memory.require(Stage.score, Stage.train, Stage.sync)
        weights.save_hf_model(self.exporter.export(), self.source, path)

    def take(self, path: Path, *, portable: bool = True, apart: bool = False) -> saving.Taken:
        """Weights, optimizer and schedule, sharded, as they are to be written to the existing, empty directory `path`.

        A portable checkpoint can be loaded under any layout; else tensor and pipeline parallel sizes must be these, and it
        is written and read faster, in less host memory. In any stage: what is away from the device is read where it is.
        Taken `apart`, a copy: the policy may change before it is written. Raises RuntimeError that names the cause.
        """
        with self.memory.readable():
            return saving.take(path, self.model, self.optimizer, self.scheduler, portable=portable, apart=apart)

    def load(self, path: Path) -> None:
        """Read what was taken and written, also under another data parallel size, or, where it is portable, any layout.

        Weights, moments and the number of steps are the checkpoint's, every option of the optimizer is this policy's. One
        that is not trainable reads the weights alone.
        Raises RuntimeError that names the cause; nothing in the checkpoint is unpickled.
        """
        self.memory.require(Stage.score, Stage.train)
        checkpoint.load(path, self.model, self.optimizer, self.scheduler)


def _sequences_of(micro: MicroBatch) -> PackedSeqParams:
    """Where the sequences of the whole pack begin and end, for attention.

    Under context parallelism they are filled up as sequences of their own, so that filled-up lengths are the lengths;
    Transformer Engine asks for both.
    """
    filled_up = micro.cu_seqlens if parallel_state.get_context_parallel_world_size() > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro.cu_seqlens,
        cu_seqlens_kv=micro.cu_seqlens,
        cu_seqlens_q_padded=filled_up,
        cu_seqlens_kv_padded=filled_up,
        max_seqlen_q=micro.max_seqlen,
        max_seqlen_kv=micro.max_seqlen,
    )
