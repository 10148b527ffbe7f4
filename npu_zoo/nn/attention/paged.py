"""Paged attention: keys and values in blocks behind a block table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import AttentionBackend, AttentionMetadata, CacheLayout, SequenceSlice
from npu_zoo.core.errors import ConfigError, EngineError
from npu_zoo.nn.attention.cache import BlockCache, Blocks
from npu_zoo.nn.attention.decode import DecodePlan, attend_decode, plan_decode
from npu_zoo.nn.attention.prefill import attend
from npu_zoo.nn.attention.sharing import find_shared_prefixes, merge
from npu_zoo.nn.attention.tables import block_tables, check_tables, split_tables, token_places
from npu_zoo.nn.attention.workspace import Workspace

_BATCHED_SCORES = 2**22


@dataclass(frozen=True)
class Prefill:
    """``batch`` rows of ``length`` new tokens each, from token ``first`` of the step on.

    Attributes:
        blocks: where a single row's ``total`` keys lie; None where rows begin here, so that their keys are the step's.
    """

    first: int
    batch: int
    length: int
    total: int
    blocks: Blocks | None = None


@dataclass(frozen=True)
class SharedPrefix:
    """The tokens of a step, [n], that all see ``length`` tokens in the same blocks."""

    tokens: Tensor
    blocks: Blocks
    length: int


@dataclass(frozen=True)
class PagedMetadata(AttentionMetadata):
    """A step, split into its kinds of work; ``blocks`` and ``offsets``, [T] each, say where new tokens go."""

    blocks: Tensor
    offsets: Tensor
    decode: DecodePlan | None
    prefills: list[Prefill]
    shared: list[SharedPrefix]


class PagedAttention(AttentionBackend):
    """Attention over a pool of blocks, on any device that torch drives.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens.
        scale: what a query's product with a key is multiplied by.

    Raises:
        ConfigError: the query heads cannot be shared out among the key-value heads.
        HardwareError: there is not enough memory.
    """

    _cache_class: type[BlockCache] = BlockCache
    _prefix_cost = 2

    def __init__(
        self, layout: CacheLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        if num_heads % layout.num_kv_heads:
            raise ConfigError(f"{num_heads} query heads cannot share {layout.num_kv_heads} key-value heads evenly")
        self.layout = layout
        self.num_heads = num_heads
        self.scale = scale
        self.cache = self._allocate(layout, dtype, device)
        self._workspace = Workspace(dtype, device)

    def _allocate(self, layout: CacheLayout, dtype: torch.dtype, device: torch.device) -> BlockCache:
        return self._cache_class(
            layout.num_layers,
            layout.num_slots,
            layout.slot_size,
            layout.num_kv_heads,
            layout.head_dim,
            dtype,
            device,
        )

    def lazy_memory(self) -> Sequence[Tensor]:
        """See :meth:`StepAttention.lazy_memory`."""
        return self.cache.lazy_memory

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""
        return 2 * num_kv_heads * head_dim * itemsize

    def prepare(self, rows: list[SequenceSlice]) -> PagedMetadata:
        """Turn a step's rows into the tensors that all layers share.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        return self._prepare(rows, find_shared_prefixes(rows, self.cache.block_size, self._prefix_cost))

    def _prepare(self, rows: list[SequenceSlice], shared: list[tuple[list[int], int]]) -> PagedMetadata:
        size = self.cache.block_size
        starts = np.array([row.start for row in rows], dtype=np.int64)
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        counts = -(-(starts + lengths) // size)
        check_tables(rows, counts)
        skipped = np.zeros(len(rows), dtype=np.int64)
        for members, count in shared:
            skipped[members] = count
        tables = block_tables(rows, counts)
        first_tokens = np.cumsum(lengths) - lengths
        self.cache.open(tables)
        blocks, offsets = token_places(tables, counts, starts, lengths, first_tokens, size)
        own = [table[skip:] for table, skip in zip(split_tables(tables, counts), skipped, strict=True)]
        single = np.flatnonzero(lengths == 1)
        decode = None
        if len(single):
            totals = (starts + lengths - skipped * size)[single]
            decode = plan_decode(first_tokens[single], [own[row] for row in single], totals, self.num_heads, self.cache)
        return PagedMetadata(
            rows=rows,
            num_tokens=int(lengths.sum()),
            blocks=torch.from_numpy(blocks).to(self.cache.device),
            offsets=torch.from_numpy(offsets).to(self.cache.device),
            decode=decode,
            prefills=list(self._prefills(starts - skipped * size, lengths, first_tokens, own)),
            shared=[self._shared_prefix(rows, members, count, first_tokens) for members, count in shared],
        )

    def _prefills(
        self,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        first_tokens: NDArray[np.int64],
        tables: list[NDArray[np.int64]],
    ) -> Iterator[Prefill]:
        """Rows of several tokens; neighbours that begin here and are equally long go together."""
        row = 0
        while row < len(lengths):
            start, length, first = int(starts[row]), int(lengths[row]), int(first_tokens[row])
            batch = 1
            if length > 1 and start:
                yield Prefill(first, 1, length, start + length, self.cache.index(tables[row]))
            elif length > 1:
                most = max(1, _BATCHED_SCORES // (self.num_heads * length * length))
                same = (lengths[row : row + most] == length) & (starts[row : row + most] == 0)
                batch = len(same) if same.all() else int(same.argmin())
                yield Prefill(first, batch, length, length)
            row += batch

    def _shared_prefix(
        self, rows: list[SequenceSlice], members: list[int], count: int, first_tokens: NDArray[np.int64]
    ) -> SharedPrefix:
        tokens = np.concatenate([first_tokens[row] + np.arange(rows[row].num_tokens) for row in members])
        blocks = self.cache.index(rows[members[0]].slots[:count])
        return SharedPrefix(torch.from_numpy(tokens).to(self.cache.device), blocks, count * self.cache.block_size)

    @torch.no_grad()
    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write the step's keys and values, then attend; see :meth:`AttentionBackend.forward`.

        Raises:
            EngineError: the metadata is another backend's.
        """
        if not isinstance(metadata, PagedMetadata):
            raise EngineError(f"{type(self).__name__} takes what its prepare() made, not {type(metadata).__name__}")
        key, value = self.cache.write(layer, key, value, metadata.blocks, metadata.offsets)
        query = query * self.scale
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if metadata.shared else None
        if metadata.decode:
            attend_decode(query, self.cache, layer, metadata.decode, out, lse)
        for prefill in metadata.prefills:
            self._attend_prefill(layer, query, key, value, prefill, out, lse)
        for prefix in metadata.shared:
            if lse is not None:
                self._add_prefix(layer, query, prefix, out, lse)
        return out

    def _attend_prefill(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, prefill: Prefill, out: Tensor, lse: Tensor | None
    ) -> None:
        batch, length = prefill.batch, prefill.length
        tokens = slice(prefill.first, prefill.first + batch * length)
        if prefill.blocks is not None:
            keys, values = self.cache.read(layer, prefill.blocks, prefill.total, self._workspace)
        else:
            by_head = [x[tokens].view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (key, value)]
            keys = self._workspace.copy("key", by_head[0]).flatten(0, 1).transpose(1, 2)
            values = self._workspace.copy("value", by_head[1]).flatten(0, 1)
        rows, target = (x[tokens].view(batch, length, *x.shape[1:]) for x in (query, out))
        sums = None if lse is None else lse[tokens].view(batch, length, -1)
        attend(rows, keys, values, True, self._workspace, target, sums)

    def _add_prefix(self, layer: int, query: Tensor, prefix: SharedPrefix, out: Tensor, lse: Tensor) -> None:
        keys, values = self.cache.read(layer, prefix.blocks, prefix.length, self._workspace)
        rows = query.index_select(0, prefix.tokens)
        result, sums = torch.empty_like(rows), lse.new_empty(rows.shape[:2])
        attend(rows[None], keys, values, False, self._workspace, result[None], sums[None])
        own, own_lse = out.index_select(0, prefix.tokens), lse.index_select(0, prefix.tokens)
        out.index_copy_(0, prefix.tokens, merge(own, own_lse, result, sums))
