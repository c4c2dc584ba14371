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
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_dapo.megatron.context_parallel import context_slice, gather_pack


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
        value: Tensor,  # [T, k, d]
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
    """The decoder's layers on a host without Transformer Engine, for a Megatron-Bridge provider `config`.

    Raises ValueError for a model that needs layers of other kinds.
    """
    if config.multi_latent_attention or config.moe_layer_freq != 1:
        raise ValueError(
            "layers without Transformer Engine are alike and have plain attention; multi-latent attention and a mixture of "
            "dense and expert layers need Transformer Engine: install it"
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedSDPA
    layer.submodules.input_layernorm = SequenceParallelRMSNorm
    layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SequenceParallelRMSNorm)
