"""Operators of the Ascend Transformer Boost library, which 310P depends on.

Their kernels are objects of that library's C++ classes, which a stub does not have: the golden semantics stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import NO_LAUNCH, golden
from npu_zoo.simulator.operators.attention_core import attend, by_distance, distances
from npu_zoo.simulator.operators.cache import FRACTAL, is_nz, write_rows
from npu_zoo.simulator.operators.rotary import rotate_half, rotate_pairs

REASON = "its kernel is an object of the ATB library's C++ classes, which the stub does not have"
FLASH_COMPRESSED, PAGED_COMPRESSED = 3, 5
"""Mask types of which one triangle [2048, 2048] serves every length: of whole prompts and of pages."""


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
    width = cos_sin_cache.shape[1]
    if width != head_size:
        raise NoSemantics(f"_npu_rotary_embedding: a table of {width} columns for argument head_size={head_size}")
    cos, sin = cos_sin_cache.float()[positions.flatten().long()].chunk(2, -1)
    spread = (lambda t: torch.cat([t, t], -1)) if is_neox_style else (lambda t: t.repeat_interleave(2, -1))
    for tensor in (query, key):
        heads = tensor.view(positions.numel(), -1, head_size)
        x = heads.float()
        turned = rotate_half(x) if is_neox_style else rotate_pairs(x)
        heads.copy_(x * spread(cos)[:, None] + turned * spread(sin)[:, None])


@golden("atb::_npu_group_topk", native=False, reason=REASON, launch="atb:GroupTopk")
def group_topk(self: torch.Tensor, k: int, group_num: int, n: int) -> None:
    """Zeroes, in place, all but the ``k`` groups whose ``n`` best scores have the largest sums.

    Source: op-plugin, ops/atb/GroupTopkAtb.cpp and its test.
    """
    groups = self.view(len(self), group_num, -1)
    sums = groups.float().topk(n, -1).values.sum(-1)
    dropped = torch.ones_like(sums, dtype=torch.bool)
    dropped.scatter_(-1, sums.argsort(dim=-1, descending=True, stable=True)[:, :k], False)
    groups.masked_fill_(dropped[..., None], 0)


def _sequence(cache: torch.Tensor, blocks: torch.Tensor, length: int, heads: int, head_size: int) -> torch.Tensor:
    """Rows [length, heads, head_size] of one sequence from an ND or an NZ cache."""
    nz = is_nz(cache, heads, head_size)
    block_size = cache.shape[2] if nz else cache.shape[1]
    found = cache[blocks[: -(-length // block_size)].long()]
    rows = found.transpose(1, 2).flatten(0, 1).flatten(1) if nz else found.flatten(0, 1)
    return rows[:length].reshape(length, heads, head_size)


@golden("atb::_npu_paged_attention_get_workspace", native=False, reason=REASON, launch=NO_LAUNCH)
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
    queries, outputs = (t.view(len(t), num_heads, -1) for t in (query, out))
    for i, length in _one_query_each(query, context_lens):
        key = _sequence(key_cache, block_table[i], length, num_kv_heads, queries.shape[-1])
        value = _sequence(value_cache, block_table[i], length, num_kv_heads, outputs.shape[-1])
        outputs[i] = attend(queries[i : i + 1], key, value, scale_value, None)[0][0].to(out.dtype)


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
    """Values are the first columns of the keys. Source: op-plugin, ops/atb/PagedAttentionMlaAtb.cpp and its test."""
    queries, outputs = (t.view(len(t), num_heads, -1) for t in (query, out))
    for i, length in _one_query_each(query, context_lens):
        key = _sequence(key_cache, block_table[i], length, num_kv_heads, queries.shape[-1])
        found = attend(queries[i : i + 1], key, key[..., :mla_vheadsize], scale_value, None)[0][0]
        outputs[i] = found.to(out.dtype)


def _one_query_each(query: torch.Tensor, context_lens: torch.Tensor) -> Iterator[tuple[int, int]]:
    if len(query) != len(context_lens):
        raise NoSemantics(f"paged attention: {len(query)} queries with {len(context_lens)} context_lens")
    return enumerate(context_lens.tolist())


def _pieces(query: torch.Tensor, seq_len: torch.Tensor) -> list[slice]:
    """Where the tokens of each sequence lie; tokens behind the last are computed by nobody."""
    ends = seq_len.cumsum(0).tolist()
    if ends and ends[-1] > len(query):
        raise NoSemantics(f"attention: seq_len counts {ends[-1]} tokens, query has {len(query)}")
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def plain_mask(mask: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a mask, also of an NZ one [1, columns/16, rows, 16]."""
    if mask.dim() == 4 and len(mask) == 1 and mask.shape[-1] == FRACTAL:
        return mask[0].transpose(0, 1).flatten(1)
    if mask.dim() == 3 and len(mask) == 1:
        return mask[0]
    if mask.dim() != 2:
        raise NoSemantics(f"attention: a mask of shape {tuple(mask.shape)} has no golden semantics")
    return mask


def _compressed(mask: torch.Tensor, num_queries: int, num_keys: int) -> torch.Tensor:
    """What one triangle adds to scores [Sq, Sk] whose queries are the last of the keys."""
    return by_distance(plain_mask(mask), distances(num_queries, num_keys, num_keys - num_queries))


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
    """Whole prompts behind each other [T, N, D]; the mask [max, max] is of positions.

    Source: op-plugin, ops/atb/SelfAttentionAtb.cpp and its test.
    """
    queries, outputs = (t.view(len(t), num_heads, -1) for t in (query, out))
    keys, values = (t.view(len(t), num_kv_heads, -1) for t in (key, value))
    for rows in _pieces(query, seq_len):
        length = rows.stop - rows.start
        compressed = mask_type == FLASH_COMPRESSED
        added = _compressed(mask, length, length) if compressed else plain_mask(mask)[:length, :length]
        outputs[rows] = attend(queries[rows], keys[rows], values[rows], scale_value, added)[0].to(out.dtype)


@golden("atb::_npu_flash_attention_v3", native=False, reason=REASON, launch="atb:SelfAttentionV3")
def flash_attention_v3(mask_type: int | None = FLASH_COMPRESSED, **arguments: Any) -> None:
    """The same with a compressed mask. Source: op-plugin, ops/atb/SelfAttentionAtbV3.cpp and its test."""
    if mask_type not in (None, FLASH_COMPRESSED):
        raise NoSemantics(f"_npu_flash_attention_v3: argument mask_type={mask_type} has no golden semantics")
    flash_attention(**arguments, mask_type=FLASH_COMPRESSED)


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

    A mask that is not compressed has a row for each query [T, max].
    Source: op-plugin, ops/atb/PagedAttentionSplitfuse.cpp and its test.
    """
    compressed = mask_type == PAGED_COMPRESSED
    num_rows = len(plain_mask(mask))
    if not compressed and num_rows < len(query):
        raise NoSemantics(f"_npu_paged_attention_splitfuse: a mask of {num_rows} rows for {len(query)} queries")
    queries, outputs = (t.view(len(t), num_heads, -1) for t in (query, out))
    for i, (rows, length) in enumerate(zip(_pieces(query, seq_len), context_lens.tolist(), strict=True)):
        key = _sequence(key_cache, block_table[i], length, num_kv_heads, queries.shape[-1])
        value = _sequence(value_cache, block_table[i], length, num_kv_heads, outputs.shape[-1])
        count = rows.stop - rows.start
        added = _compressed(mask, count, length) if compressed else plain_mask(mask)[rows, :length]
        outputs[rows] = attend(queries[rows], key, value, scale_value, added)[0].to(out.dtype)


@golden("atb::_npu_paged_attention_splitfuse_v2", native=False, reason=REASON, launch="atb:PagedAttentionSplitfuseV2")
def paged_attention_splitfuse_v2(mask_type: int | None = PAGED_COMPRESSED, **arguments: Any) -> None:
    """The same with a compressed mask. Source: op-plugin, ops/atb/PagedAttentionSplitfuseV2.cpp and its test."""
    if mask_type not in (None, PAGED_COMPRESSED):
        raise NoSemantics(f"_npu_paged_attention_splitfuse_v2: argument mask_type={mask_type} has no golden semantics")
    paged_attention_splitfuse(**arguments, mask_type=PAGED_COMPRESSED)
