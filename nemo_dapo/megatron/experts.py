"""Where Hugging Face's tensors of experts lie in Megatron, for the families whose bridge leaves something out.

Megatron-Bridge (seen in 0.3.1 to 0.6.2) has no Mixtral, and in 0.3.1 and 0.4.2 converts DeepSeek's experts as Transformer
Engine's grouped ones alone. `repairs.complete` imports this module once Megatron-Bridge itself is there.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM

MIXTRAL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
    "decoder.layers.*.mlp.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
}
GROUPED, PLAIN = "decoder.layers.*.mlp.experts.{}.weight*", "decoder.layers.*.mlp.experts.local_experts.*.{}.weight"


def expert_mappings(megatron: str, expert: str, gate: str, up: str, down: str) -> list[Any]:
    """Of Megatron's GROUPED or PLAIN experts; `expert` has a * for the layer and one for the expert's number."""
    return [
        GatedMLPMapping(
            megatron_param=megatron.format("linear_fc1"), gate=f"{expert}.{gate}.weight", up=f"{expert}.{up}.weight"
        ),
        AutoMapping(megatron_param=megatron.format("linear_fc2"), hf_param=f"{expert}.{down}.weight"),
    ]


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(MegatronModelBridge):
    """Mixtral (arXiv 2401.04088): Llama's layers with experts for an MLP; the chosen experts' scores are a softmax."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.position_embedding_type = "rope"
        provider.gated_linear_unit = True
        provider.add_bias_linear = provider.add_qkv_bias = False
        provider.moe_ffn_hidden_size = provider.ffn_hidden_size
        provider.moe_router_pre_softmax = False
        provider.moe_grouped_gemm = provider.moe_permute_fusion = True
        return provider

    def mapping_registry(self) -> Any:
        names, experts = "model.layers.*.self_attn.{}_proj.weight", "model.layers.*.block_sparse_moe.experts.*"
        attention = {each: names.format(each) for each in ("q", "k", "v")}
        return MegatronMappingRegistry(
            *(AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in MIXTRAL.items()),
            QKVMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.weight", **attention),
            *(each for kind in (GROUPED, PLAIN) for each in expert_mappings(kind, experts, "w1", "w3", "w2")),
        )


def complete_deepseek() -> None:
    """Maps plain experts beside Bridge's own mappings, and exports parameters alone.

    Folders such as Moonlight's hold the rotary frequencies as well, a buffer that nothing reads. Bridge 0.3.1 would export
    it, of a `rope_theta` that configurations of transformers 5 no longer have.
    """
    module: Any = importlib.import_module("megatron.bridge.models.deepseek.deepseek_v3_bridge")
    original = module.get_common_mapping_list
    plain = expert_mappings(PLAIN, "model.layers.*.mlp.experts.*", "gate_proj", "up_proj", "down_proj")
    module.get_common_mapping_list = lambda *args, **options: [*original(*args, **options), *plain]
    exported = MegatronModelBridge.maybe_modify_converted_hf_weight
    module.DeepSeekV3Bridge.maybe_modify_converted_hf_weight = exported
