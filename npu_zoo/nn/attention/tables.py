"""Where the tokens of a step lie in the blocks of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.core.errors import EngineError


def check_tables(rows: list[SequenceSlice], counts: NDArray[np.int64]) -> None:
    """Refuse rows without tokens, or with fewer blocks than ``counts`` says that they need.

    Raises:
        EngineError: names the row.
    """
    for row, count in zip(rows, counts.tolist(), strict=True):
        if len(row.slots) < count or row.num_tokens < 1:
            raise EngineError(
                f"a row of {row.num_tokens} tokens from position {row.start} on needs {count} blocks, "
                f"it has {len(row.slots)}; allocate blocks for all tokens of a step before it runs"
            )


def block_tables(rows: list[SequenceSlice], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The blocks of all rows, one row after the other, exactly as many as each needs."""
    if not rows:
        return np.empty(0, dtype=np.int64)
    used = [first_blocks(row.slots, count) for row, count in zip(rows, counts.tolist(), strict=True)]
    return np.concatenate(used, dtype=np.int64)


def first_blocks(slots: Sequence[int], count: int) -> NDArray[np.integer[Any]]:
    """The first blocks of a table, without going through them where it is an array's."""
    if isinstance(slots, range):
        return np.arange(slots.start, slots.start + count)
    return np.asarray(slots)[:count]


def split_tables(tables: NDArray[np.int64], counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Each row's blocks out of the blocks of all rows."""
    return np.split(tables, np.cumsum(counts)[:-1]) if len(counts) else []


def token_places(
    tables: NDArray[np.int64],
    counts: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    first_tokens: NDArray[np.int64],
    block_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The block of every new token, and its place within it."""
    positions = np.arange(lengths.sum()) + np.repeat(starts - first_tokens, lengths)
    row_starts = np.repeat(np.cumsum(counts) - counts, lengths)
    return tables[row_starts + positions // block_size], positions % block_size
