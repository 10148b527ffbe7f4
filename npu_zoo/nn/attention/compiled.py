"""Attention over keys and values by head, by the compiled library: in bfloat16, float32 and int8.

Keys and values lie in strips of 32 tokens, laid out as the processor's products read them (``csrc/strips.h``). One call
a layer writes a step's keys and values and attends for all of its rows, whatever they are: it cuts them by row,
key-value head and stretch of context, so that threads have equal shares, and keeps softmax and sums in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import AttentionBackend, AttentionMetadata, CacheLayout, ReplayAttention, SequenceSlice
from npu_zoo.core.errors import ConfigError, EngineError
from npu_zoo.nn.attention.cache import allocate_zeros
from npu_zoo.nn.attention.compiled_steps import (
    STRIP,
    CompiledMetadata,
    Member,
    attend,
    fixed_metadata,
    make_metadata,
    refill_rows,
    strip_bytes,
    values_together,
)
from npu_zoo.nn.attention.sharing import find_shared_prefixes
from npu_zoo.nn.attention.tables import block_tables, check_tables

_BF16, _FLOAT32, _INT8_OF_BF16, _INT8_OF_FLOAT32 = range(4)
_LANES = 16
_PAIRS = 32
_WIDEST = 1024


class CompiledPagedAttention(AttentionBackend, ReplayAttention):
    """Attention over a pool of blocks, on a CPU.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens, a multiple of 32.
        scale: what a query's product with a key is multiplied by.

    Raises:
        ConfigError: the query heads cannot be shared out among the key-value heads, or a size is none that it takes.
        HardwareError: there is not enough memory, or the library is not built.
    """

    _kinds: ClassVar[dict[torch.dtype, int]] = {torch.bfloat16: _BF16, torch.float32: _FLOAT32}

    def __init__(
        self, layout: CacheLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        if num_heads % layout.num_kv_heads:
            raise ConfigError(f"{num_heads} query heads cannot share {layout.num_kv_heads} key-value heads evenly")
        self.layout, self.num_heads, self.scale = layout, num_heads, scale
        self._dtype = dtype
        blocks, self.block_size = self._blocks(layout)
        kind, kv_heads, head_dim = self._kind(dtype), layout.num_kv_heads, layout.head_dim
        strips = self.block_size // STRIP
        lead = (layout.num_layers, blocks, kv_heads)
        self.keys, self.values = (
            allocate_zeros((*lead, strips * strip_bytes(kind, head_dim, values)), torch.uint8, device)
            for values in (0, 1)
        )
        self._places = list(zip(map(Tensor.data_ptr, self.keys), map(Tensor.data_ptr, self.values), strict=True))
        sizes = [kind, num_heads, kv_heads, head_dim, 0, head_dim, self.block_size]
        self._sizes = np.array(sizes, dtype=np.int64)
        self._shape = self._sizes.ctypes.data

    def lazy_memory(self) -> Sequence[Tensor]:
        """See :meth:`StepAttention.lazy_memory`."""
        return self.keys, self.values

    def _kind(self, dtype: torch.dtype) -> int:
        if dtype not in self._kinds or self.layout.head_dim > _WIDEST:
            raise ConfigError(
                f"{type(self).__name__} takes {' and '.join(map(str, self._kinds))} and heads of up to {_WIDEST} "
                f"values, not {dtype} and {self.layout.head_dim}; choose another attention backend"
            )
        return self._kinds[dtype]

    def _blocks(self, layout: CacheLayout) -> tuple[int, int]:
        """The number of blocks, and tokens of one."""
        if layout.slot_size % STRIP:
            raise ConfigError(f"blocks of {layout.slot_size} tokens are no multiple of {STRIP}; choose another size")
        return layout.num_slots, layout.slot_size

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer, with what fills vectors up."""
        keys = _filled(head_dim, _PAIRS if itemsize == 2 else 4)
        return num_kv_heads * (keys + _filled(head_dim, _LANES)) * itemsize

    def prepare(self, rows: list[SequenceSlice]) -> CompiledMetadata:
        """Turn a step's rows into what all layers share.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        starts = np.array([row.start for row in rows], dtype=np.int64)
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        tables, counts = self._tables(rows, starts + lengths)
        return make_metadata(rows, starts, lengths, tables, counts, self.block_size, self._shared(rows))

    def replay_metadata(self, batch: int, max_context: int) -> CompiledMetadata:
        """See :class:`ReplayAttention`."""
        return fixed_metadata(batch, -(-max_context // self.block_size))

    def refill(self, metadata: AttentionMetadata, rows: list[SequenceSlice], count: int) -> None:
        """See :class:`ReplayAttention`.

        Raises:
            EngineError: a row's blocks do not cover its tokens, or the metadata is another backend's.
        """
        refill_rows(self._own(metadata), rows, self.block_size, self._shared(rows[:count]))

    def _own(self, metadata: AttentionMetadata) -> CompiledMetadata:
        if not isinstance(metadata, CompiledMetadata):
            raise EngineError(f"{type(self).__name__} takes what its prepare() made, not {type(metadata).__name__}")
        return metadata

    def _tables(
        self, rows: list[SequenceSlice], totals: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks of all rows, and how many of them each has."""
        counts = -(-totals // self.block_size)
        check_tables(rows, counts)
        return block_tables(rows, counts), counts

    def _shared(self, rows: list[SequenceSlice]) -> list[Member]:
        return find_shared_prefixes(rows, self.block_size, 1)

    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write the step's keys and values, then attend; see :meth:`AttentionBackend.forward`.

        Raises:
            EngineError: the metadata is another backend's, or a tensor has another dtype than the cache was made for.
        """
        step = self._own(metadata)
        if query.dtype != self._dtype or key.dtype != self._dtype or value.dtype != self._dtype:
            raise EngineError(f"{type(self).__name__} was made for {self._dtype}, not {query.dtype}")
        out = torch.empty(query.shape, dtype=query.dtype)
        query, key, value = values_together(query), values_together(key), values_together(value)
        attend(self._shape, step, self._places[layer], query, None, key, value, out, self.scale)
        return out


class CompiledContiguousAttention(CompiledPagedAttention):
    """The same over one slot per sequence: a block as large as the longest sequence."""

    def _blocks(self, layout: CacheLayout) -> tuple[int, int]:
        return layout.num_slots, _filled(layout.slot_size, STRIP)

    def _tables(
        self, rows: list[SequenceSlice], totals: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        for row in rows:
            if len(row.slots) != 1 or row.context_len > self.layout.slot_size:
                raise EngineError(
                    f"a row of {row.context_len} tokens in {len(row.slots)} slots cannot be kept contiguous; "
                    f"a sequence takes one slot of {self.layout.slot_size} tokens"
                )
        counts = np.ones(len(rows), dtype=np.int64)
        check_tables(rows, counts)
        return block_tables(rows, counts), counts

    def _shared(self, rows: list[SequenceSlice]) -> list[Member]:
        return []


class CompiledInt8PagedAttention(CompiledPagedAttention):
    """Attention over a pool of blocks of int8 keys and values, ``max|x| / 127`` apart by token and head."""

    _kinds: ClassVar[dict[torch.dtype, int]] = {torch.bfloat16: _INT8_OF_BF16, torch.float32: _INT8_OF_FLOAT32}

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer: codes and two scales, whatever the dtype is."""
        scales = 2 * torch.float32.itemsize
        return num_kv_heads * (_filled(head_dim, 4) + _filled(head_dim, _LANES) + scales)


class CompiledInt8ContiguousAttention(CompiledInt8PagedAttention, CompiledContiguousAttention):
    """The same over one slot per sequence."""


def _filled(width: int, step: int) -> int:
    return -(-width // step) * step
