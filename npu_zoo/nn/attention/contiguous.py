"""Contiguous attention: the keys and values of a sequence in one stretch of memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from npu_zoo.core.attention import CacheLayout, SequenceSlice
from npu_zoo.core.errors import EngineError
from npu_zoo.nn.attention.cache import BlockCache
from npu_zoo.nn.attention.paged import PagedAttention, PagedMetadata

_TILE = 64


class ContiguousAttention(PagedAttention):
    """Attention over one slot per sequence, on any device that torch drives.

    A slot is a run of tiles that follow each other in memory, which makes it a block table that never changes.

    Args:
        layout: ``num_slots`` sequences of up to ``slot_size`` tokens.
        scale: what a query's product with a key is multiplied by.
    """

    def _allocate(self, layout: CacheLayout, dtype: torch.dtype, device: torch.device) -> BlockCache:
        tile = min(_TILE, layout.slot_size)
        self._tiles = -(-layout.slot_size // tile)
        return self._cache_class(
            layout.num_layers,
            layout.num_slots * self._tiles,
            tile,
            layout.num_kv_heads,
            layout.head_dim,
            dtype,
            device,
        )

    def prepare(self, rows: list[SequenceSlice]) -> PagedMetadata:
        """Turn a step's rows into the tensors that all layers share.

        Raises:
            EngineError: a row is longer than a slot, or has not exactly one.
        """
        rows_of_tiles = [tiled(row, self.layout.slot_size, self._tiles) for row in rows]
        return replace(self._prepare(rows_of_tiles, []), rows=rows)


def tiled(row: SequenceSlice, slot_size: int, tiles: int) -> SequenceSlice:
    """A row in one slot as a row in the ``tiles`` blocks that the slot is made of.

    Raises:
        EngineError: the row is longer than a slot, or has not exactly one.
    """
    if len(row.slots) != 1 or row.context_len > slot_size:
        raise EngineError(
            f"a row of {row.context_len} tokens in {len(row.slots)} slots cannot be kept contiguous; "
            f"a sequence takes one slot of {slot_size} tokens"
        )
    first = row.slots[0] * tiles
    return replace(row, slots=range(first, first + tiles))
