"""Attention by torch_npu's fused operators over a pool of blocks (Ascend 910B)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch_npu
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import AttentionBackend, AttentionMetadata, CacheLayout, GraphAttention, SequenceSlice
from npu_zoo.core.errors import EngineError
from npu_zoo.nn.attention.cache import allocate_zeros
from npu_zoo.nn.attention.contiguous import tiled
from npu_zoo.nn.attention.tables import block_tables, check_tables, split_tables, token_places

MASK_SIZE = 2048
"""Rows and columns of the one triangle that serves every length (sparse mode 3)."""

RIGHT_DOWN_CAUSAL = 3
TILE = 128
_WORD = torch.int32.itemsize


@dataclass(frozen=True)
class FusedMetadata(AttentionMetadata):
    """A step as the operators take it.

    Attributes:
        slots: int32 or int64 [T], ``block * block_size + offset`` of every new token.
        block_table: int32 [B, most blocks of a row].
        query_ends: the rows' tokens, summed up.
        context_lens: each row's keys.
    """

    slots: Tensor
    block_table: Tensor
    query_ends: list[int]
    context_lens: list[int]


def causal_mask(device: torch.device) -> Tensor:
    """[2048, 2048], True above the diagonal."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1).to(device)


def plan_step(
    rows: list[SequenceSlice], block_size: int, device: torch.device, slot_dtype: torch.dtype = torch.int32
) -> FusedMetadata:
    """Turn a step's rows into what the operators take, with one copy to the device.

    Raises:
        EngineError: a row's blocks do not cover its tokens.
    """
    widest = max(-(-row.context_len // block_size) for row in rows)
    total = sum(row.num_tokens for row in rows)
    words = total * slot_dtype.itemsize // _WORD
    packed = torch.zeros(words + len(rows) * widest, dtype=torch.int32)
    pack_rows(rows, block_size, packed[:words].view(slot_dtype).numpy(), packed[words:].numpy())
    on_device = packed.to(device)
    return FusedMetadata(
        rows=rows,
        num_tokens=total,
        slots=on_device[:words].view(slot_dtype),
        block_table=on_device[words:].view(len(rows), widest),
        query_ends=list(accumulate(row.num_tokens for row in rows)),
        context_lens=[row.context_len for row in rows],
    )


def pack_rows(
    rows: list[SequenceSlice], block_size: int, slots: NDArray[np.integer[Any]], table: NDArray[np.int32]
) -> None:
    """Write the slots of all new tokens, and a block table as wide as there is room for.

    Raises:
        EngineError: a row's blocks do not cover its tokens.
    """
    starts = np.array([row.start for row in rows], dtype=np.int64)
    lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
    counts = -(-(starts + lengths) // block_size)
    check_tables(rows, counts)
    tables = block_tables(rows, counts)
    blocks, offsets = token_places(tables, counts, starts, lengths, np.cumsum(lengths) - lengths, block_size)
    slots[:] = blocks * block_size + offsets
    by_row = table.reshape(len(rows), -1)
    for row, used in enumerate(split_tables(tables, counts)):
        by_row[row, : len(used)] = used


@dataclass(frozen=True)
class StaticRows:
    """Slots and block table of a batch of single tokens that stay where they are, for a graph.

    Attributes:
        staged: the same on the host, pinned.
    """

    staged: Tensor
    on_device: Tensor
    batch: int
    block_size: int
    slot_dtype: torch.dtype

    @staticmethod
    def allocate(
        batch: int, max_context: int, block_size: int, device: torch.device, slot_dtype: torch.dtype = torch.int32
    ) -> StaticRows:
        """For rows of up to ``max_context`` keys."""
        words = batch * (slot_dtype.itemsize // _WORD + -(-max_context // block_size))
        staged = torch.zeros(words, dtype=torch.int32).pin_memory()
        return StaticRows(staged, staged.to(device), batch, block_size, slot_dtype)

    @property
    def slots(self) -> Tensor:
        """[batch]."""
        return self._slots(self.on_device)

    @property
    def block_table(self) -> Tensor:
        """[batch, blocks]."""
        return self._table(self.on_device).view(self.batch, -1)

    def fill(self, rows: list[SequenceSlice]) -> None:
        """Write a step's rows, without waiting for the device."""
        self.stage(rows)
        self.on_device.copy_(self.staged, non_blocking=True)

    def stage(self, rows: list[SequenceSlice]) -> NDArray[np.integer[Any]]:
        """Write a step's rows on the host, and give their slots back."""
        slots = self._slots(self.staged).numpy()
        pack_rows(rows, self.block_size, slots, self._table(self.staged).numpy())
        return slots

    def _slots(self, packed: Tensor) -> Tensor:
        return packed[: self.batch * self.slot_dtype.itemsize // _WORD].view(self.slot_dtype)

    def _table(self, packed: Tensor) -> Tensor:
        return packed[self.batch * self.slot_dtype.itemsize // _WORD :]


@dataclass(frozen=True)
class GraphMetadata(FusedMetadata):
    """A step of single tokens in static tensors."""

    static: StaticRows


class FusedPagedAttention(AttentionBackend, GraphAttention):
    """Prefill, chunks that continue a prefix, and decode, all by one operator over the paged cache.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens.
        scale: what a query's product with a key is multiplied by.

    Raises:
        HardwareError: there is not enough memory.
    """

    def __init__(
        self, layout: CacheLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        self.layout, self.num_heads, self.scale, self.device = layout, num_heads, scale, device
        self.block_size, self.spare_slot = self._blocks(layout)
        self._caches = self._allocate(dtype)
        self._mask = causal_mask(device)

    def _allocate(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [blocks, block_size, num_kv_heads, head_dim], with the spare block."""
        layout = self.layout
        shape = (2, layout.num_layers, self.spare_slot + 1, self.block_size, layout.num_kv_heads, layout.head_dim)
        keys, values = allocate_zeros(shape, dtype, self.device)
        return list(zip(keys, values, strict=True))

    def _blocks(self, layout: CacheLayout) -> tuple[int, int]:
        """Tokens of a block, and the number of blocks."""
        return layout.slot_size, layout.num_slots

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""
        return 2 * num_kv_heads * head_dim * itemsize

    def prepare(self, rows: list[SequenceSlice]) -> FusedMetadata:
        """See :func:`plan_step`."""
        return plan_step(rows, self.block_size, self.device)

    def graph_metadata(self, batch: int, max_context: int) -> GraphMetadata:
        """See :meth:`GraphAttention.graph_metadata`."""
        static = StaticRows.allocate(batch, max_context, self.block_size, self.device)
        return GraphMetadata(
            rows=[],
            num_tokens=batch,
            slots=static.slots,
            block_table=static.block_table,
            query_ends=list(range(1, batch + 1)),
            context_lens=[max_context] * batch,
            static=static,
        )

    def fill(self, metadata: AttentionMetadata, rows: list[SequenceSlice]) -> dict[str, Any]:
        """See :meth:`GraphAttention.fill`."""
        assert isinstance(metadata, GraphMetadata)
        metadata.static.fill(rows)
        return {"actual_seq_lengths_kv": [row.context_len for row in rows]}

    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write the step's keys and values, then attend; see :meth:`AttentionBackend.forward`.

        Raises:
            EngineError: the metadata is another backend's.
        """
        if not isinstance(metadata, FusedMetadata):
            raise EngineError(f"{type(self).__name__} takes what its prepare() made, not {type(metadata).__name__}")
        key_cache, value_cache = self._caches[layer]
        torch_npu.npu_scatter_pa_kv_cache(
            key.contiguous(), value.contiguous(), key_cache, value_cache, metadata.slots, cache_mode="Norm"
        )
        caches = key_cache.flatten(2), value_cache.flatten(2)
        return self._attend(query, *caches, metadata.block_table, metadata.query_ends, metadata.context_lens)

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        query_ends: list[int],
        context_lens: list[int],
    ) -> Tensor:
        """Attend causally from [T, num_heads, head_dim] over blocks of [block_size, num_kv_heads * head_dim]."""
        attended: Tensor = torch_npu.npu_fused_infer_attention_score(
            query,
            keys,
            values,
            atten_mask=self._mask,
            block_table=block_table,
            input_layout="TND",
            block_size=self.block_size,
            actual_seq_lengths=query_ends,
            actual_seq_lengths_kv=context_lens,
            num_heads=self.num_heads,
            num_key_value_heads=self.layout.num_kv_heads,
            scale=self.scale,
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )[0]
        return attended


class TiledSlots(GraphAttention):
    """Makes a paged backend contiguous: a sequence's slot is a run of tiles, a block table that never changes."""

    layout: CacheLayout

    def _blocks(self, layout: CacheLayout) -> tuple[int, int]:
        self._tiles = -(-layout.slot_size // TILE)
        return TILE, layout.num_slots * self._tiles

    def fill(self, metadata: AttentionMetadata, rows: list[SequenceSlice]) -> dict[str, Any]:
        """See :meth:`GraphAttention.fill`; a row of padding lies in the spare block, which is none of a slot's."""
        spare = (self.spare_slot,)
        return super().fill(metadata, [row if row.slots == spare else self._tiled(row) for row in rows])  # type: ignore[safe-super]

    def prepare(self, rows: list[SequenceSlice]) -> Any:
        """Turn a step's rows into what the operators take.

        Raises:
            EngineError: a row is longer than a slot, or has not exactly one.
        """
        return replace(super().prepare([self._tiled(row) for row in rows]), rows=rows)  # type: ignore[safe-super]

    def _tiled(self, row: SequenceSlice) -> SequenceSlice:
        return tiled(row, self.layout.slot_size, self._tiles)


class FusedContiguousAttention(TiledSlots, FusedPagedAttention):
    """The same over one stretch of memory per sequence."""
