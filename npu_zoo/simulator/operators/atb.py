"""Operators of the Ascend Transformer Boost library, which 310P depends on.

Their kernels are objects of that library's C++ classes, which a stub does not have: the golden semantics stand alone.
"""

from __future__ import annotations

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.attention import attend
from npu_zoo.simulator.operators.cache import is_nz, write_rows
from npu_zoo.simulator.operators.rotary import rotate_half, rotate_pairs

REASON = "its kernel is an object of the ATB library's C++ classes, which the stub does not have"
COMPRESSED_CAUSAL = (3, 5)
"""Mask types of which one triangle [2048, 2048] serves every length: 3 for whole prompts, 5 for pages."""


@golden("atb::_npu_reshape_and_cache", native=False, reason=REASON, launch="atb:ReshapeAndCache")
def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    """Source: op-plugin, ops/atb/ReshapeAndCachAtb.cpp and its test."""
    for rows, cache in ((key, key_cache), (value, value_cache)):
        write_rows(cache, rows, slot_indices, nz=is_nz(cache, *rows.shape[1:]))


@golden("atb::_npu_reshape_and_cache_siso", native=False, reason=REASON, launch="atb:ReshapeAndCacheSiso")
def reshape_and_cache_siso(key: torch.Tensor, key_cache: torch.Tensor, slot_indices: torch.Tensor) -> None:
    """Source: op-plugin, ops/atb/ReshapeAndCacheSisoAtb.cpp."""
    write_rows(key_cache, key, slot_indices, nz=is_nz(key_cache, *key.shape[1:]))


@golden("atb::_npu_rotary_embedding", native=False, reason=REASON, launch="atb:Rope")
def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> None:
    """Rotates in place by a table [positions, rotary], cosines first. Source: op-plugin, ops/atb/RopeAtb.cpp."""
    cos, sin = cos_sin_cache.float()[positions.flatten().long()].chunk(2, -1)
    spread = (lambda t: torch.cat([t, t], -1)) if is_neox_style else (lambda t: t.repeat_interleave(2, -1))
    for tensor in (query, key):
        heads = tensor.view(positions.numel(), -1, head_size)
        width = cos_sin_cache.shape[1]
        x = heads[..., :width].float()
        turned = rotate_half(x) if is_neox_style else rotate_pairs(x)
        heads[..., :width] = x * spread(cos)[:, None] + turned * spread(sin)[:, None]


def _sequence(cache: torch.Tensor, blocks: torch.Tensor, length: int, heads: int, head_size: int) -> torch.Tensor:
    """Rows [length, heads, head_size] of one sequence from an ND or an NZ cache."""
    nz = is_nz(cache, heads, head_size)
    block_size = cache.shape[2] if nz else cache.shape[1]
    found = cache[blocks[: -(-length // block_size)].long()]
    rows = found.transpose(1, 2).flatten(0, 1).flatten(1) if nz else found.flatten(0, 1)
    return rows[:length].reshape(length, heads, head_size)


@golden("atb::_npu_paged_attention_get_workspace", native=False, reason=REASON, launch="atb:PagedAttentionWorkspace")
def paged_attention_get_workspace(**_: object) -> torch.Tensor:
    """No memory is needed beside the output here."""
    return torch.empty(0, dtype=torch.uint8)


@golden("atb::_npu_paged_attention", native=False, reason=REASON, launch="atb:PagedAttention")
def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    """One query [N, D] a sequence. Source: op-plugin, ops/atb/PagedAttentionAtb.cpp and its test."""
    rows = query.view(len(block_table), num_heads, -1)
    for i, length in enumerate(context_lens.tolist()):
        shape = (num_kv_heads, rows.shape[-1])
        key, value = (_sequence(cache, block_table[i], length, *shape) for cache in (key_cache, value_cache))
        out.view_as(rows)[i] = attend(rows[i : i + 1], key, value, scale_value, None)[0][0].to(out.dtype)


@golden("atb::_npu_paged_attention_mla", native=False, reason=REASON, launch="atb:PagedAttentionMla")
def paged_attention_mla(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    mla_vheadsize: int,
    out: torch.Tensor,
) -> None:
    """Values are the first columns of the keys. Source: op-plugin, ops/atb/PagedAttentionMlaAtb.cpp."""
    rows = query.view(len(block_table), num_heads, -1)
    for i, length in enumerate(context_lens.tolist()):
        key = _sequence(key_cache, block_table[i], length, num_kv_heads, rows.shape[-1])
        found = attend(rows[i : i + 1], key, key[..., :mla_vheadsize], scale_value, None)[0][0]
        out.view(len(rows), num_heads, -1)[i] = found.to(out.dtype)


def added_mask(mask: torch.Tensor, num_queries: int, num_keys: int, *, compressed: bool) -> torch.Tensor:
    """What a mask of numbers adds to scores [Sq, Sk] whose queries are the last of the keys.

    Args:
        mask: ND [.., rows, columns], or NZ [1, columns/16, rows, 16]; zero where a key is seen.
        num_queries, num_keys: the sequence's.
        compressed: the mask is one triangle that serves every length, so it is taken from its lower right.
    """
    plain = mask[0].transpose(0, 1).flatten(1) if mask.dim() == 4 else mask
    if compressed:
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
        return torch.where(hidden, plain.float().min(), 0.0)
    return plain[..., num_keys - num_queries : num_keys, :num_keys].float()


@golden("atb::_npu_flash_attention", native=False, reason=REASON, launch="atb:SelfAttention")
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: torch.Tensor,
    mask_type: int = 0,
) -> None:
    """Whole prompts behind each other [T, N, D]. Source: op-plugin, ops/atb/SelfAttentionAtb.cpp and its test."""
    if mask_type not in (0, 3):
        raise NoSemantics(f"_npu_flash_attention: mask_type={mask_type} has no golden semantics")
    start = 0
    queries = query.view(query.shape[0], num_heads, -1)
    keys, values = (t.view(t.shape[0], num_kv_heads, -1) for t in (key, value))
    for length in seq_len.tolist():
        rows = slice(start, start + length)
        added = added_mask(mask, length, length, compressed=mask_type in COMPRESSED_CAUSAL)
        found = attend(queries[rows], keys[rows], values[rows], scale_value, added)[0]
        out.view_as(queries)[rows] = found.to(out.dtype)
        start += length


@golden("atb::_npu_flash_attention_v3", native=False, reason=REASON, launch="atb:SelfAttentionV3")
def flash_attention_v3(mask_type: int | None = 3, **arguments: torch.Tensor) -> None:
    """The same with a mask that may be compressed. Source: op-plugin, ops/atb/SelfAttentionAtbV3.cpp and its test."""
    flash_attention(**arguments, mask_type=3 if mask_type is None else mask_type)  # type: ignore[arg-type]


@golden("atb::_npu_paged_attention_splitfuse", native=False, reason=REASON, launch="atb:PagedAttentionSplitfuse")
def paged_attention_splitfuse(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    mask: torch.Tensor,
    seq_len: torch.Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: torch.Tensor,
    mask_type: int = 0,
) -> None:
    """Pieces of prompts behind each other; ``seq_len`` counts their queries, ``context_lens`` all their keys.

    Source: op-plugin, ops/atb/PagedAttentionSplitfuse.cpp and its test.
    """
    if mask_type not in (0, 5):
        raise NoSemantics(f"_npu_paged_attention_splitfuse: mask_type={mask_type} has no golden semantics")
    start = 0
    queries = query.view(query.shape[0], num_heads, -1)
    for i, (length, keys) in enumerate(zip(seq_len.tolist(), context_lens.tolist(), strict=True)):
        rows = slice(start, start + length)
        shape = (num_kv_heads, queries.shape[-1])
        key, value = (_sequence(cache, block_table[i], keys, *shape) for cache in (key_cache, value_cache))
        added = added_mask(mask, length, keys, compressed=mask_type in COMPRESSED_CAUSAL)
        out.view_as(queries)[rows] = attend(queries[rows], key, value, scale_value, added)[0].to(out.dtype)
        start += length


@golden("atb::_npu_paged_attention_splitfuse_v2", native=False, reason=REASON, launch="atb:PagedAttentionSplitfuseV2")
def paged_attention_splitfuse_v2(mask_type: int | None = 5, **arguments: torch.Tensor) -> None:
    """The same with a mask that may be compressed. Source: op-plugin, ops/atb/PagedAttentionSplitfuseV2.cpp."""
    paged_attention_splitfuse(**arguments, mask_type=5 if mask_type is None else mask_type)  # type: ignore[arg-type]
