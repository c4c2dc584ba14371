"""The part that runs inside a vLLM server: weight transfer through files in host memory, and a guard for its routes.

vLLM loads `register` through the `vllm.general_plugins` entry point in each of its processes. The trainer's side is
`weight_sync.py`; it never imports this module, which needs vLLM. Written for vLLM 0.20 to 0.33: engines of 0.20 get
`load_weights` passed in and reload layer by layer in the worker; later ones own the model and the whole update.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import torch
from safetensors.torch import load_file
from starlette.responses import PlainTextResponse
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from nemo_dapo.rollout import vllm_route, wire
from nemo_dapo.rollout.challenge import NONCE_PARAMETER, proof

BACKEND = "nemo_dapo_host_memory"  # as in command.py, which must not be imported here: it needs the trainer's packages
OPEN_PATHS = ("/health", "/ping", "/metrics")

LoadWeights = Callable[[Iterable[tuple[str, Tensor]]], Any]


@dataclass
class HostMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class HostMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One whole update: safetensors files, in the order in which they are read, one at a time."""

    paths: list[str] = field(default_factory=list)


class HostMemoryWeightTransferEngine(WeightTransferEngine[HostMemoryInitInfo, HostMemoryUpdateInfo]):
    """Loads full weights in checkpoint format from files that the trainer wrote, usually on /dev/shm.

    Raises ValueError at the end of an update when a parameter of an unquantised model was not loaded.
    """

    init_info_cls = HostMemoryInitInfo
    update_info_cls = HostMemoryUpdateInfo

    def init_transfer_engine(self, init_info: HostMemoryInitInfo) -> None: ...

    def shutdown(self) -> None: ...

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.20; the trainer's side is nemo_dapo.rollout.weight_sync."""
        raise NotImplementedError("send the weights through nemo_dapo.rollout.weight_sync")

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] | None = set()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises the accelerator, which a CPU host does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostMemoryUpdateInfo, load_weights: LoadWeights | None = None) -> None:
        for path in update_info.paths:
            weights = list(load_file(path).items())
            if load_weights is None:
                self._note(getattr(self.model, "load_weights")(weights))  # noqa: B009 (of the model, not of nn.Module)
            else:
                load_weights(weights)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_tied_output(self.model)
        quantised = getattr(self.model_config, "quantization", None) is not None
        if self._loaded is not None and not quantised and (missing := self._parameters - self._loaded):
            raise ValueError(
                f"{len(missing)} parameters of the served model were not in the update: {sorted(missing)[:8]}; the "
                "trainer must export every parameter of the model that vLLM serves"
            )

    def _note(self, loaded: Any) -> None:
        """Collect what `load_weights` says it loaded; a model that does not say cannot be checked."""
        if not isinstance(loaded, (set, frozenset)):
            self._loaded = None
        elif self._loaded is not None:
            self._loaded |= loaded


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


class RequireKey:
    """ASGI middleware: every route but health and metrics needs `Authorization: Bearer $VLLM_API_KEY`.

    vLLM's own check covers /v1 and /inference alone, while the development routes can replace the weights. It also serves
    our own route, and answers a challenge at /health, by which the trainer knows its server.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.key = os.environ.get("VLLM_API_KEY", "")
        self.expected = f"Bearer {self.key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"] not in OPEN_PATHS and not secrets.compare_digest(given, self.expected):
            await PlainTextResponse("Unauthorized", status_code=401)(scope, receive, send)
        elif scope["path"] == wire.ROUTE:
            await vllm_route.generate(scope, receive, send)
        elif scope["path"] == "/health" and (nonce := parse_qs(scope["query_string"].decode()).get(NONCE_PARAMETER)):
            await self.app(scope, receive, with_body(send, proof(self.key, nonce[0], scope["server"][1])))
        else:
            await self.app(scope, receive, send)


def with_body(send: Any, body: bytes) -> Any:
    """An ASGI `send` that puts `body` in place of an empty one and leaves the status as it is."""

    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name != b"content-length"]
            await send({**message, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        else:
            await send({"type": "http.response.body", "body": body})

    return sending


def register() -> None:
    """Entry point: make the backend known to this vLLM process; vLLM may call it more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, HostMemoryWeightTransferEngine)
