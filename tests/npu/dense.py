"""Attention in float64, head by head: what the fused operators are compared with."""

from __future__ import annotations

import torch


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence; queries are the last of the keys.

    Args:
        query: [Sq, N, D].
        key: [Sk, Nk, D].
        value: [Sk, Nk, Dv].
        scale: of the scores.
        causal: a query sees the keys up to its own position.

    Returns:
        The output [Sq, N, Dv] and the log of the sum of exponentials [Sq, N].
    """
    queries, keys = query.shape[0], key.shape[0]
    heads = query.shape[1]
    output = torch.empty(queries, heads, value.shape[-1], dtype=torch.float64)
    lse = torch.empty(queries, heads, dtype=torch.float64)
    for head in range(heads):
        source = head // (heads // key.shape[1])
        for row in range(queries):
            seen = keys - queries + row + 1 if causal else keys
            scores = (key[:seen, source].double() @ query[row, head].double()) * scale
            shares = scores.exp()
            output[row, head] = (shares[:, None] * value[:seen, source].double()).sum(0) / shares.sum()
            lse[row, head] = shares.sum().log()
    return output, lse


def scattered(rows: list[torch.Tensor], block_size: int, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [num_blocks, block_size, Nk, D] of sequences in shuffled blocks, and its block table [B, blocks]."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
    cache = torch.zeros(num_blocks, block_size, *rows[0].shape[1:], dtype=rows[0].dtype)
    widest = max(-(-len(sequence) // block_size) for sequence in rows)
    table = torch.zeros(len(rows), widest, dtype=torch.int32)
    for number, sequence in enumerate(rows):
        for position, part in enumerate(sequence.split(block_size)):
            block = order.pop()
            table[number, position] = block
            cache[block, : len(part)] = part
    return cache, table
