"""The layers of a host without Transformer Engine: packed causal attention on SDPA and a sequence-parallel RMSNorm.

Both are plain Megatron submodules that the layer spec names, so the model, its parallelism and its packed (`thd`) inputs
are the same as on a GPU.

Shapes: T packed tokens, S sequences in the pack, L the longest of them, h heads, k key-value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from nemo_dapo.megatron.context_parallel import context_slice, gather_pack
from nemo_dapo.megatron.moe import expert_pattern


class PackedSDPA(MegatronModule):
    """Causal self-attention inside each sequence of a pack, by torch's scaled_dot_product_attention.

    Megatron-core's local DotProductAttention takes no packed sequences and builds all [h, T, T] scores. Here the pack is
    laid out as [S, h, L, d]: right padding needs no mask under causal attention, because no real query sees it. Under
    context parallelism each rank has its queries and gathers all keys and values, which is plain and exact, not fast.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout != 0.0 or attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                f"attention without Transformer Engine got attention_dropout={dropout}, attn_mask_type={attn_mask_type}; "
                "it computes causal attention without dropout. Install Transformer Engine, or set them to 0 and causal."
            )
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # [T, h, d]
        key: Tensor,  # [T, k, d]
        value: Tensor,  # [T, k, d], or another size under multi-latent attention
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend; returns [T, h * d]. Sequence s of the pack is its rows cu_seqlens[s] to cu_seqlens[s + 1].

        Under context parallelism query, key and value hold this rank's slice, and cu_seqlens speaks of the whole.
        """
        assert packed_seq_params is not None, "the policy packs every micro-batch"
        cu_seqlens, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        rows, is_token = _padded_layout(cu_seqlens, longest)
        query_rows, mask = rows, None
        if self.config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            size = dist.get_world_size(group)
            key, value = (gather_pack(x, cu_seqlens, group) for x in (key, value))
            query_rows, is_token = _padded_layout(cu_seqlens // size, longest // size)
            mine = context_slice(cu_seqlens, size, dist.get_rank(group))
            positions = mine[query_rows] - cu_seqlens[:-1].unsqueeze(1)  # [S, L / cp], in their sequences
            mask = (torch.arange(longest, device=positions.device) <= positions.unsqueeze(-1)).unsqueeze(1)
        q, k, v = (
            x[r].transpose(1, 2) for x, r in ((query, query_rows), (key, rows), (value, rows))
        )  # [S, h or k, L, d]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=q.size(1) != k.size(1)
        )
        return out.transpose(1, 2)[is_token].reshape(query.size(0), -1)


def _padded_layout(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Rows [S, L] that lay a pack out as a padded batch, and which of them [S, L] hold a token; padding repeats row 0."""
    offsets = torch.arange(max_seqlen, device=cu_seqlens.device)
    is_token = offsets < (cu_seqlens[1:] - cu_seqlens[:-1]).unsqueeze(1)
    return torch.where(is_token, cu_seqlens[:-1].unsqueeze(1) + offsets, 0), is_token


class LatentAttention(MLASelfAttention):
    """Multi-latent attention whose down-projection is column-parallel, as it is without Transformer Engine.

    Megatron-core (seen in 0.16.1) gathers that one's output and gives each rank's heads the rotary part of the key; in the
    backward pass each rank keeps what its own heads say of it. Where the output is whole already and of the rank's own
    tokens, as Transformer Engine's is, it takes the way on which the heads' gradients are summed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.config.sequence_parallel:
            self.linear_kv_down_proj.register_forward_hook(_whole_and_of_own_tokens)


def _whole_and_of_own_tokens(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """[T, 1, c / ranks] -> [T / ranks, 1, c]."""
    part, bias = output
    return scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(part)), bias


class SequenceParallelRMSNorm(nn.Module):
    """RMSNorm whose weight gradient Megatron sums over the tensor-parallel ranks when tokens are split over them.

    Its class name must contain `Norm`: Megatron-Bridge recognises replicated layers by name.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; statistics in float32, as Hugging Face and Transformer Engine do."""
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def local_block_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's layers on a host without Transformer Engine, for a Megatron-Bridge provider `config`."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    kinds = {has_experts: _layer_spec(config, has_experts) for has_experts in (False, True)}
    layers = [kinds[has_experts] for has_experts in expert_pattern(config)[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SequenceParallelRMSNorm)


def _layer_spec(config: Any, has_experts: bool) -> Any:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    if config.multi_latent_attention:
        layer.submodules.self_attention.module = LatentAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedSDPA
    layer.submodules.input_layernorm = SequenceParallelRMSNorm
    layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    for norm in ("q_layernorm", "k_layernorm", "kv_layernorm"):  # the last one is multi-latent attention's
        if config.qk_layernorm and hasattr(attention, norm):
            setattr(attention, norm, SequenceParallelRMSNorm)
    return layer
