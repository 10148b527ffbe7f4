"""Attention of single tokens, which reads the pool of blocks in place.

Scores are sums of key rows weighted by the query, outputs sums of value rows weighted by the probabilities. Both are
what ``embedding_bag`` computes, at the speed of memory and with float32 accumulation, for any block table: nothing is
gathered, and a block that several sequences share lies in memory once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.nn.attention.cache import BlockCache

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class DecodePlan:
    """The single-token rows of a step, N in all, sorted by their number of blocks; M counts the blocks.

    Attributes:
        tokens: [N], each row's token.
        owners: [M], the token that a block is read for.
        blocks: [M], their numbers.
        key_rows: [M * num_heads * head_dim], rows of a layer's keys seen as [-1, block_size].
        key_bags: [M * num_heads], where a bag of key rows starts.
        value_rows: [num_heads * M * block_size], rows of a layer's values seen as [-1, head_dim].
        value_bags: [N * num_heads].
        masked: scores beyond a sequence's end, as places in [M * num_heads * block_size].
        groups: runs of rows with equally many blocks: (rows, blocks per row).
    """

    tokens: Tensor
    owners: Tensor
    blocks: Tensor
    key_rows: Tensor
    key_bags: Tensor
    value_rows: Tensor
    value_bags: Tensor
    masked: Tensor
    groups: tuple[tuple[int, int], ...]


def plan_decode(
    tokens: NDArray[np.int64],
    tables: list[NDArray[np.int64]],
    lengths: NDArray[np.int64],
    num_heads: int,
    cache: BlockCache,
) -> DecodePlan:
    """Lay out the decode work of a step.

    Args:
        tokens: [N], each row's token in the step.
        tables: each row's blocks, exactly as many as its length needs.
        lengths: [N], tokens to attend to.
    """
    counts = np.array([len(table) for table in tables])
    order = np.argsort(counts, kind="stable")
    counts, lengths = counts[order], lengths[order]
    blocks = torch.from_numpy(np.concatenate([tables[row] for row in order]))
    sizes, rows = np.unique(counts, return_counts=True)
    groups = tuple(zip(rows.tolist(), sizes.tolist(), strict=True))
    tail = torch.from_numpy(lengths - (counts - 1) * cache.block_size)
    heads = torch.arange(num_heads) // (num_heads // cache.num_kv_heads)
    key_rows = _key_rows(blocks, heads, cache)
    value_rows = _value_rows(blocks, heads, tail, groups, cache)
    value_starts = (np.cumsum(counts) - counts)[:, None] * num_heads + counts[:, None] * np.arange(num_heads)
    device = cache.device
    return DecodePlan(
        tokens=torch.from_numpy(tokens[order]).to(device),
        owners=torch.from_numpy(np.repeat(tokens[order], counts)).to(device),
        blocks=blocks.to(device),
        key_rows=key_rows.to(device),
        key_bags=torch.arange(0, len(key_rows), cache.head_dim, dtype=key_rows.dtype, device=device),
        value_rows=value_rows.to(device),
        value_bags=torch.from_numpy(value_starts.ravel() * cache.block_size).to(device, value_rows.dtype),
        masked=_masked(torch.from_numpy(np.cumsum(counts) - 1), tail, num_heads, cache.block_size).to(device),
        groups=groups,
    )


def attend_decode(
    query: Tensor, cache: BlockCache, layer: int, plan: DecodePlan, out: Tensor, lse: Tensor | None
) -> None:
    """Attend for the rows of a plan, in one layer.

    Args:
        query: [T, num_heads, head_dim], scaled already.
        out: [T, num_heads, head_dim], filled at the plan's tokens.
        lse: [T, num_heads], filled with the log of the sum of exponential scores.
    """
    _, num_heads, head_dim = query.shape
    scores = cache.scores(layer, query.index_select(0, plan.owners), plan)
    scores.view(-1).index_fill_(0, plan.masked, -torch.inf)
    probabilities, sums = _softmax(scores, plan.groups, lse is not None)
    result = cache.weighted_values(layer, probabilities, plan)
    out.index_copy_(0, plan.tokens, result.view(-1, num_heads, head_dim).to(out.dtype))
    if lse is not None:
        lse.index_copy_(0, plan.tokens, torch.cat(sums))


def _softmax(scores: Tensor, groups: tuple[tuple[int, int], ...], with_lse: bool) -> tuple[Tensor, list[Tensor]]:
    """Turn scores, [M, num_heads, block_size], into probabilities, row by row [num_heads, blocks * block_size]."""
    _, num_heads, block_size = scores.shape
    flat = torch.empty_like(scores).view(-1)
    sums, block = [], 0
    for rows, count in groups:
        group = scores[block : block + rows * count].view(rows, count, num_heads, block_size)
        group = group.transpose(1, 2).reshape(rows, num_heads, count * block_size)
        start = block * num_heads * block_size
        target = flat[start : start + group.numel()].view(group.shape)
        torch.softmax(group, -1, out=target)
        if with_lse:
            sums.append(log_sum_exp(group.amax(-1), target.amax(-1)))
        block += rows * count
    return flat, sums


def log_sum_exp(max_score: Tensor, max_probability: Tensor) -> Tensor:
    """The log of the sum of exponential scores, from the largest score and its probability, in float32."""
    return max_score.float() - max_probability.float().log()


def _key_rows(blocks: Tensor, heads: Tensor, cache: BlockCache) -> Tensor:
    dtype = _index_dtype((cache.num_blocks + 1) * cache.num_kv_heads * cache.head_dim)
    first = (blocks.view(-1, 1) * cache.num_kv_heads + heads) * cache.head_dim
    return (first.to(dtype).unsqueeze(-1) + torch.arange(cache.head_dim, dtype=dtype)).view(-1)


def _value_rows(
    blocks: Tensor, heads: Tensor, tail: Tensor, groups: tuple[tuple[int, int], ...], cache: BlockCache
) -> Tensor:
    """Row numbers in the order of the probabilities; a masked one reads zeros, not what a block happens to hold."""
    size = cache.block_size
    dtype = _index_dtype((cache.num_blocks + 1) * cache.num_kv_heads * size)
    places = torch.arange(size, dtype=dtype)
    parts, row, block = [], 0, 0
    for rows, count in groups:
        table = blocks[block : block + rows * count].view(rows, 1, count) * cache.num_kv_heads + heads.view(1, -1, 1)
        part = (table * size).to(dtype).unsqueeze(-1) + places  # [rows, num_heads, count, size]
        beyond = places >= tail[row : row + rows].view(-1, 1)
        part[:, :, -1].masked_fill_(beyond.unsqueeze(1), cache.zero_block * cache.num_kv_heads * size)
        parts.append(part.view(-1))
        row, block = row + rows, block + rows * count
    return torch.cat(parts)


def _masked(last: Tensor, tail: Tensor, num_heads: int, block_size: int) -> Tensor:
    row, place = (torch.arange(block_size) >= tail.view(-1, 1)).nonzero(as_tuple=True)
    base = last[row].view(-1, 1) * num_heads + torch.arange(num_heads)
    return (base * block_size + place.view(-1, 1)).view(-1)


def _index_dtype(limit: int) -> torch.dtype:
    return torch.int32 if limit <= _MAX_INT32 else torch.int64
