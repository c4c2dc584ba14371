"""What Megatron-core and Megatron-Bridge (seen in 0.16.1 and 0.3.1) leave open.

Without Transformer Engine experts are Megatron's SequentialMLP, one plain MLP each, whose parameters are named
`experts.local_experts.<i>.linear_fc1.weight`. Megatron-Bridge imports and exports the grouped experts of
Transformer Engine, `experts.linear_fc1.weight<i>`, under any expert parallelism, and lists the plain ones, but takes their
numbers from the end of the name, where they are not. And it looks for a tied output layer in the first of a stage's parts.
It loads weights before it rounds the model, the routers' biases too, which are float32.
Its adapters take stand-ins for Transformer Engine's layers for the layers themselves; so does multi-latent attention.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
from typing import Any

from torch import Tensor

PLAIN = re.compile(r"\.local_experts\.(\d+)(\..*)$")
_completed = False


def complete() -> None:
    """Mend the imported Megatron-core and Megatron-Bridge; once a process."""
    global _completed
    if _completed:
        return
    _completed = True
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # the router asks whether it is None
    _number_globally()
    _gather_by_number()
    _tie_in_the_last_part()
    _keep_the_routers_biases()
    experts: Any = importlib.import_module("nemo_dapo.megatron.experts")  # which makes Mixtral known
    experts.complete_deepseek()
    if importlib.util.find_spec("transformer_engine") is None:
        _adapt_plain_layers()
        _attend_by_plain_layers()


def _number_globally() -> None:
    """A rank counts its own experts from 0; the whole model's numbers name the tensors of the Hugging Face folder."""
    from megatron.core import parallel_state

    model_bridge: Any = importlib.import_module("megatron.bridge.models.conversion.model_bridge")
    original = model_bridge._megatron_local_name_to_global

    def local_name_to_global(models: Any, config: Any, param_name: str, vp_stage: int | None = None) -> str:
        name: str = original(models, config, param_name, vp_stage)
        if not (plain := PLAIN.search(name)):
            return name
        ranks = parallel_state.get_expert_model_parallel_world_size()
        first = config.num_moe_experts // ranks * parallel_state.get_expert_model_parallel_rank()
        return f"{name[: plain.start()]}.local_experts.{first + int(plain[1])}{plain[2]}"

    model_bridge._megatron_local_name_to_global = local_name_to_global


def _gather_by_number() -> None:
    """Gathered under the name that a grouped expert would have, which ends with its number."""
    param_mapping: Any = importlib.import_module("megatron.bridge.models.conversion.param_mapping")
    mapping_class = param_mapping.MegatronParamMapping
    original = mapping_class.gather_from_ep_ranks

    def gather_from_ep_ranks(
        self: Any, megatron_weights: Tensor | None, megatron_module: Any, hf_param_name: str | None
    ) -> dict[str, Tensor]:
        mapping = self
        if plain := PLAIN.search(self.megatron_param):
            mapping = copy.copy(self)
            mapping.megatron_param = f"{self.megatron_param[: plain.start()]}{plain[2]}{plain[1]}"
        gathered: dict[str, Tensor] = original(mapping, megatron_weights, megatron_module, hf_param_name)
        return gathered

    mapping_class.gather_from_ep_ranks = gather_from_ep_ranks


def _tie_in_the_last_part() -> None:
    """The last pipeline stage has its output layer in its last part, and no embedding."""
    from megatron.core import parallel_state

    model_bridge: Any = importlib.import_module("megatron.bridge.models.conversion.model_bridge")
    bridge_class = model_bridge.MegatronModelBridge
    original = bridge_class._broadcast_shared_embeddings

    def broadcast_shared_embeddings(self: Any, megatron_model: Any) -> None:
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        original(self, megatron_model[-1:] if is_last and isinstance(megatron_model, list) else megatron_model)

    bridge_class._broadcast_shared_embeddings = broadcast_shared_embeddings


def _keep_the_routers_biases() -> None:
    """The bias that moves DeepSeek's choice of experts is in float32 in the folder, in the servers, and here."""
    router: Any = importlib.import_module("megatron.core.transformer.moe.router").TopKRouter
    original = router._apply

    def _apply(self: Any, function: Any, *args: Any, **options: Any) -> Any:
        bias = self._buffers.get("expert_bias")
        original(self, function, *args, **options)
        if bias is not None and not bias.is_meta:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    router._apply = _apply


def _adapt_plain_layers() -> None:
    """Megatron's own column- and row-parallel layers are what an adapter is made for: there are no others here."""
    utils: Any = importlib.import_module("megatron.bridge.peft.utils")
    utils.HAVE_TE = False


def _attend_by_plain_layers() -> None:
    """Multi-latent attention asks what kind of Transformer Engine's layers it has been given: there are none here."""
    attention: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    attention.HAVE_TE = False
