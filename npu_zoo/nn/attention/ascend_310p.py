"""Attention by operators of the Ascend Transformer Boost library over a cache in FRACTAL_NZ (Ascend 310P).

The chip has no other fused attention over pages. Single tokens and rows of several go to an operator each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_npu
from torch import Tensor

from npu_zoo.core.attention import AttentionBackend, AttentionMetadata, CacheLayout, GraphAttention, SequenceSlice
from npu_zoo.core.errors import EngineError, HardwareError
from npu_zoo.nn.attention.ascend import MASK_SIZE, FusedMetadata, StaticRows, TiledSlots, plan_step
from npu_zoo.nn.kernels.ascend import FRACTAL_NZ

FRACTAL = 16
MASKED = -10000.0
BLOCK_VALUES = 128 * 128
"""Most values of one head that a block of the cache may hold."""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind.

    Attributes:
        tokens: [Q], their places in the step; None where the step has no others.
        block_table: int32 [B, blocks].
        lengths, context_lens: int32 [B] on the host, each row's queries and keys.
    """

    tokens: Tensor | None
    block_table: Tensor
    lengths: Tensor
    context_lens: Tensor


@dataclass(frozen=True)
class AtbMetadata(AttentionMetadata):
    """A step, by kind of row; ``slots``, int32 [T], say where new tokens go."""

    slots: Tensor
    single: Rows | None
    several: Rows | None


@dataclass(frozen=True)
class AtbGraphMetadata(AtbMetadata):
    """A step of single tokens in static tensors."""

    static: StaticRows


class AtbPagedAttention(AttentionBackend, GraphAttention):
    """Attention over a pool of blocks in FRACTAL_NZ.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens.
        scale: what a query's product with a key is multiplied by.

    Raises:
        HardwareError: a block holds more of a head than the operators take, or there is not enough memory.
    """

    def __init__(
        self, layout: CacheLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        self.layout, self.num_heads, self.scale, self.device = layout, num_heads, scale, device
        self.block_size, blocks = self._blocks(layout)
        if self.block_size * layout.head_dim > BLOCK_VALUES:
            raise HardwareError(
                f"blocks of {self.block_size} tokens with head size {layout.head_dim} are too large for this chip; "
                f"--block-size {BLOCK_VALUES // layout.head_dim} is the largest"
            )
        torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
        self.spare_slot = blocks
        shape = (blocks + 1, layout.num_kv_heads * layout.head_dim // FRACTAL, self.block_size, FRACTAL)
        self._caches = [(self._allocate(shape, dtype), self._allocate(shape, dtype)) for _ in range(layout.num_layers)]
        self._mask = torch.full((MASK_SIZE, MASK_SIZE), MASKED, dtype=dtype).triu(1).to(device)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        cache: Tensor = torch_npu.empty_with_format(shape, dtype=dtype, device=self.device, acl_format=FRACTAL_NZ)
        return cache.zero_()

    def _blocks(self, layout: CacheLayout) -> tuple[int, int]:
        """Tokens of a block, and the number of blocks."""
        return layout.slot_size, layout.num_slots

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""
        return 2 * num_kv_heads * head_dim * itemsize

    def prepare(self, rows: list[SequenceSlice]) -> AtbMetadata:
        """Turn a step's rows into what the operators take.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        step = plan_step(rows, self.block_size, self.device)
        single = [number for number, row in enumerate(rows) if row.num_tokens == 1]
        several = [number for number, row in enumerate(rows) if row.num_tokens > 1]
        return AtbMetadata(
            rows=rows,
            num_tokens=step.num_tokens,
            slots=step.slots,
            single=self._rows(step, single) if single else None,
            several=self._rows(step, several) if several else None,
        )

    def graph_metadata(self, batch: int, max_context: int) -> AtbGraphMetadata:
        """See :meth:`GraphAttention.graph_metadata`."""
        static = StaticRows.allocate(batch, max_context, self.block_size, self.device)
        longest = torch.full((batch,), max_context, dtype=torch.int32)
        rows = Rows(None, static.block_table, torch.ones(batch, dtype=torch.int32), longest)
        return AtbGraphMetadata([], batch, static.slots, rows, None, static)

    def fill(self, metadata: AttentionMetadata, rows: list[SequenceSlice]) -> dict[str, Any]:
        """See :meth:`GraphAttention.fill`."""
        assert isinstance(metadata, AtbGraphMetadata)
        metadata.static.fill(rows)
        return {"context_lens": torch.tensor([row.context_len for row in rows], dtype=torch.int32)}

    def _rows(self, step: FusedMetadata, numbers: list[int]) -> Rows:
        chosen = [step.rows[number] for number in numbers]
        lengths = torch.tensor([row.num_tokens for row in chosen], dtype=torch.int32)
        context_lens = torch.tensor([row.context_len for row in chosen], dtype=torch.int32)
        if len(chosen) == len(step.rows):
            return Rows(None, step.block_table, lengths, context_lens)
        ends = [0, *step.query_ends]
        places = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in numbers])
        table = step.block_table[torch.tensor(numbers).to(self.device)]
        return Rows(torch.from_numpy(places).to(self.device), table, lengths, context_lens)

    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write the step's keys and values, then attend; see :meth:`AttentionBackend.forward`.

        Raises:
            EngineError: the metadata is another backend's.
        """
        if not isinstance(metadata, AtbMetadata):
            raise EngineError(f"{type(self).__name__} takes what its prepare() made, not {type(metadata).__name__}")
        caches = self._caches[layer]
        torch_npu._npu_reshape_and_cache(
            key=key.contiguous(),
            value=value.contiguous(),
            key_cache=caches[0],
            value_cache=caches[1],
            slot_indices=metadata.slots,
        )
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for rows, attend in ((metadata.single, self._attend_single), (metadata.several, self._attend_several)):
            if rows is None:
                continue
            if rows.tokens is None:
                attend(query.contiguous(), caches, rows, out)
            else:
                part = query[rows.tokens]
                result = torch.empty_like(part)
                attend(part, caches, rows, result)
                out[rows.tokens] = result
        return out

    def _attend_single(self, query: Tensor, caches: tuple[Tensor, Tensor], rows: Rows, out: Tensor) -> None:
        torch_npu._npu_paged_attention(
            query=query,
            key_cache=caches[0],
            value_cache=caches[1],
            num_kv_heads=self.layout.num_kv_heads,
            num_heads=self.num_heads,
            scale_value=self.scale,
            block_table=rows.block_table,
            context_lens=rows.context_lens,
            out=out,
        )

    def _attend_several(self, query: Tensor, caches: tuple[Tensor, Tensor], rows: Rows, out: Tensor) -> None:
        torch_npu._npu_paged_attention_splitfuse_v2(
            query=query,
            key_cache=caches[0],
            value_cache=caches[1],
            mask=self._mask,
            block_table=rows.block_table,
            seq_len=rows.lengths,
            context_lens=rows.context_lens,
            num_kv_heads=self.layout.num_kv_heads,
            num_heads=self.num_heads,
            scale_value=self.scale,
            mask_type=5,
            out=out,
        )


class AtbContiguousAttention(TiledSlots, AtbPagedAttention):
    """The same over one stretch of memory per sequence."""
