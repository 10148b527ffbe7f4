"""Latent attention against its definition: every head's keys and values expanded, softmax over all of them."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, LatentLayout, LatentProjection, SequenceSlice
from npu_zoo.core.errors import EngineError, HardwareError
from npu_zoo.core.model_config import MLAConfig
from npu_zoo.nn.attention import latent as latent_module
from npu_zoo.nn.attention import prefill as prefill_module
from npu_zoo.nn.attention.latent import PagedLatentAttention, prefers_absorbed
from npu_zoo.nn.attention.workspace import Workspace

SMALL = MLAConfig(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20)
V3 = MLAConfig(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
HEADS = 4
CPU = torch.device("cpu")
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}


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

    mla: MLAConfig
    dtype: torch.dtype = torch.float32
    block_size: int = 4
    num_blocks: int = 40
    heads: int = HEADS
    kind: type[Any] = PagedLatentAttention
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


@pytest.fixture(params=[True, False, None], ids=["absorbed", "expanded", "as chosen"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    """Forces one form of the computation on every row of several tokens."""
    if request.param is not None:
        monkeypatch.setattr(latent_module, "prefers_absorbed", lambda *_: request.param)
    monkeypatch.setattr(latent_module, "_EXPANDED_TOKENS", 5)
    value: bool | None = request.param
    return value


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_prompts_chunks_and_single_tokens(block_size: int, dtype: torch.dtype) -> None:
    driver = Driver(SMALL, dtype, block_size)
    far = list(range(39, 9, -1))
    driver.step(("a", SequenceSlice(0, 9, list(range(9)))), ("b", SequenceSlice(0, 1, far)))
    driver.step(("b", SequenceSlice(1, 8, far)), ("a", SequenceSlice(9, 1, list(range(10)))))
    driver.step(("a", SequenceSlice(10, 1, [*range(9), 9, 10])), ("b", SequenceSlice(9, 17, far)))
    driver.step(("b", SequenceSlice(26, 1, far)), ("a", SequenceSlice(11, 2, [*range(13)])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_sizes_of_the_large_models(block_size: int) -> None:
    driver = Driver(V3, torch.float32, block_size, -(-128 // block_size))
    numbers = list(range(driver.num_blocks - 1, -1, -1))
    a, b = numbers[: -(-40 // block_size)], numbers[-(-40 // block_size) :]
    driver.step(("a", SequenceSlice(0, 30, a)))
    driver.step(("a", SequenceSlice(30, 1, a)), ("b", SequenceSlice(0, 12, b)))
    driver.step(("a", SequenceSlice(31, 4, a)))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_contexts_at_block_borders(block_size: int, delta: int) -> None:
    length = 2 * block_size + delta
    driver = Driver(SMALL, block_size=block_size, num_blocks=6)
    driver.step(("a", SequenceSlice(0, length, (3, 1, 4)[: -(-length // block_size)])))
    driver.step(("a", SequenceSlice(length, 1, (3, 1, 4)[: -(-(length + 1) // block_size)])))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("in_a_row", [False, True])
def test_rows_share_the_blocks_of_a_prefix(same_step: bool, in_a_row: bool) -> None:
    """In the same step too, where what they read is written by a row that may come after them."""
    driver = Driver(SMALL)
    prefix = [4, 5, 6] if in_a_row else [9, 2, 6]
    owner = ("owner", SequenceSlice(0, 12, prefix))
    more = ("more", SequenceSlice(12, 7, [*prefix, 20, 21]))
    single, shorter = (
        ("single", SequenceSlice(12, 1, [*prefix, 30])),
        ("shorter", SequenceSlice(8, 3, [*prefix[:2], 7])),
    )
    forks = {"more": ("owner", 12), "single": ("owner", 12), "shorter": ("owner", 8)}
    if same_step:
        driver.step(single, more, owner, shorter, forks=forks)
    else:
        driver.step(owner)
        driver.step(single, more, shorter, forks=forks)
    driver.step(("single", SequenceSlice(13, 2, [*prefix, 30])), ("owner", SequenceSlice(12, 1, [*prefix, 8])))


@pytest.mark.usefixtures("form")
def test_long_rows_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores for a few queries at a time, of prompts and of chunks that continue them."""
    monkeypatch.setattr(latent_module, "_SCORES", 3 * HEADS * 50)
    monkeypatch.setattr(prefill_module, "_SCORES", 1)
    driver = Driver(SMALL)
    driver.step(("a", SequenceSlice(0, 50, list(range(13)))), ("b", SequenceSlice(0, 2, [30])))
    driver.step(("b", SequenceSlice(2, 1, [30])), ("a", SequenceSlice(50, 38, list(range(22)))))


@pytest.mark.parametrize(
    ("absorbed", "buffer", "limit"), [(True, "scores", 2 * HEADS * 88), (False, "keys", HEADS * 20 * 8)]
)
def test_long_contexts_take_little_memory(
    absorbed: bool, buffer: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absorbed, scores of as many queries as fit; expanded, keys of as many tokens as are expanded at a time."""
    sizes: list[int] = []
    take = Workspace.buffer

    def recorded(self: Workspace, name: str, *shape: int) -> Tensor:
        sizes.extend([math.prod(shape)] * (name == buffer))
        return take(self, name, *shape)

    driver = Driver(SMALL)
    driver.step(("a", SequenceSlice(0, 80, list(range(20)))))
    monkeypatch.setattr(latent_module, "prefers_absorbed", lambda *_: absorbed)
    monkeypatch.setattr(latent_module, "_SCORES", 2 * HEADS * 88)
    monkeypatch.setattr(latent_module, "_EXPANDED_TOKENS", 8)
    monkeypatch.setattr(Workspace, "buffer", recorded)
    driver.step(("a", SequenceSlice(80, 8, list(range(22)))))
    assert len(sizes) > 1
    assert max(sizes) <= limit


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


@pytest.mark.usefixtures("form")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes(), st.sampled_from([1, 2, 3, 4, 8]), STEPS, st.randoms(use_true_random=False))
def test_any_sizes_and_any_mix_of_rows(
    shape: tuple[MLAConfig, int], block_size: int, steps: list[dict[str, int]], random: Random
) -> None:
    totals = {name: sum(step.get(name, 0) for step in steps) for name in "abcd"}
    needed = {name: -(-total // block_size) for name, total in totals.items()}
    numbers = list(range(sum(needed.values()) + 2))
    random.shuffle(numbers)
    tables = {name: [numbers.pop() for _ in range(count)] for name, count in needed.items()}
    driver = Driver(shape[0], block_size=block_size, num_blocks=sum(needed.values()) + 2, heads=shape[1])
    starts = dict.fromkeys(totals, 0)
    for step in steps:
        order = random.sample(sorted(step), len(step))
        driver.step(*((name, SequenceSlice(starts[name], step[name], tables[name])) for name in order))
        starts |= {name: starts[name] + length for name, length in step.items()}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_both_forms_and_any_chunks_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last query of a text: whole, in chunks and token by token, absorbed and expanded."""
    table, found = [3, 1, 4, 0, 5, 9], []
    chunks = [[23], [5, 1, 17], [22, 1], [7, 16], [1] * 23]
    for absorbed, lengths in itertools.product((True, False), chunks):
        monkeypatch.setattr(latent_module, "prefers_absorbed", lambda *_, absorbed=absorbed: absorbed)
        driver = Driver(SMALL, dtype)
        whole, outs, start = driver.draw(23), [], 0
        for length in lengths:
            metadata = driver.backend.prepare([SequenceSlice(start, length, table)])
            part = [argument[start : start + length] for argument in whole]
            outs.append(driver.backend.forward(0, *part, driver.projection, metadata))
            start += length
        found.append(torch.cat(outs))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **TOLERANCE[dtype])


def test_layers_keep_their_latents_apart() -> None:
    driver = Driver(SMALL)
    driver.backend.pool.fill_(0)
    metadata = driver.backend.prepare([SequenceSlice(0, 5, [2, 0])])
    for layer in (1, 0):
        _, _, latent, key_rope = arguments = driver.draw(5)
        driver.backend.forward(layer, *arguments, driver.projection, metadata)
        stored = driver.backend.pool[layer, [2, 0]].flatten(0, 1)
        assert torch.equal(stored[:5], torch.cat((latent, key_rope), dim=-1))
        assert not stored[5:].any()
        assert not driver.backend.pool[:, [1, *range(3, 40)]].any()


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    def rising(*shape: int) -> Tensor:
        """Each token's values are the same, whatever tokens follow."""
        per_token = torch.sin(torch.arange(torch.Size(shape[1:]).numel())).view(shape[1:])
        return torch.stack([per_token * (token + 1) for token in range(shape[0])])

    outs = []
    for others in (0, 3):
        driver = Driver(SMALL)
        driver.random = rising  # type: ignore[method-assign]
        rows = [("a", SequenceSlice(0, 6, [0, 1]))]
        rows += [(str(number), SequenceSlice(0, 3, [4 + number])) for number in range(others)]
        outs.append(driver.step(*rows)[:6])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_token_of_v3_takes_576_values_a_layer(itemsize: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    assert PagedLatentAttention.bytes_per_token(V3, itemsize) == 576 * itemsize
    backend = PagedLatentAttention(LatentLayout(3, V3, 5, 16), dtype, CPU, 128, 1.0)
    assert backend.pool.untyped_storage().nbytes() == 3 * 5 * 16 * 576 * itemsize
    tensors = [value for value in vars(backend).values() if isinstance(value, Tensor)]
    assert [tensor is backend.pool for tensor in tensors] == [True]


def test_few_queries_are_absorbed_and_many_expanded() -> None:
    assert prefers_absorbed(V3, 4, 4096)
    assert not prefers_absorbed(V3, 512, 512)
    # Expanding pays from 512 * 256 / (1088 - 320) queries on, whatever the context, once it is long.
    assert prefers_absorbed(V3, 170, 10**6)
    assert not prefers_absorbed(V3, 171, 10**6)


def test_a_prompt_is_expanded_and_a_single_token_absorbed() -> None:
    rows = [
        SequenceSlice(0, 600, range(38)),  # a prompt
        SequenceSlice(599, 1, range(38)),  # a token
        SequenceSlice(560, 40, range(38)),  # a short chunk after a long context
        SequenceSlice(0, 1, [0]),  # a prompt of one token, though products alone would have it expanded
    ]
    backend = PagedLatentAttention(LatentLayout(1, V3, 38, 16), torch.bfloat16, CPU, 1, 1.0)
    assert [row.absorbed for row in backend.prepare(rows).work] == [False, True, True, True]
    assert not prefers_absorbed(V3, 1, 1)


def test_in_and_out_of_inference_mode() -> None:
    driver = Driver(SMALL)
    with torch.inference_mode():
        driver.step(("a", SequenceSlice(0, 5, [0, 1])), ("b", SequenceSlice(0, 1, [2])))
    driver.step(("a", SequenceSlice(5, 2, [0, 1])), ("b", SequenceSlice(1, 1, [2])))
    arguments = [argument.requires_grad_() for argument in driver.draw(1)]
    metadata = driver.backend.prepare([SequenceSlice(7, 1, [0, 1])])
    assert not driver.backend.forward(1, *arguments, driver.projection, metadata).requires_grad
    driver.step(("b", SequenceSlice(2, 1, [2])))


@pytest.mark.usefixtures("form")
def test_large_values_do_not_overflow_float16() -> None:
    """Queries are scaled before they meet the cache: no score is beyond the dtype that its softmax is within."""
    driver = Driver(SMALL, torch.float16)
    driver.scale = driver.backend.scale = 1 / 4096
    plain = driver.random
    driver.random = lambda *shape: plain(*shape) * 300  # type: ignore[method-assign]
    rows = [SequenceSlice(0, 3, [0]), SequenceSlice(0, 1, [1])]
    out = driver.backend.forward(0, *driver.draw(4), driver.projection, driver.backend.prepare(rows))
    assert out.isfinite().all()


def test_a_step_without_rows() -> None:
    driver = Driver(SMALL)
    out = driver.backend.forward(0, *driver.draw(0), driver.projection, driver.backend.prepare([]))
    assert out.shape == (0, HEADS, SMALL.v_head_dim)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_the_pool_takes_memory_only_when_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    backend = PagedLatentAttention(LatentLayout(60, V3, 1024, 64), torch.bfloat16, CPU, 128, 1.0)
    assert backend.pool.nbytes > 2**32
    assert not backend.pool[59, 1023].any()
    assert resident() - before < 2**26


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(HardwareError, match=r"GiB on cpu .* lower kv_cache_memory"):
        PagedLatentAttention(LatentLayout(64, V3, 2**40, 64), torch.float32, CPU, 1, 1.0)


def test_a_row_without_its_blocks_is_refused() -> None:
    backend = Driver(SMALL).backend
    with pytest.raises(EngineError, match="needs 3 blocks, it has 2"):
        backend.prepare([SequenceSlice(0, 1, [3]), SequenceSlice(4, 5, [0, 1])])
    with pytest.raises(EngineError, match="a row of 0 tokens"):
        backend.prepare([SequenceSlice(4, 0, [0, 1])])


@pytest.mark.parametrize("metadata", [None, AttentionMetadata([SequenceSlice(0, 1, [0])], 1)])
def test_what_another_backend_prepared_is_refused(metadata: AttentionMetadata | None) -> None:
    driver = Driver(SMALL)
    with pytest.raises(EngineError, match="PagedLatentAttention takes what its prepare"):
        driver.backend.forward(0, *driver.draw(1), driver.projection, metadata)  # type: ignore[arg-type]
    assert driver.backend.pool.isnan().all(), "something was written before the refusal"
