"""Weight transfer inside a vLLM server: loads what lies in the node's memory or comes to its devices, and refuses what is
not whole.

Written for vLLM 0.20 to 0.33: engines of 0.20 get `load_weights` passed in and reload layer by layer in the worker; later
ones own the model and the whole update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from nemo_dapo.rollout.weights.incoming import Incoming
from nemo_dapo.rollout.weights.read import read_weights, require_unchanged

BACKEND = "nemo_dapo"  # as in command.py, which must not be imported here: it needs the trainer's packages

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], Any]


@dataclass
class InitInfo(WeightTransferInitInfo):
    """An NCCL group to join, where weights are to come by broadcasts; see broadcast.py."""

    group: dict[str, Any] | None = None


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A whole update in a folder (push.Held), a piece of one, or, with the digest alone, its end."""

    version: int
    folder: str = ""
    digest: str = ""
    piece: dict[str, Any] | None = None


class NodeWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads full weights in checkpoint format from the node's folder, usually on /dev/shm, or from pieces.

    Raises ValueError, which names it, for a tensor that is not as it was sent, and at the end of an update when a parameter
    of an unquantised model was not loaded; RuntimeError when the folder was written to meanwhile.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    _incoming: Incoming | None = None  # of a server whose weights come to its devices; not with vLLM 0.20

    @property
    def incoming(self) -> Incoming:
        if self._incoming is None:
            parallel = self.parallel_config
            worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
            self._incoming = Incoming(self.device, worker)
        return self._incoming

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        if init_info.group:
            self.incoming.join(init_info.group)

    def shutdown(self) -> None:
        if self._incoming is not None:
            self._incoming.leave()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.20; the trainer's side is nemo_dapo.rollout.weights."""
        raise NotImplementedError("send the weights through nemo_dapo.rollout.weights")

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] | None = set()
        self._folder: tuple[Path, str] | None = None
        if self._incoming is not None:
            self._incoming.begin()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises the accelerator, which a CPU host does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo, load_weights: LoadWeights | None = None) -> None:
        version, digest = update_info.version, update_info.digest
        if update_info.piece is not None:
            self._load(self.incoming.receive(version, update_info.piece), load_weights)
        elif update_info.folder:
            self._folder = Path(update_info.folder), digest
            self._load(read_weights(self._folder[0], version, digest), load_weights)
            require_unchanged(*self._folder)
        else:
            self.incoming.finish(version, digest)

    def _load(self, weights: Iterable[tuple[str, Tensor]], load_weights: LoadWeights | None) -> None:
        if load_weights is not None:
            load_weights(weights)
            return
        loaded = getattr(self.model, "load_weights")(weights)  # noqa: B009 (of the model, not of nn.Module)
        if not isinstance(loaded, (set, frozenset)):
            self._loaded = None  # a model that does not say what it loaded cannot be checked
        elif self._loaded is not None:
            self._loaded |= loaded

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_tied_output(self.model)
            repack_experts(self.model)
        if self._folder is not None:  # a layer keeps what it was given until all of it is there
            require_unchanged(*self._folder)
        quantised = getattr(self.model_config, "quantization", None) is not None
        if self._loaded is not None and not quantised and (missing := self._parameters - self._loaded):
            raise ValueError(
                f"{len(missing)} parameters of the served model were not in the update: {sorted(missing)[:8]}; the "
                "trainer must export every parameter of the model that vLLM serves"
            )


def repack_tied_output(model: torch.nn.Module) -> None:
    """Refresh the CPU backend's packed copy of a tied output layer, which a reload leaves with the old weights.

    The reload processes the embedding, whose parameter the output layer shares, but the packed copy hangs on the output
    layer (vLLM's reload names this limitation).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embeddings = {id(m.weight) for m in modules if type(m) is VocabParallelEmbedding and hasattr(m, "weight")}
    for module in modules:
        if isinstance(module, ParallelLMHead) and id(getattr(module, "weight", None)) in embeddings:
            module.quant_method.process_weights_after_loading(module)


def repack_experts(model: torch.nn.Module) -> None:
    """Put a mixture's new weights into the layout that the CPU backend's kernel reads.

    vLLM does so at the first load alone (seen in 0.32, UnquantizedFusedMoEMethod._setup_kernel): after a reload the kernel
    would read plain rows as packed ones.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)


def register() -> None:
    """Make the backend known to this vLLM process, once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, NodeWeightTransferEngine)
