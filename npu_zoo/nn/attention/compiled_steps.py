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

_FIRST, _TOKENS, _TABLE, _KEYS, _PREFIX, _PREFIX_ROW, _FIELDS = 0, 1, 2, 3, 4, 5, 8
"""Where an item has what, and how many numbers it has; see ``csrc/cache.h``."""

Member = tuple[list[int], int]
"""Rows that share a prefix, and how many blocks it has."""


@dataclass(frozen=True)
class CompiledMetadata(AttentionMetadata):
    """A step's rows as the library takes them.

    Attributes:
        items: [prefixes and rows, 8], as ``csrc/cache.h`` has them.
        tables: the blocks of all rows, one row's after the other's.
        members: the tokens of shared prefixes.
        shared: how many items are prefixes that are attended to once for several rows, or room for them.
        addresses: of the three arrays.
    """

    items: NDArray[np.int64]
    tables: NDArray[np.int64]
    members: NDArray[np.int64]
    shared: int
    addresses: tuple[int, int, int]

    @property
    def own(self) -> NDArray[np.int64]:
        """The items that are rows."""
        return self.items[self.shared :]


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
    first_tokens, first_blocks = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
    items = np.zeros((len(shared) + len(rows), _FIELDS), dtype=np.int64)
    members = np.zeros(sum(int(lengths[numbers].sum()) for numbers, _ in shared), dtype=np.int64)
    made = _metadata(rows, int(lengths.sum()), items, tables, members, len(shared))
    made.own[:, _FIRST], made.own[:, _TOKENS] = first_tokens, lengths
    _fill(made, first_blocks, starts + lengths, block_size, shared)
    return made


def fixed_metadata(batch: int, blocks: int) -> CompiledMetadata:
    """Room for rows of one token each, with up to ``blocks`` blocks, that :func:`refill_rows` writes."""
    prefixes = batch // 2  # each of two rows at least
    items = np.zeros((prefixes + batch, _FIELDS), dtype=np.int64)
    tables, members = np.zeros(batch * blocks, dtype=np.int64), np.zeros(batch, dtype=np.int64)
    made = _metadata([], batch, items, tables, members, prefixes)
    made.own[:, _FIRST], made.own[:, _TOKENS] = np.arange(batch), 1
    return made


def refill_rows(metadata: CompiledMetadata, rows: list[SequenceSlice], block_size: int, shared: list[Member]) -> None:
    """Write rows of one token each, as many as there is room for.

    Raises:
        EngineError: a row's blocks do not cover its tokens.
    """
    totals = np.array([row.context_len for row in rows], dtype=np.int64)
    counts = -(-totals // block_size)
    check_tables(rows, counts)
    tables = metadata.tables.reshape(len(rows), -1)
    for table, row, count in zip(tables, rows, counts.tolist(), strict=True):
        table[:count] = first_blocks(row.slots, count)
    _fill(metadata, np.arange(len(rows)) * tables.shape[1], totals, block_size, shared)


def _metadata(
    rows: list[SequenceSlice],
    num_tokens: int,
    items: NDArray[np.int64],
    tables: NDArray[np.int64],
    members: NDArray[np.int64],
    prefixes: int,
) -> CompiledMetadata:
    addresses = items.ctypes.data, tables.ctypes.data, members.ctypes.data
    return CompiledMetadata(rows, num_tokens, items, tables, members, prefixes, addresses)


def _fill(
    metadata: CompiledMetadata,
    first_blocks: NDArray[np.int64],
    totals: NDArray[np.int64],
    block_size: int,
    shared: list[Member],
) -> None:
    """Tell what rows of known first tokens and lengths read: their own blocks, and prefixes that they share."""
    own, prefixes = metadata.own, metadata.items[: metadata.shared]
    own[:, _TABLE], own[:, _KEYS], own[:, _PREFIX] = first_blocks, totals, -1
    prefixes[:] = 0, 0, 0, 0, -1, 0, 1, 1
    done = 0
    for number, (numbers, blocks) in enumerate(shared):
        lengths = own[numbers, _TOKENS]
        tokens = np.concatenate([first + np.arange(n) for first, n in own[numbers, :_TABLE].tolist()])
        prefixes[number, :_PREFIX] = done, len(tokens), first_blocks[numbers[0]], blocks * block_size
        own[numbers, _TABLE] += blocks
        own[numbers, _KEYS] -= blocks * block_size
        own[numbers, _PREFIX] = number
        own[numbers, _PREFIX_ROW] = np.cumsum(lengths) - lengths
        metadata.members[done : done + len(tokens)] = tokens
        done += len(tokens)


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
