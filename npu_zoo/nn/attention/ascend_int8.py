"""Attention over int8 keys and values by torch_npu's fused operators (Ascend 910B).

Each vector of a token and key-value head is quantized as it is written, and its scale lies beside the blocks, where the
operator's mode of scales per token and head in pages looks for it. That mode is documented for one query a sequence.
With more, the operator takes no int8 in pages, and prompts read their context back in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch_npu
from numpy.typing import NDArray
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, SequenceSlice
from npu_zoo.core.errors import EngineError
from npu_zoo.nn.attention.ascend import FusedPagedAttention, StaticRows, TiledSlots, pack_rows
from npu_zoo.nn.attention.cache import allocate_zeros

PER_TOKEN_AND_HEAD_IN_PAGES = 5
"""The mode of scales [blocks, num_kv_heads, block_size] in float32."""

Integers = NDArray[np.int32]


@dataclass(frozen=True)
class SingleRows:
    """The rows of one token.

    Attributes:
        block_table: int32 [B, blocks].
        context_lens: each row's keys.
    """

    block_table: Tensor
    context_lens: list[int]


@dataclass(frozen=True)
class PromptRows:
    """Rows of several tokens whose context is read back together.

    Attributes:
        blocks: int32 [M], of all rows, one after the other.
        block_table: int32 [B, blocks], places among those.
        query_ends: the rows' tokens, summed up.
        context_lens: each row's keys.
    """

    blocks: Tensor
    block_table: Tensor
    query_ends: list[int]
    context_lens: list[int]


@dataclass(frozen=True)
class Int8Metadata(AttentionMetadata):
    """A step, by kind of row.

    Attributes:
        slots: int32 [T], ``block * block_size + offset`` of every new token.
        scales: int32 [2 * T * num_kv_heads, 1], where the scales of new keys, then of new values, go in a layer's.
        single: the rows of one token, which come first.
        order: int64 [T], the step's tokens with those of ``single`` first, and back; None where they lie so already.
    """

    slots: Tensor
    scales: Tensor
    single: SingleRows | None
    prompts: list[PromptRows]
    order: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Int8GraphMetadata(Int8Metadata):
    """A step of single tokens in static tensors: on the host, pinned, and on the device, ``scales`` and ``static``."""

    static: StaticRows
    staged: Tensor
    on_device: Tensor


class FusedInt8PagedAttention(FusedPagedAttention):
    """Prefill, chunks that continue a prefix, and decode over a cache of int8.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens.
        scale: what a query's product with a key is multiplied by.

    Raises:
        HardwareError: there is not enough memory.
    """

    def _allocate(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        layout = self.layout
        shape = (layout.num_layers, 2, self.spare_slot + 1, layout.num_kv_heads, self.block_size)
        self._scales = list(allocate_zeros(shape, torch.float32, self.device))
        return super()._allocate(torch.int8)

    @staticmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer: codes and their scales, whatever the compute dtype is."""
        return 2 * num_kv_heads * (head_dim + torch.float32.itemsize)

    def prepare(self, rows: list[SequenceSlice]) -> Int8Metadata:  # type: ignore[override]
        """Turn a step's rows into what the operators take, with one copy to the device.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        single = [row for row in rows if row.num_tokens == 1]
        groups = list(_groups([row for row in rows if row.num_tokens > 1], self.block_size))
        slots, table = _packed(rows, self.block_size)
        alone = [number for number, row in enumerate(rows) if row.num_tokens == 1]
        arrays = [slots, self._scale_places(slots).reshape(-1, 1), table[alone][:, : _widest(single, self.block_size)]]
        arrays += [array for group in groups for array in _blocks_of(group, self.block_size)]
        on_device = iter(_to_device(arrays, self.device))
        slots_there, scales, single_table = next(on_device), next(on_device), next(on_device)
        return Int8Metadata(
            rows=rows,
            num_tokens=len(slots),
            slots=slots_there,
            scales=scales,
            single=SingleRows(single_table, [row.context_len for row in single]) if single else None,
            prompts=[_prompt_rows(group, next(on_device), next(on_device)) for group in groups],
            order=_order(rows, self.device),
        )

    def _scale_places(self, slots: NDArray[np.integer[Any]]) -> Integers:
        """Places [2, T, num_kv_heads] in a layer's scales, seen as one dimension."""
        heads, size = self.layout.num_kv_heads, self.block_size
        blocks, offsets = np.divmod(slots.astype(np.int64), size)
        places = (blocks[:, None] * heads + np.arange(heads)) * size + offsets[:, None]
        of_values = (self.spare_slot + 1) * heads * size
        return np.stack((places, places + of_values)).astype(np.int32)

    def graph_metadata(self, batch: int, max_context: int) -> Int8GraphMetadata:  # type: ignore[override]
        """See :meth:`GraphAttention.graph_metadata`."""
        static = StaticRows.allocate(batch, max_context, self.block_size, self.device)
        places = 2 * batch * self.layout.num_kv_heads
        staged = torch.zeros(places + len(static.staged), dtype=torch.int32).pin_memory()
        on_device = staged.to(self.device)
        static = StaticRows(staged[places:], on_device[places:], batch, self.block_size, static.slot_dtype)
        return Int8GraphMetadata(
            rows=[],
            num_tokens=batch,
            slots=static.slots,
            scales=on_device[:places].view(-1, 1),
            single=SingleRows(static.block_table, [max_context] * batch),
            prompts=[],
            order=None,
            static=static,
            staged=staged,
            on_device=on_device,
        )

    def fill(self, metadata: AttentionMetadata, rows: list[SequenceSlice]) -> dict[str, Any]:
        """See :meth:`GraphAttention.fill`."""
        assert isinstance(metadata, Int8GraphMetadata)
        places = self._scale_places(metadata.static.stage(rows))
        metadata.staged[: places.size] = torch.from_numpy(places.ravel())
        metadata.on_device.copy_(metadata.staged, non_blocking=True)
        return {"actual_seq_lengths_kv": [row.context_len for row in rows]}

    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write the step's keys and values, then attend; see :meth:`AttentionBackend.forward`.

        Raises:
            EngineError: the metadata is another backend's.
        """
        if not isinstance(metadata, Int8Metadata):
            raise EngineError(f"{type(self).__name__} takes what its prepare() made, not {type(metadata).__name__}")
        self._write(layer, key, value, metadata)
        if metadata.order:
            query = query.index_select(0, metadata.order[0])
        parts, first = [], 0
        if metadata.single:
            first = len(metadata.single.context_lens)
            parts.append(self._attend_single(layer, query[:first], metadata.single))
        for rows in metadata.prompts:
            last = first + rows.query_ends[-1]
            parts.append(self._attend_prompts(layer, query[first:last], rows))
            first = last
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.index_select(0, metadata.order[1]) if metadata.order else out

    def _write(self, layer: int, key: Tensor, value: Tensor, metadata: Int8Metadata) -> None:
        codes, scales = torch_npu.npu_dynamic_quant(torch.stack((key, value)))
        torch_npu.npu_scatter_pa_kv_cache(codes[0], codes[1], *self._caches[layer], metadata.slots, cache_mode="Norm")
        torch_npu.npu_scatter_nd_update_(self._scales[layer].view(-1), metadata.scales, scales.view(-1))

    def _attend_single(self, layer: int, query: Tensor, rows: SingleRows) -> Tensor:
        key_cache, value_cache = self._caches[layer]
        attended: Tensor = torch_npu.npu_fused_infer_attention_score(
            query.unsqueeze(2),
            key_cache.flatten(2),
            value_cache.flatten(2),
            key_antiquant_scale=self._scales[layer][0],
            value_antiquant_scale=self._scales[layer][1],
            key_antiquant_mode=PER_TOKEN_AND_HEAD_IN_PAGES,
            value_antiquant_mode=PER_TOKEN_AND_HEAD_IN_PAGES,
            block_table=rows.block_table,
            input_layout="BNSD",
            block_size=self.block_size,
            actual_seq_lengths_kv=rows.context_lens,
            num_heads=self.num_heads,
            num_key_value_heads=self.layout.num_kv_heads,
            scale=self.scale,
        )[0]
        return attended.squeeze(2)

    def _attend_prompts(self, layer: int, query: Tensor, rows: PromptRows) -> Tensor:
        keys, values = (
            self._restored(codes, scales, rows.blocks, query.dtype)
            for codes, scales in zip(self._caches[layer], self._scales[layer], strict=True)
        )
        return self._attend(query, keys, values, rows.block_table, rows.query_ends, rows.context_lens)

    def _restored(self, codes: Tensor, scales: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks [M, block_size, num_kv_heads * head_dim] of keys or values."""
        per_token = scales.index_select(0, blocks).transpose(1, 2).unsqueeze(-1)
        return codes.index_select(0, blocks).float().mul_(per_token).to(dtype).flatten(2)


class FusedInt8ContiguousAttention(TiledSlots, FusedInt8PagedAttention):
    """The same over one stretch of memory per sequence."""


def _count(row: SequenceSlice, block_size: int) -> int:
    return -(-row.context_len // block_size)


def _widest(rows: list[SequenceSlice], block_size: int) -> int:
    return max((_count(row, block_size) for row in rows), default=0)


def _packed(rows: list[SequenceSlice], block_size: int) -> tuple[Integers, Integers]:
    """Slots [T] and block table [B, blocks] of a step."""
    slots = np.zeros(sum(row.num_tokens for row in rows), dtype=np.int32)
    table = np.zeros((len(rows), _widest(rows, block_size)), dtype=np.int32)
    pack_rows(rows, block_size, slots, table)
    return slots, table


def _groups(rows: list[SequenceSlice], block_size: int) -> Iterator[list[SequenceSlice]]:
    """Neighbours whose contexts take no more room than the longest of all, or than the tokens of all."""
    most = max(_widest(rows, block_size), sum(row.num_tokens for row in rows) // block_size)
    group: list[SequenceSlice] = []
    taken = 0
    for row in rows:
        count = _count(row, block_size)
        if group and taken + count > most:
            yield group
            group, taken = [], 0
        group.append(row)
        taken += count
    if group:
        yield group


def _blocks_of(group: list[SequenceSlice], block_size: int) -> tuple[Integers, Integers]:
    """The blocks of a group's rows, one row after the other, and a table of places among them."""
    counts = [_count(row, block_size) for row in group]
    blocks = np.concatenate([np.asarray(row.slots[:n], dtype=np.int32) for row, n in zip(group, counts, strict=True)])
    table = np.zeros((len(group), max(counts)), dtype=np.int32)
    for number, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        table[number, :count] = np.arange(end - count, end)
    return blocks, table


def _prompt_rows(group: list[SequenceSlice], blocks: Tensor, table: Tensor) -> PromptRows:
    ends = list(accumulate(row.num_tokens for row in group))
    return PromptRows(blocks, table, ends, [row.context_len for row in group])


def _order(rows: list[SequenceSlice], device: torch.device) -> tuple[Tensor, Tensor] | None:
    lengths = np.array([row.num_tokens for row in rows])
    alone = np.repeat(lengths == 1, lengths)
    if (np.diff(alone.astype(np.int8)) <= 0).all():
        return None
    order = np.argsort(~alone, kind="stable")
    first, back = torch.from_numpy(np.stack((order, np.argsort(order)))).to(device)
    return first, back


def _to_device(arrays: list[Integers], device: torch.device) -> list[Tensor]:
    """Arrays of any shapes by one copy."""
    whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    parts = torch.split(whole, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
