"""Latent attention (MLA) by the compiled library, over a pool of latents as they are.

Single tokens and few queries are taken to the latents: each is read from memory once for all heads, and brought into
strips on the way. Prompts have every head's keys and values expanded, into strips that are kept for the layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import (
    AttentionMetadata,
    LatentLayout,
    LatentProjection,
    ReplayAttention,
    SequenceSlice,
)
from npu_zoo.core.errors import ConfigError, EngineError
from npu_zoo.nn.attention.cache import allocate_zeros
from npu_zoo.nn.attention.compiled_steps import (
    CompiledMetadata,
    attend,
    fixed_metadata,
    make_metadata,
    refill_rows,
    values_together,
)
from npu_zoo.nn.attention.expanded import ExpandedStrips
from npu_zoo.nn.attention.latent_pool import LatentPoolAttention, LatentTokens
from npu_zoo.nn.attention.sharing import find_shared_prefixes, merge
from npu_zoo.nn.attention.tables import block_tables, check_tables, split_tables

_KINDS = {torch.bfloat16: 4, torch.float32: 5}
_WIDEST = 2048
_EXPANDED_TOKENS = 1024
"""Of a cached context, tokens that are expanded at a time, so that long contexts take no more memory than this many."""


@dataclass(frozen=True)
class ExpandedRow:
    """A row whose keys and values are expanded: its tokens in the step, and the places in the pool of those before."""

    tokens: slice
    before: NDArray[np.int64]


@dataclass(frozen=True)
class CompiledLatentMetadata(AttentionMetadata):
    """A step: what is written, what is absorbed and what is expanded.

    Attributes:
        every: all rows, whose latents are written.
        absorbed: those whose queries meet the latents, by themselves; None where there are none.
        chosen: their tokens, [n]; None where they are all rows.
        expanded: the others.
    """

    every: CompiledMetadata
    absorbed: CompiledMetadata | None
    chosen: Tensor | None
    expanded: list[ExpandedRow]


class CompiledLatentAttention(LatentPoolAttention[CompiledLatentMetadata], ReplayAttention):
    """Attention over a pool of latents, on a CPU.

    Raises:
        ConfigError: the dtype or a size is none that it takes.
        HardwareError: there is not enough memory, or the library is not built.
    """

    metadata_type = CompiledLatentMetadata

    def __init__(
        self, layout: LatentLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        mla = layout.mla
        if dtype not in _KINDS or mla.cache_dim > _WIDEST:
            raise ConfigError(
                f"{type(self).__name__} takes {' and '.join(map(str, _KINDS))} and latents of up to {_WIDEST} values, "
                f"not {dtype} and {mla.cache_dim}; choose another attention backend"
            )
        super().__init__(layout, num_heads, scale)
        shape = (layout.num_layers, layout.num_slots, layout.slot_size, mla.cache_dim)
        self.pool = allocate_zeros(shape, dtype, device)
        self._tokens = [layer.flatten(0, 1) for layer in self.pool]
        self._places = [(layer.data_ptr(), 0) for layer in self.pool]
        sizes = [_KINDS[dtype], num_heads, 1, mla.kv_lora_rank, mla.qk_rope_head_dim, mla.kv_lora_rank]
        self._sizes = np.array([*sizes, layout.slot_size], dtype=np.int64)
        self._shape = self._sizes.ctypes.data
        self._strips = ExpandedStrips(mla, num_heads, dtype)

    def lazy_memory(self) -> Sequence[Tensor]:
        """See :meth:`StepAttention.lazy_memory`."""
        return (self.pool,)

    def prepare(self, rows: list[SequenceSlice]) -> CompiledLatentMetadata:
        """Turn a step's rows into what all layers share.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        starts = np.array([row.start for row in rows], dtype=np.int64)
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        counts = -(-(starts + lengths) // self.layout.slot_size)
        check_tables(rows, counts)
        absorbs = np.array([self.absorbs(row.num_tokens, row.context_len) for row in rows], dtype=np.bool_)
        if absorbs.all():
            every = self._metadata(rows, starts, lengths, share=True)
            return CompiledLatentMetadata(rows, every.num_tokens, every, every, None, [])
        every = self._metadata(rows, starts, lengths, share=False)
        first = np.cumsum(lengths) - lengths
        chosen = [number for number, absorbed in enumerate(absorbs) if absorbed]
        part = self._metadata([rows[n] for n in chosen], starts[chosen], lengths[chosen], share=True)
        tokens = [np.arange(first[n], first[n] + lengths[n]) for n in chosen]
        tables = split_tables(every.tables, counts)
        return CompiledLatentMetadata(
            rows,
            every.num_tokens,
            every,
            part if chosen else None,
            torch.from_numpy(np.concatenate(tokens)) if chosen else None,
            [
                ExpandedRow(slice(first[n], first[n] + lengths[n]), self._token_places(tables[n], starts[n]))
                for n in np.flatnonzero(~absorbs)
            ],
        )

    def replay_metadata(self, batch: int, max_context: int) -> CompiledLatentMetadata:
        """See :class:`ReplayAttention`."""
        every = fixed_metadata(batch, -(-max_context // self.layout.slot_size))
        return CompiledLatentMetadata([], batch, every, every, None, [])

    def refill(self, metadata: AttentionMetadata, rows: list[SequenceSlice], count: int) -> None:
        """See :class:`ReplayAttention`.

        Raises:
            EngineError: a row's blocks do not cover its tokens, or the metadata is another backend's.
        """
        size = self.layout.slot_size
        refill_rows(self.own(metadata).every, rows, size, find_shared_prefixes(rows[:count], size, 1))

    def _metadata(
        self, rows: list[SequenceSlice], starts: NDArray[np.int64], lengths: NDArray[np.int64], *, share: bool
    ) -> CompiledMetadata:
        size = self.layout.slot_size
        counts = -(-(starts + lengths) // size)
        shared = find_shared_prefixes(rows, size, 1) if share else []
        return make_metadata(rows, starts, lengths, block_tables(rows, counts), counts, size, shared)

    def _token_places(self, table: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        size = self.layout.slot_size
        return np.asarray((table[:, None] * size + np.arange(size)).ravel()[:count])

    @torch.no_grad()
    def write_and_attend(
        self, layer: int, tokens: LatentTokens, projection: LatentProjection, metadata: CompiledLatentMetadata
    ) -> Tensor:
        """See :meth:`LatentPoolAttention.write_and_attend`.

        Raises:
            EngineError: a tensor has another dtype than the cache was made for.
        """
        query, query_rope, latent, key_rope = tokens
        if {query.dtype, query_rope.dtype, latent.dtype, key_rope.dtype} != {self.pool.dtype}:
            raise EngineError(f"{type(self).__name__} was made for {self.pool.dtype}, not {query.dtype}")
        tokens = LatentTokens(query, query_rope, values_together(latent), values_together(key_rope))
        added = tokens.latent.unsqueeze(1), tokens.key_rope.unsqueeze(1)
        if metadata.chosen is None and metadata.absorbed is not None:
            return self._attend_absorbed(layer, query, query_rope, added, projection, metadata.absorbed)
        attend(self._shape, metadata.every, self._places[layer], None, None, *added, None, self.scale)
        out = query.new_empty(*query.shape[:2], self.layout.mla.v_head_dim)
        chosen = metadata.chosen
        if chosen is not None and metadata.absorbed is not None:
            parts = query.index_select(0, chosen), query_rope.index_select(0, chosen)
            result = self._attend_absorbed(layer, *parts, (None, None), projection, metadata.absorbed)
            out.index_copy_(0, chosen, result)
        self._attend_expanded(layer, tokens, projection, metadata.expanded, out)
        return out

    def _attend_absorbed(
        self,
        layer: int,
        query: Tensor,
        query_rope: Tensor,
        added: tuple[Tensor | None, Tensor | None],
        projection: LatentProjection,
        metadata: CompiledMetadata,
    ) -> Tensor:
        absorbed = values_together(projection.absorb(query))
        attended = torch.empty(absorbed.shape, dtype=absorbed.dtype)
        rope = values_together(query_rope)
        attend(self._shape, metadata, self._places[layer], absorbed, rope, *added, attended, self.scale)
        return projection.project(attended)

    def _attend_expanded(
        self,
        layer: int,
        tokens: LatentTokens,
        projection: LatentProjection,
        rows: list[ExpandedRow],
        out: Tensor,
    ) -> None:
        """Attend from rows to their own tokens, and where there are some to those before, piece by piece."""
        queries = values_together(tokens.query), values_together(tokens.query_rope)
        lse = torch.empty(tokens.query.shape[:2], dtype=torch.float32)
        self._strips.fill(projection, tokens.latent, tokens.key_rope, [row.tokens for row in rows])
        self._strips.attend(queries, [row.tokens for row in rows], self.scale, out, lse, causal=True)
        for row in rows:
            if len(row.before):
                self._add_context(layer, queries, projection, row, out, lse)

    def _add_context(
        self,
        layer: int,
        queries: Sequence[Tensor],
        projection: LatentProjection,
        row: ExpandedRow,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        rank = self.layout.mla.kv_lora_rank
        mine = queries[0][row.tokens], queries[1][row.tokens]
        total, sums = out[row.tokens].float(), lse[row.tokens]  # else every piece would be rounded once more
        for first in range(0, len(row.before), _EXPANDED_TOKENS):
            places = torch.from_numpy(row.before[first : first + _EXPANDED_TOKENS])
            cached = self._tokens[layer].index_select(0, places)
            part, part_sums = torch.empty_like(out[row.tokens]), torch.empty_like(sums)
            self._strips.fill(projection, cached[:, :rank], cached[:, rank:], [slice(0, len(cached))])
            self._strips.attend(mine, [slice(0, len(part))], self.scale, part, part_sums, causal=False)
            total = merge(total, sums, part, part_sums)
            sums = torch.logaddexp(sums, part_sums)
        out[row.tokens] = total
