"""A step as the compiled library takes it: rows as plain integers, and the call that writes and attends.

``csrc/cache.h`` has the layout of what is built here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, SequenceSlice
from npu_zoo.nn.attention.tables import check_tables, first_blocks
from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, FLOAT, SIZE, Function

STRIP = 32
"""Tokens that the library keeps together; blocks are a multiple of it."""

_VIEW = (ADDRESS, SIZE, SIZE)
_attend = Function("zoo_attend", ADDRESS, ADDRESS, SIZE, *[ADDRESS] * 4, *_VIEW * 4, ADDRESS, ADDRESS, FLOAT, COUNT)
strip_bytes = Function("zoo_strip_bytes", SIZE, SIZE, COUNT, result=SIZE)
"""Bytes of a strip of one head's keys, or of its values, by kind and width."""

Member = tuple[list[int], int]
"""Rows that share a prefix, and how many blocks it has."""


@dataclass(frozen=True)
class CompiledMetadata(AttentionMetadata):
    """A step's rows as the library takes them.

    Attributes:
        items: [shared prefixes and rows, 8], as ``csrc/cache.h`` has them.
        tables: the blocks of all rows, one row's after the other's.
        members: the tokens of shared prefixes.
        shared: how many prefixes are attended to once for several rows.
        addresses: of the three arrays.
    """

    items: NDArray[np.int64]
    tables: NDArray[np.int64]
    members: NDArray[np.int64]
    shared: int
    addresses: tuple[int, int, int]


def make_metadata(
    rows: list[SequenceSlice],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    tables: NDArray[np.int64],
    counts: NDArray[np.int64],
    block_size: int,
    shared: list[Member],
) -> CompiledMetadata:
    """Lay out a step.

    Args:
        starts, lengths: [N], of each row.
        tables: all rows' blocks, ``counts`` of each.
        shared: prefixes that several rows have in common.
    """
    first_tokens = np.cumsum(lengths) - lengths
    first_blocks = np.cumsum(counts) - counts
    items = np.zeros((len(shared) + len(rows), 8), dtype=np.int64)
    own = items[len(shared) :]
    own[:, 0], own[:, 1], own[:, 2], own[:, 3], own[:, 4] = first_tokens, lengths, first_blocks, starts + lengths, -1
    members = []
    done = 0
    for number, (numbers, blocks) in enumerate(shared):
        tokens = np.concatenate([first_tokens[row] + np.arange(lengths[row]) for row in numbers])
        items[number] = done, len(tokens), first_blocks[numbers[0]], blocks * block_size, -1, 0, 1, 1
        own[numbers, 2] += blocks
        own[numbers, 3] -= blocks * block_size
        own[numbers, 4] = number
        own[numbers, 5] = np.cumsum(lengths[numbers]) - lengths[numbers]
        members.append(tokens)
        done += len(tokens)
    joined = np.concatenate(members) if members else np.empty(0, dtype=np.int64)
    addresses = items.ctypes.data, tables.ctypes.data, joined.ctypes.data
    return CompiledMetadata(rows, int(lengths.sum()), items, tables, joined, len(shared), addresses)


def fixed_metadata(batch: int, blocks: int) -> CompiledMetadata:
    """Room for rows of one token each, with up to ``blocks`` blocks, that :func:`refill_rows` writes."""
    items = np.zeros((batch, 8), dtype=np.int64)
    items[:, 0], items[:, 1], items[:, 2], items[:, 4] = np.arange(batch), 1, np.arange(batch) * blocks, -1
    tables, members = np.zeros(batch * blocks, dtype=np.int64), np.empty(0, dtype=np.int64)
    addresses = items.ctypes.data, tables.ctypes.data, members.ctypes.data
    return CompiledMetadata([], batch, items, tables, members, 0, addresses)


def refill_rows(metadata: CompiledMetadata, rows: list[SequenceSlice], block_size: int) -> None:
    """Write rows of one token each.

    Raises:
        EngineError: a row's blocks do not cover its tokens.
    """
    totals = np.array([row.context_len for row in rows], dtype=np.int64)
    counts = -(-totals // block_size)
    check_tables(rows, counts)
    metadata.items[:, 3] = totals
    tables = metadata.tables.reshape(len(rows), -1)
    for table, row, count in zip(tables, rows, counts.tolist(), strict=True):
        table[:count] = first_blocks(row.slots, count)


def values_together(x: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attend(
    shape: int,
    metadata: CompiledMetadata,
    cache: tuple[int, int],
    query: Tensor | None,
    query_rope: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    out: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
) -> None:
    """Write keys and values, where they are given, and attend, where there are queries.

    Args:
        shape: the address of the cache's sizes.
        cache: a layer's addresses.
        query, query_rope, key, value: [T, heads, width] each, values contiguous; all of the cache's dtype.
        out: [T, num_heads, value_width], contiguous.
        lse: [T, num_heads] in float32, filled with the log of the sum of exponential scores.
    """
    items, tables, members = metadata.addresses
    _attend(
        shape,
        items,
        len(metadata.items),
        tables,
        members,
        *cache,
        *_view(query),
        *_view(query_rope),
        *_view(key),
        *_view(value),
        None if out is None else out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        scale,
        torch.get_num_threads(),
    )


def _view(x: Tensor | None) -> tuple[int | None, int, int]:
    if x is None:
        return None, 0, 0
    token, head, _ = x.stride()
    return x.data_ptr(), token, head
