"""A driver that runs steps through a backend of latent attention, and compares each with the definition."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo.compiled.library import obstacle
from npu_zoo.core.attention import LatentLayout, LatentProjection, SequenceSlice
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention.compiled_latent import CompiledLatentAttention
from npu_zoo.nn.attention.latent import PagedLatentAttention

SMALL = MLAConfig(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20)
V3 = MLAConfig(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
HEADS = 4
CPU = torch.device("cpu")
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}

REQUIRES_LIBRARY = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")
DTYPES = {PagedLatentAttention: tuple(TOLERANCE), CompiledLatentAttention: (torch.float32, torch.bfloat16)}
"""What each backend takes."""
KINDS = [
    pytest.param(PagedLatentAttention, id="paged"),
    pytest.param(CompiledLatentAttention, id="compiled", marks=REQUIRES_LIBRARY),
]
KINDS_AND_DTYPES = [
    pytest.param(kind.values[0], dtype, id=f"{kind.id}-{dtype}", marks=kind.marks)
    for kind in KINDS
    for dtype in DTYPES[kind.values[0]]
]


class Projection(LatentProjection):
    """Plain products with random matrices."""

    def __init__(self, mla: MLAConfig, dtype: torch.dtype, heads: int = HEADS) -> None:
        generator = torch.Generator().manual_seed(3)
        width = mla.kv_lora_rank
        self.keys = (torch.randn(heads, mla.qk_nope_head_dim, width, generator=generator) / width**0.5).to(dtype)
        self.values = (torch.randn(heads, width, mla.v_head_dim, generator=generator) / width**0.5).to(dtype)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return self.expand_keys(latent), torch.einsum("kr,hrv->hkv", latent, self.values)

    def expand_keys(self, latent: Tensor) -> Tensor:
        return torch.einsum("hnr,kr->hnk", self.keys, latent)

    def absorb(self, query: Tensor) -> Tensor:
        return torch.einsum("thn,hnr->thr", query, self.keys)

    def project(self, attended: Tensor) -> Tensor:
        return torch.einsum("thr,hrv->thv", attended, self.values)


@dataclass
class Driver:
    """Runs steps through the backend and compares every row with the definition, in float64."""

    kind: type[Any]
    mla: MLAConfig = SMALL
    dtype: torch.dtype = torch.float32
    block_size: int = 4
    num_blocks: int = 40
    heads: int = HEADS
    histories: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = LatentLayout(2, self.mla, self.num_blocks, self.block_size)
        self.scale = self.mla.qk_head_dim**-0.5
        self.backend = self.kind(layout, self.dtype, CPU, self.heads, self.scale)
        # Whatever is read without having been written spoils the result.
        self.backend.pool.fill_(torch.nan)
        self.projection = Projection(self.mla, self.dtype, self.heads)
        self.generator = torch.Generator().manual_seed(1)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def step(self, *rows: tuple[str, SequenceSlice], forks: Mapping[str, tuple[str, int]] | None = None) -> Tensor:
        """Run (sequence, row) pairs; ``forks`` begin as another sequence's first tokens, of this step or before."""
        arguments = self.draw(sum(row.num_tokens for _, row in rows))
        kept = [argument.clone() for argument in arguments]
        metadata = self.backend.prepare([row for _, row in rows])
        out = self.backend.forward(1, *arguments, self.projection, metadata)
        assert all(map(torch.equal, arguments, kept)), "an argument was changed"
        query, rope, latent, key_rope = arguments
        placed = self.placed(rows)
        for name, row, first in sorted(placed, key=lambda item: item[0] in (forks or {})):
            if forks and name in forks:
                source, length = forks[name]
                self.histories[name] = self.histories[source][:length]
            part = slice(first, first + row.num_tokens)
            history = self.histories.setdefault(name, [])
            assert len(history) == row.start, "the test's own rows are out of order"
            history.extend(torch.cat((latent[part], key_rope[part]), dim=-1))
        expected = torch.cat([self.expected(name, row, query, rope, first) for name, row, first in placed])
        assert out.dtype == self.dtype
        torch.testing.assert_close(out.double(), expected, **TOLERANCE[self.dtype])
        return out

    def draw(self, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A step's query, rotated query, latent and rotated key."""
        mla = self.mla
        query, rope = (self.random(total, self.heads, n) for n in (mla.qk_nope_head_dim, mla.qk_rope_head_dim))
        return query, rope, self.random(total, mla.kv_lora_rank), self.random(total, mla.qk_rope_head_dim)

    def placed(self, rows: tuple[tuple[str, SequenceSlice], ...]) -> list[tuple[str, SequenceSlice, int]]:
        ends = list(itertools.accumulate(row.num_tokens for _, row in rows))
        return [(name, row, end - row.num_tokens) for (name, row), end in zip(rows, ends, strict=True)]

    def expected(self, name: str, row: SequenceSlice, query: Tensor, rope: Tensor, first: int) -> Tensor:
        cached, rank = torch.stack(self.histories[name]).double(), self.mla.kv_lora_rank
        keys = torch.einsum("hnr,kr->khn", self.projection.keys.double(), cached[:, :rank])
        keys = torch.cat((keys, cached[:, None, rank:].expand(-1, self.heads, -1)), dim=-1)
        values = torch.einsum("kr,hrv->khv", cached[:, :rank], self.projection.values.double())
        outs = []
        for token in range(row.num_tokens):
            whole = torch.cat((query[first + token], rope[first + token]), dim=-1).double()
            seen = row.start + token + 1
            weights = torch.softmax(torch.einsum("hd,khd->hk", whole, keys[:seen]) * self.scale, dim=-1)
            outs.append(torch.einsum("hk,khv->hv", weights, values[:seen]))
        return torch.stack(outs)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[MLAConfig, int]:
    widths = [draw(st.integers(1, 40)) for _ in range(3)]
    mla = MLAConfig(
        kv_lora_rank=widths[0],
        qk_rope_head_dim=2 * draw(st.integers(1, 8)),
        qk_nope_head_dim=widths[1],
        v_head_dim=widths[2],
    )
    return mla, draw(st.integers(1, 5))


STEPS = st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1), min_size=1, max_size=4)
