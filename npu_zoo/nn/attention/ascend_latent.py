"""Latent attention by torch_npu's fused operators over a pool of latents (Ascend 910B).

Single tokens are absorbed: their queries meet the latents in the cache themselves. Prompts are expanded: the latents of
their whole context are read out of the cache and taken to every head's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch_npu
from torch import Tensor

from npu_zoo.core.attention import (
    AttentionMetadata,
    GraphAttention,
    LatentKeys,
    LatentLayout,
    LatentProjection,
    SequenceSlice,
)
from npu_zoo.nn.attention.ascend import RIGHT_DOWN_CAUSAL, FusedMetadata, StaticRows, causal_mask, plan_step
from npu_zoo.nn.attention.cache import allocate_zeros
from npu_zoo.nn.attention.latent_pool import LatentPoolAttention, LatentTokens


@dataclass(frozen=True)
class AbsorbedRows:
    """The rows of single tokens.

    Attributes:
        tokens: [B], their places in the step; None where the step has no others.
        block_table: int32 [B, blocks].
    """

    tokens: Tensor | None
    block_table: Tensor
    context_lens: list[int]


@dataclass(frozen=True)
class ExpandedRows:
    """The rows of several tokens.

    Attributes:
        tokens: [Q], their places in the step; None where the step has no others.
        slots: [K], where their whole contexts lie, one after the other.
        query_ends, key_ends: the rows' queries and keys, summed up.
    """

    tokens: Tensor | None
    slots: Tensor
    query_ends: list[int]
    key_ends: list[int]


@dataclass(frozen=True)
class FusedLatentMetadata(AttentionMetadata):
    """A step, by kind of row; ``slots``, int64 [T], say where new tokens go."""

    slots: Tensor
    absorbed: AbsorbedRows | None
    expanded: ExpandedRows | None


@dataclass(frozen=True)
class LatentGraphMetadata(FusedLatentMetadata):
    """A step of single tokens in static tensors."""

    static: StaticRows


_OPERATOR_DIMS = (512, 64)
"""The latents' and the rotated keys' sizes that npu_kv_rmsnorm_rope_cache takes."""


class FusedLatentAttention(LatentPoolAttention[FusedLatentMetadata], GraphAttention):
    """Attention over a pool of blocks that holds latents and rotated keys.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens.
        num_heads: query heads of this rank, a power of two.
        scale: what a query's product with a key is multiplied by.

    Raises:
        HardwareError: there is not enough memory.
    """

    metadata_type = FusedLatentMetadata

    def __init__(
        self, layout: LatentLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        super().__init__(layout, num_heads, scale)
        self.device = device
        self.spare_slot = layout.num_slots
        shape = (layout.num_layers, layout.num_slots + 1, layout.slot_size, 1)
        self._latents = list(allocate_zeros((*shape, layout.mla.kv_lora_rank), dtype, device))
        self._ropes = list(allocate_zeros((*shape, layout.mla.qk_rope_head_dim), dtype, device))
        self._mask = causal_mask(device)

    def prepare(self, rows: list[SequenceSlice]) -> FusedLatentMetadata:
        """Turn a step's rows into what the operators take.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        step = plan_step(rows, self.layout.slot_size, self.device, torch.int64)
        single = [number for number, row in enumerate(rows) if row.num_tokens == 1]
        several = [number for number, row in enumerate(rows) if row.num_tokens > 1]
        return FusedLatentMetadata(
            rows=rows,
            num_tokens=step.num_tokens,
            slots=step.slots,
            absorbed=self._absorbed(step, single) if single else None,
            expanded=self._expanded(step, several) if several else None,
        )

    def graph_metadata(self, batch: int, max_context: int) -> LatentGraphMetadata:
        """See :meth:`GraphAttention.graph_metadata`."""
        static = StaticRows.allocate(batch, max_context, self.layout.slot_size, self.device, torch.int64)
        return LatentGraphMetadata(
            rows=[],
            num_tokens=batch,
            slots=static.slots,
            absorbed=AbsorbedRows(None, static.block_table, [max_context] * batch),
            expanded=None,
            static=static,
        )

    def fill(self, metadata: AttentionMetadata, rows: list[SequenceSlice]) -> dict[str, Any]:
        """See :meth:`GraphAttention.fill`."""
        assert isinstance(metadata, LatentGraphMetadata)
        metadata.static.fill(rows)
        return {"actual_seq_kvlen": [row.context_len for row in rows]}

    def _absorbed(self, step: FusedMetadata, numbers: list[int]) -> AbsorbedRows:
        lengths = [step.context_lens[number] for number in numbers]
        if len(numbers) == len(step.rows):
            return AbsorbedRows(None, step.block_table, lengths)
        table = step.block_table[torch.tensor(numbers).to(self.device)]
        return AbsorbedRows(self._places(step, numbers), table, lengths)

    def _expanded(self, step: FusedMetadata, numbers: list[int]) -> ExpandedRows:
        size = self.layout.slot_size
        slots = [
            np.arange(row.context_len) % size + size * np.repeat(row.slots, size)[: row.context_len]
            for row in (step.rows[number] for number in numbers)
        ]
        return ExpandedRows(
            None if len(numbers) == len(step.rows) else self._places(step, numbers),
            torch.from_numpy(np.concatenate(slots)).to(self.device),
            list(accumulate(step.rows[number].num_tokens for number in numbers)),
            list(accumulate(step.context_lens[number] for number in numbers)),
        )

    def _places(self, step: FusedMetadata, numbers: list[int]) -> Tensor:
        ends = [0, *step.query_ends]
        places = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in numbers])
        return torch.from_numpy(places).to(self.device)

    def write_and_attend(
        self, layer: int, tokens: LatentTokens, projection: LatentProjection, metadata: FusedLatentMetadata
    ) -> Tensor:
        """See :meth:`LatentPoolAttention.write_and_attend`."""
        torch_npu.npu_scatter_pa_kv_cache(
            tokens.latent.unsqueeze(1),
            tokens.key_rope.unsqueeze(1).contiguous(),
            self._latents[layer],
            self._ropes[layer],
            metadata.slots,
            cache_mode="Norm",
        )
        return self._attend(layer, tokens.query, tokens.query_rope, projection, metadata)

    def forward_keys(
        self,
        layer: int,
        query: Tensor,
        query_rope: Tensor,
        keys: LatentKeys,
        projection: LatentProjection,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Norm, rotate and write the step's latents by one operator, then attend; see :meth:`forward`."""
        step, mla = self.own(metadata), self.layout.mla
        if (mla.kv_lora_rank, mla.qk_rope_head_dim) != _OPERATOR_DIMS:
            return super().forward_keys(layer, query, query_rope, keys, projection, metadata)
        torch_npu.npu_kv_rmsnorm_rope_cache(
            keys.values[:, None, None],
            keys.weight,
            keys.cos[:, None, None],
            keys.sin[:, None, None],
            step.slots,
            self._ropes[layer],
            self._latents[layer],
            epsilon=keys.eps,
            cache_mode="PA",
        )
        return self._attend(layer, query, query_rope, projection, step)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        query_rope: Tensor,
        projection: LatentProjection,
        metadata: FusedLatentMetadata,
    ) -> Tensor:
        absorbed, expanded = metadata.absorbed, metadata.expanded
        if expanded is None and absorbed is not None:
            return self._attend_absorbed(layer, query, query_rope, projection, absorbed)
        if absorbed is None and expanded is not None:
            return self._attend_expanded(layer, query, query_rope, projection, expanded)
        out = query.new_empty(*query.shape[:2], self.layout.mla.v_head_dim)
        if absorbed is not None and absorbed.tokens is not None:
            parts = query[absorbed.tokens], query_rope[absorbed.tokens]
            out[absorbed.tokens] = self._attend_absorbed(layer, *parts, projection, absorbed)
        if expanded is not None and expanded.tokens is not None:
            parts = query[expanded.tokens], query_rope[expanded.tokens]
            out[expanded.tokens] = self._attend_expanded(layer, *parts, projection, expanded)
        return out

    def _attend_absorbed(
        self, layer: int, query: Tensor, query_rope: Tensor, projection: LatentProjection, rows: AbsorbedRows
    ) -> Tensor:
        """[B, heads, qk_nope_head_dim] to [B, heads, v_head_dim]."""
        latents, ropes = (cache.transpose(1, 2) for cache in (self._latents[layer], self._ropes[layer]))
        attended = torch_npu.npu_fused_infer_attention_score_v2(
            projection.absorb(query).unsqueeze(2),
            latents,
            latents,
            query_rope=query_rope.unsqueeze(2).contiguous(),
            key_rope=ropes,
            block_table=rows.block_table,
            block_size=self.layout.slot_size,
            actual_seq_kvlen=rows.context_lens,
            input_layout="BNSD",
            num_query_heads=self.num_heads,
            num_key_value_heads=1,
            softmax_scale=self.scale,
        )[0]
        return projection.project(attended.squeeze(2))

    def _attend_expanded(
        self, layer: int, query: Tensor, query_rope: Tensor, projection: LatentProjection, rows: ExpandedRows
    ) -> Tensor:
        """[Q, heads, qk_nope_head_dim] to [Q, heads, v_head_dim]."""
        latent = self._latents[layer].flatten(0, 2).index_select(0, rows.slots)
        rope = self._ropes[layer].flatten(0, 2).index_select(0, rows.slots)
        keys, values = projection.expand(latent)
        attended: Tensor = torch_npu.npu_fused_infer_attention_score(
            query.contiguous(),
            keys.permute(2, 0, 1).contiguous(),
            values.transpose(0, 1).contiguous(),
            query_rope=query_rope.contiguous(),
            key_rope=rope.unsqueeze(1).expand(-1, self.num_heads, -1).contiguous(),
            atten_mask=self._mask,
            input_layout="TND",
            actual_seq_lengths=rows.query_ends,
            actual_seq_lengths_kv=rows.key_ends,
            num_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            scale=self.scale,
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )[0]
        return attended
