"""Fused attention in its versions, on one dense core."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.attention_core import UNBOUNDED, Lengths, Optional, Request, Result, fused_attention

_IGNORED = {"inner_precise", "block_size", "workspace", "out"}
"""Arguments that say how to compute, or what the tensors' own shapes say."""


def _refuse(operator: str, arguments: dict[str, object]) -> None:
    meant = {name: value for name, value in arguments.items() if name not in _IGNORED and value is not None}
    given = sorted(name for name, value in meant.items() if not isinstance(value, int) or value)
    if given:
        raise NoSemantics(f"{operator}: arguments {', '.join(given)} have no golden semantics")


def _one_of_each(separate: tuple[Optional, Optional], stacked: Optional) -> tuple[Optional, Optional]:
    """Scales or offsets of keys and of values; those given separately go before a stacked pair."""
    return separate if stacked is None or separate[0] is not None else (stacked[0], stacked[1])


@golden("npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score.out")
def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: Optional = None,
    actual_seq_lengths: Lengths | None = None,
    actual_seq_lengths_kv: Lengths | None = None,
    antiquant_scale: Optional = None,
    antiquant_offset: Optional = None,
    key_antiquant_scale: Optional = None,
    key_antiquant_offset: Optional = None,
    value_antiquant_scale: Optional = None,
    value_antiquant_offset: Optional = None,
    block_table: Optional = None,
    query_rope: Optional = None,
    key_rope: Optional = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **unsupported: object,
) -> Result:
    """Source: op-plugin, torch_npu-npu_fused_infer_attention_score.md."""
    _refuse("npu_fused_infer_attention_score", unsupported)
    if key_antiquant_scale is None:
        key_antiquant_mode = value_antiquant_mode = antiquant_mode
    elif antiquant_mode and not key_antiquant_mode:
        _refuse("npu_fused_infer_attention_score", {"antiquant_mode": "of scales that are given separately"})
    key_scale, value_scale = _one_of_each((key_antiquant_scale, value_antiquant_scale), antiquant_scale)
    key_offset, value_offset = _one_of_each((key_antiquant_offset, value_antiquant_offset), antiquant_offset)
    return fused_attention(
        Request(
            query, key, value, input_layout, num_heads, num_key_value_heads, scale, sparse_mode, atten_mask, pre_tokens,
            next_tokens, block_table, actual_seq_lengths, actual_seq_lengths_kv, query_rope, key_rope,
            key_scale, key_offset, value_scale, value_offset, key_antiquant_mode, value_antiquant_mode,
            softmax_lse_flag,
        )
    )  # fmt: skip


@golden("npu::npu_fused_infer_attention_score_v2", "npu::npu_fused_infer_attention_score_v2.out")
def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_rope: Optional = None,
    key_rope: Optional = None,
    atten_mask: Optional = None,
    actual_seq_qlen: Lengths | None = None,
    actual_seq_kvlen: Lengths | None = None,
    block_table: Optional = None,
    dequant_scale_key: Optional = None,
    dequant_offset_key: Optional = None,
    dequant_scale_value: Optional = None,
    dequant_offset_value: Optional = None,
    learnable_sink: Optional = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    return_softmax_lse: bool = False,
    **unsupported: object,
) -> Result:
    """Source: op-plugin, torch_npu-npu_fused_infer_attention_score_v2.md."""
    _refuse("npu_fused_infer_attention_score_v2", unsupported)
    return fused_attention(
        Request(
            query, key, value, input_layout, num_query_heads, num_key_value_heads, softmax_scale, sparse_mode,
            atten_mask, pre_tokens, next_tokens, block_table, actual_seq_qlen, actual_seq_kvlen, query_rope, key_rope,
            dequant_scale_key, dequant_offset_key, dequant_scale_value, dequant_offset_value, key_quant_mode,
            value_quant_mode, return_softmax_lse, learnable_sink,
        )
    )  # fmt: skip


@golden("npu::npu_attention_update")
def npu_attention_update(
    lse: Sequence[torch.Tensor], local_out: Sequence[torch.Tensor], update_type: int
) -> tuple[torch.Tensor, Optional]:
    """Outputs [T, D] of parts of the keys merged by their log-sum-exp [T]; the merged one too where update_type is 1.

    Source: op-plugin, torch_npu-npu_attention_update.md.
    """
    parts = torch.stack([part.float().reshape(-1) for part in lse])
    merged = parts.masked_fill(parts == float("inf"), float("-inf")).logsumexp(0)
    weights = (parts - merged).exp().nan_to_num(posinf=0.0)[..., None]
    total = sum(part.float() * weight for part, weight in zip(local_out, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(local_out[0].dtype), merged if update_type == 1 else None


@golden("npu::npu_incre_flash_attention")
def npu_incre_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: Optional = None,
    actual_seq_lengths: Lengths | None = None,
    antiquant_scale: Optional = None,
    antiquant_offset: Optional = None,
    block_table: Optional = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    **unsupported: object,
) -> torch.Tensor:
    """One query a sequence. Source: op-plugin, torch_npu-npu_incre_flash_attention.md."""
    _refuse("npu_incre_flash_attention", unsupported)
    key_scale, value_scale = _one_of_each((None, None), antiquant_scale)
    key_offset, value_offset = _one_of_each((None, None), antiquant_offset)
    request = Request(
        query, key, value, input_layout, num_heads, num_key_value_heads, scale_value, 0, atten_mask, UNBOUNDED,
        UNBOUNDED, block_table, None, actual_seq_lengths, None, None, key_scale, key_offset, value_scale, value_offset,
    )  # fmt: skip
    return fused_attention(request)[0]


@golden("npu::npu_prompt_flash_attention")
def npu_prompt_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    atten_mask: Optional = None,
    actual_seq_lengths: Lengths | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Lengths | None = None,
    sparse_mode: int = 0,
    **unsupported: object,
) -> torch.Tensor:
    """Whole prompts. Source: op-plugin, torch_npu-npu_prompt_flash_attention.md."""
    _refuse("npu_prompt_flash_attention", unsupported)
    request = Request(
        query, key, value, input_layout, num_heads, num_key_value_heads, scale_value, sparse_mode, atten_mask,
        pre_tokens, next_tokens, None, actual_seq_lengths, actual_seq_lengths_kv,
    )  # fmt: skip
    return fused_attention(request)[0]
