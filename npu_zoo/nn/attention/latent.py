"""Latent attention (MLA, arXiv:2405.04434) over a pool of blocks that holds latents instead of keys and values.

Both forms of the computation give the same result. Expanded, every head's keys and values are made from the latents,
which pays where many queries meet them: prompts. Absorbed, the queries are taken to the latents instead, which all
heads share, so that a cached token is read once for all of them: single tokens, and few queries after a long context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, LatentLayout, LatentProjection, SequenceSlice
from npu_zoo.nn.attention.cache import Blocks, allocate_zeros, index_blocks
from npu_zoo.nn.attention.latent_pool import LatentPoolAttention, LatentTokens
from npu_zoo.nn.attention.prefill import attend
from npu_zoo.nn.attention.sharing import merge
from npu_zoo.nn.attention.tables import block_tables, check_tables, split_tables, token_places
from npu_zoo.nn.attention.workspace import Workspace

# Tokens of a cached context that are expanded at a time, so that long contexts take no more memory than this many.
_EXPANDED_TOKENS = 1024
_SCORES = 2**22


@dataclass(frozen=True)
class LatentRow:
    """A row of a step: ``num_tokens`` queries from token ``first`` of the step on, over the ``total`` last tokens.

    Attributes:
        absorbed: whether its queries are taken to the latents.
        blocks: where the latents lie.
    """

    first: int
    num_tokens: int
    total: int
    absorbed: bool
    blocks: Blocks

    @property
    def tokens(self) -> slice:
        """The row's tokens in the step."""
        return slice(self.first, self.first + self.num_tokens)


@dataclass(frozen=True)
class LatentMetadata(AttentionMetadata):
    """A step, row by row.

    Attributes:
        blocks, offsets: [T], where new tokens go.
        absorbed: the tokens of all absorbed rows; None where every row is.
    """

    blocks: Tensor
    offsets: Tensor
    work: list[LatentRow]
    absorbed: Tensor | None


class PagedLatentAttention(LatentPoolAttention[LatentMetadata]):
    """Attention over a pool of latents, on any device that torch drives.

    Raises:
        HardwareError: there is not enough memory.
    """

    metadata_type = LatentMetadata

    def __init__(
        self, layout: LatentLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale: float
    ) -> None:
        super().__init__(layout, num_heads, scale)
        self.device = device
        shape = (layout.num_layers, layout.num_slots, layout.slot_size, layout.mla.cache_dim)
        self.pool = allocate_zeros(shape, dtype, device)
        self._layers = list(self.pool)
        self._workspace = Workspace(dtype, device)

    def lazy_memory(self) -> Sequence[Tensor]:
        """See :meth:`StepAttention.lazy_memory`."""
        return (self.pool,)

    def prepare(self, rows: list[SequenceSlice]) -> LatentMetadata:
        """Turn a step's rows into the tensors that all layers share.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """
        size = self.layout.slot_size
        starts = np.array([row.start for row in rows], dtype=np.int64)
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        counts = -(-(starts + lengths) // size)
        check_tables(rows, counts)
        tables = block_tables(rows, counts)
        first_tokens = np.cumsum(lengths) - lengths
        blocks, offsets = token_places(tables, counts, starts, lengths, first_tokens, size)
        work = [
            LatentRow(first, length, total, self.absorbs(length, total), index_blocks(table, self.device))
            for first, length, total, table in zip(
                first_tokens.tolist(),
                lengths.tolist(),
                (starts + lengths).tolist(),
                split_tables(tables, counts),
                strict=True,
            )
        ]
        return LatentMetadata(
            rows=rows,
            num_tokens=int(lengths.sum()),
            blocks=torch.from_numpy(blocks).to(self.device),
            offsets=torch.from_numpy(offsets).to(self.device),
            work=work,
            absorbed=_absorbed_tokens(work, self.device),
        )

    @torch.no_grad()
    def write_and_attend(
        self, layer: int, tokens: LatentTokens, projection: LatentProjection, metadata: LatentMetadata
    ) -> Tensor:
        """See :meth:`LatentPoolAttention.write_and_attend`."""
        query, query_rope, latent, key_rope = tokens
        rank = self.layout.mla.kv_lora_rank
        self._layers[layer][metadata.blocks, metadata.offsets] = torch.cat((latent, key_rope), dim=-1)
        out = query.new_empty(*query.shape[:2], self.layout.mla.v_head_dim)
        chosen = metadata.absorbed
        if chosen is None or len(chosen):
            plain, rotated = (query, query_rope) if chosen is None else (query[chosen], query_rope[chosen])
            absorbed = torch.cat((projection.absorb(plain), rotated), dim=-1).mul_(self.scale)
            attended = absorbed.new_empty(*absorbed.shape[:2], rank)
            done = 0
            for row in (row for row in metadata.work if row.absorbed):
                part = slice(done, done + row.num_tokens)
                self._attend_absorbed(self._read(layer, row), absorbed[part], attended[part])
                done += row.num_tokens
            projected: Tensor = projection.project(attended)
            if chosen is None:
                return projected
            out.index_copy_(0, chosen, projected)
        for row in (row for row in metadata.work if not row.absorbed):
            queries = torch.cat((query[row.tokens], query_rope[row.tokens]), dim=-1).mul_(self.scale)
            self._attend_expanded(self._read(layer, row), queries, projection, out[row.tokens])
        return out

    def _read(self, layer: int, row: LatentRow) -> Tensor:
        """A row's [total, cache_dim], in place where its blocks follow each other, else in the workspace."""
        pool = self._layers[layer]
        if isinstance(row.blocks, slice):
            in_place: Tensor = pool[row.blocks].flatten(0, 1)
            return in_place[: row.total]
        gathered = self._workspace.buffer("latents", len(row.blocks), *pool.shape[1:])
        torch.index_select(pool, 0, row.blocks, out=gathered)
        return gathered.flatten(0, 1)[: row.total]

    def _attend_absorbed(self, cached: Tensor, query: Tensor, out: Tensor) -> None:
        """Attend from the last n of the cached tokens, [n, num_heads, cache_dim], to ``out``, [n, num_heads, R]."""
        num_tokens, total = len(query), len(cached)
        step = max(1, _SCORES // (self.num_heads * total))
        for first in range(0, num_tokens, step):
            last = min(first + step, num_tokens)
            seen = cached[: total - num_tokens + last]
            scores = self._workspace.buffer("scores", (last - first) * self.num_heads, len(seen))
            torch.mm(query[first:last].flatten(0, 1), seen.t(), out=scores)
            if last - first > 1:
                width = last - first
                mask = self._workspace.causal_mask(width).unsqueeze(1)
                scores.view(width, self.num_heads, -1)[..., -width:] += mask
            torch.softmax(scores, -1, out=scores)
            torch.mm(scores, seen[:, : out.shape[-1]], out=out[first:last].view(-1, out.shape[-1]))

    def _attend_expanded(self, cached: Tensor, query: Tensor, projection: LatentProjection, out: Tensor) -> None:
        """Attend from the last n of the cached tokens, [n, num_heads, qk_head_dim], to ``out``, [n, num_heads, v]."""
        before = len(cached) - len(query)
        pieces = list(_pieces(before))
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if pieces else None
        self._attend_piece(cached[before:], query, projection, out, lse, causal=True)
        if lse is None:
            return
        total = out.float()  # else every piece would be rounded once more
        for piece in pieces:
            part, sums = torch.empty_like(out), torch.empty_like(lse)
            self._attend_piece(cached[piece], query, projection, part, sums, causal=False)
            total = merge(total, lse, part, sums)
            lse = torch.logaddexp(lse, sums)
        out.copy_(total)

    def _attend_piece(
        self,
        cached: Tensor,
        query: Tensor,
        projection: LatentProjection,
        out: Tensor,
        lse: Tensor | None,
        *,
        causal: bool,
    ) -> None:
        mla = self.layout.mla
        keys, values = projection.expand(cached[:, : mla.kv_lora_rank])
        whole = self._workspace.buffer("keys", self.num_heads, mla.qk_head_dim, len(cached))
        whole[:, : mla.qk_nope_head_dim] = keys
        whole[:, mla.qk_nope_head_dim :] = cached[:, mla.kv_lora_rank :].t()
        sums = None if lse is None else lse.unsqueeze(0)
        attend(query.unsqueeze(0), whole, values, causal, self._workspace, out.unsqueeze(0), sums)


def _absorbed_tokens(work: list[LatentRow], device: torch.device) -> Tensor | None:
    if all(row.absorbed for row in work):
        return None
    tokens = [np.arange(row.first, row.first + row.num_tokens) for row in work if row.absorbed]
    numbers = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int64)
    return torch.from_numpy(numbers).to(device)


def _pieces(num_tokens: int) -> Iterator[slice]:
    return (slice(first, min(first + _EXPANDED_TOKENS, num_tokens)) for first in range(0, num_tokens, _EXPANDED_TOKENS))
