"""The compiled backends against the dense oracle, whatever the step; caches are garbage until they are written."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_zoo.compiled.library import obstacle
from npu_zoo.core.attention import AttentionMetadata, CacheLayout, SequenceSlice
from npu_zoo.core.errors import ConfigError, EngineError, HardwareError
from npu_zoo.nn.attention.compiled import (
    CompiledContiguousAttention,
    CompiledInt8ContiguousAttention,
    CompiledInt8PagedAttention,
    CompiledPagedAttention,
)

from .conftest import Driver
from .test_int8 import Int8Driver

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
Heads = tuple[int, int, int]
Row = tuple[object, SequenceSlice]
PAGED = [CompiledPagedAttention, CompiledInt8PagedAttention]
CONTIGUOUS = [CompiledContiguousAttention, CompiledInt8ContiguousAttention]
EVERY_HEADS: list[Heads] = [
    (2, 2, 16),
    (4, 1, 8),
    (6, 2, 32),
    (1, 1, 128),
    (8, 1, 64),
    (40, 2, 16),
    (3, 1, 7),
    (5, 5, 34),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def driver_of(
    num_slots: int,
    slot_size: int,
    heads: Heads = (4, 2, 16),
    dtype: torch.dtype = torch.float32,
    kind: type[CompiledPagedAttention] = CompiledPagedAttention,
    layers: int = 1,
) -> Driver:
    layout = CacheLayout(layers, heads[1], heads[2], num_slots, slot_size)
    backend = kind(layout, dtype, CPU, heads[0], heads[2] ** -0.5)
    backend.keys.fill_(0xFF)  # NaN, as a float of either size
    backend.values.fill_(0xFF)
    quantized = issubclass(kind, CompiledInt8PagedAttention)
    return (Int8Driver if quantized else Driver)(backend, heads, dtype, layers)


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", EVERY_HEADS, ids=str)
@pytest.mark.parametrize("kind", PAGED)
def test_prompt_then_tokens(kind: type[CompiledPagedAttention], heads: Heads, dtype: torch.dtype) -> None:
    driver, table = driver_of(4, 32, heads, dtype, kind, layers=2), (3, 0, 2)
    driver.step([("a", SequenceSlice(0, 29, table[:1]))])
    for start in range(29, 36):
        driver.step([("a", SequenceSlice(start, 1, table[: blocks_for(start + 1, 32)]))])
    driver.step([("a", SequenceSlice(36, 50, table))])


@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contexts_at_block_borders(dtype: torch.dtype, delta: int, block_size: int) -> None:
    driver, table = driver_of(6, block_size, dtype=dtype), (3, 1, 4, 0)
    length = 2 * block_size + delta
    driver.step([("a", SequenceSlice(0, length, table[: blocks_for(length, block_size)]))])
    driver.step([("a", SequenceSlice(length, 1, table[: blocks_for(length + 1, block_size)]))])


@pytest.mark.parametrize("heads", [(2, 2, 16), (8, 2, 32), (16, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PAGED)
def test_drafts_are_seen_causally(kind: type[CompiledPagedAttention], dtype: torch.dtype, heads: Heads) -> None:
    """Rows of a few tokens, which a step that verifies drafts has, some of them over contexts that are cut in parts."""
    driver = driver_of(32, 32, heads, dtype, kind)
    tables = {name: tuple(range(name * 12, name * 12 + 12)) for name in (0, 1)}
    driver.step([(0, SequenceSlice(0, 290, tables[0])), (1, SequenceSlice(0, 3, tables[1]))])
    driver.step([(1, SequenceSlice(3, 2, tables[1])), (0, SequenceSlice(290, 8, tables[0]))])
    driver.step([(1, SequenceSlice(5, 5, tables[1])), (0, SequenceSlice(298, 3, tables[0]))])


@pytest.mark.parametrize("kind", PAGED)
def test_threads_share_the_work(kind: type[CompiledPagedAttention]) -> None:
    """A context that is cut in parts, with a row that is not, and a prompt."""
    torch.set_num_threads(2)
    driver = driver_of(16, 64, (3, 1, 16), torch.bfloat16, kind)
    driver.step([("a", SequenceSlice(0, 300, tuple(range(15, 5, -1)))), ("b", SequenceSlice(0, 40, (2,)))])
    driver.step([("b", SequenceSlice(40, 1, (2,))), ("a", SequenceSlice(300, 1, tuple(range(15, 5, -1))))])
    driver.step([("a", SequenceSlice(301, 5, tuple(range(15, 5, -1)))), ("b", SequenceSlice(41, 3, (2,)))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rejected_draft_is_written_over(dtype: torch.dtype) -> None:
    driver = driver_of(2, 32, dtype=dtype)
    driver.step([("a", SequenceSlice(0, 30, (1, 0)))])
    driver.step([("a", SequenceSlice(30, 5, (1, 0)))])
    history = driver.histories["a"]
    del history.keys[31:], history.values[31:]
    driver.step([("a", SequenceSlice(31, 1, (1, 0)))])
    driver.step([("a", SequenceSlice(32, 3, (1, 0)))])


@pytest.mark.parametrize("kind", PAGED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_all_kinds_in_one_step(dtype: torch.dtype, kind: type[CompiledPagedAttention]) -> None:
    driver = driver_of(24, 32, (4, 2, 16), dtype, kind)
    driver.step([("a", SequenceSlice(0, 60, (0, 9))), ("b", SequenceSlice(0, 2, (7,)))])
    driver.step(
        [
            ("c", SequenceSlice(0, 45, (11, 3))),
            ("a", SequenceSlice(60, 1, (0, 9, 4))),
            ("d", SequenceSlice(0, 5, (12,))),
            ("b", SequenceSlice(2, 70, (7, 6, 5))),
            ("e", SequenceSlice(0, 1, (1,))),
            ("f", SequenceSlice(0, 33, (13, 21))),
        ]
    )


@pytest.mark.parametrize("heads", [(2, 1, 16), (2, 2, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_longer_than_a_chunk_of_scores(dtype: torch.dtype, heads: Heads) -> None:
    driver = driver_of(20, 64, heads, dtype)
    driver.step([("a", SequenceSlice(0, 300, tuple(range(19, 14, -1))))])
    driver.step([("a", SequenceSlice(300, 290, tuple(range(19, 9, -1)))), ("b", SequenceSlice(0, 3, (0,)))])
    driver.step([("a", SequenceSlice(590, 1, tuple(range(19, 9, -1)))), ("b", SequenceSlice(3, 1, (0,)))])


@pytest.mark.parametrize("kind", PAGED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 3, 9), (1,) * 7])
def test_a_prefix_that_many_share_is_attended_to_once(
    lengths: tuple[int, ...], same_step: bool, dtype: torch.dtype, kind: type[CompiledPagedAttention]
) -> None:
    """Its writer may be in the same step, before or after those who read it."""
    prefix = tuple(range(33, 0, -1))
    driver = driver_of(64, 32, (4, 2, 16), dtype, kind)
    owner: Row = ("owner", SequenceSlice(0, 33 * 32, prefix))
    rows: list[Row] = [
        (name, SequenceSlice(33 * 32, length, (*prefix, 40 + name))) for name, length in enumerate(lengths)
    ]
    if not same_step:
        driver.step([owner])
        for name, _ in rows:
            driver.fork("owner", name, 33 * 32)
    assert driver.backend.prepare([row for _, row in rows]).shared == 1  # type: ignore[attr-defined]
    if not same_step:
        return driver.step(rows)
    everything = [*rows[:1], owner, *rows[1:]]
    total = sum(row.num_tokens for _, row in everything)
    query, key, value = (driver.random(total, heads, 16) for heads in (4, 2, 2))
    out = driver.backend.forward(0, query, key, value, driver.backend.prepare([row for _, row in everything]))
    first = rows[0][1].num_tokens
    mine = slice(first, first + 33 * 32)
    driver.record([owner], key[mine], value[mine])
    for name, _ in rows:
        driver.fork("owner", name, 33 * 32)
    others = [*range(first), *range(mine.stop, total)]
    driver.record(rows, key[others], value[others])
    expected = driver.expect(rows, query[others])
    torch.testing.assert_close(out[others].double(), expected, rtol=3e-2, atol=2e-2)
    return None


@pytest.mark.parametrize("kind", PAGED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_token_of_a_block_is_seen_in_its_step(dtype: torch.dtype, kind: type[CompiledPagedAttention]) -> None:
    """By a row that reads the block before the one that fills it comes."""
    driver = driver_of(8, 32, (4, 4, 16), dtype, kind)
    driver.step([("owner", SequenceSlice(0, 31, (5,)))])
    reader: Row = ("reader", SequenceSlice(32, 1, (5, 6)))
    owner: Row = ("owner", SequenceSlice(31, 1, (5,)))
    query, key, value = (driver.random(2, 4, 16) for _ in range(3))
    out = driver.backend.forward(0, query, key, value, driver.backend.prepare([reader[1], owner[1]]))
    driver.record([owner], key[1:], value[1:])
    driver.fork("owner", "reader", 32)
    driver.record([reader], key[:1], value[:1])
    expected = driver.expect([reader, owner], query)
    torch.testing.assert_close(out.double(), expected, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot_size", [20, 64, 70, 200])
@pytest.mark.parametrize("kind", CONTIGUOUS)
def test_one_slot_per_sequence(kind: type[CompiledPagedAttention], slot_size: int, dtype: torch.dtype) -> None:
    driver = driver_of(3, slot_size, (4, 2, 8), dtype, kind, layers=2)
    driver.step([("a", SequenceSlice(0, 9, (2,))), ("b", SequenceSlice(0, 1, (0,)))])
    driver.step([("b", SequenceSlice(1, 5, (0,))), ("a", SequenceSlice(9, 1, (2,)))])
    driver.step([("a", SequenceSlice(10, 9, (2,))), ("c", SequenceSlice(0, slot_size, (1,)))])
    driver.step([("a", SequenceSlice(19, 1, (2,)))])


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[dict[int, int]], list[int]]:
    """Steps of rows, single tokens or more, over four sequences of up to 96 tokens, and the order of their blocks."""
    size = draw(st.sampled_from([32, 64]))
    lengths = st.one_of(st.just(1), st.integers(1, 8), st.integers(1, 40))
    steps = draw(st.lists(st.dictionaries(st.integers(0, 3), lengths, min_size=1), min_size=1, max_size=4))
    return size, steps, draw(st.permutations(range(4 * blocks_for(160, size))))


@settings(max_examples=30, deadline=None)
@given(
    schedules(),
    st.sampled_from([(2, 2, 8), (4, 2, 4), (3, 1, 16), (6, 1, 40)]),
    st.sampled_from(DTYPES),
    st.sampled_from(PAGED),
)
def test_any_mix_of_rows(
    schedule: tuple[int, list[dict[int, int]], list[int]],
    heads: Heads,
    dtype: torch.dtype,
    kind: type[CompiledPagedAttention],
) -> None:
    size, steps, numbers = schedule
    each = blocks_for(160, size)
    driver, starts = driver_of(4 * each, size, heads, dtype, kind), dict.fromkeys(range(4), 0)
    for step in steps:
        rows: list[Row] = []
        for name, length in step.items():
            used = blocks_for(starts[name] + length, size)
            rows.append((name, SequenceSlice(starts[name], length, tuple(numbers[name * each :][:used]))))
            starts[name] += length
        driver.step(rows)


@pytest.mark.parametrize("kind", [*PAGED, *CONTIGUOUS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_one_projection_are_taken_as_they_are(dtype: torch.dtype, kind: type[CompiledPagedAttention]) -> None:
    driver = driver_of(2, 64, (4, 2, 16), dtype, kind)
    whole = driver.random(40, 8, 16)
    kept = whole.clone()
    query, key, value = whole.split((4, 2, 2), dim=1)
    rows = [SequenceSlice(0, 40, (1,))]
    parts = driver.backend.forward(0, query, key, value, driver.backend.prepare(rows))
    copies = driver.backend.forward(0, *(x.contiguous() for x in (query, key, value)), driver.backend.prepare(rows))
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(parts, copies)
    assert torch.equal(driver.backend.forward(0, turned, key, value, driver.backend.prepare(rows)), copies)
    assert torch.equal(whole, kept), "an argument was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    outs = []
    for others in (0, 5):
        driver = driver_of(20, 32, (4, 2, 16), dtype)
        x = driver.random(50 + others, 8, 16)
        rows = [SequenceSlice(0, 50, (0, 1)), *(SequenceSlice(0, 1, (2 + name,)) for name in range(others))]
        outs.append(driver.backend.forward(0, *x[: 50 + others].split((4, 2, 2), 1), driver.backend.prepare(rows))[:50])
    torch.testing.assert_close(outs[0], outs[1][:50], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    driver = driver_of(2, 32, (1, 1, 128), dtype)
    big = torch.full((3, 1, 128), 300.0, dtype=dtype)
    out = driver.backend.forward(0, big, big, big, driver.backend.prepare([SequenceSlice(0, 3, (0,))]))
    torch.testing.assert_close(out, big)
    out = driver.backend.forward(0, -big, big, big, driver.backend.prepare([SequenceSlice(0, 3, (0,))]))
    torch.testing.assert_close(out, big)


def test_in_and_out_of_inference_mode() -> None:
    driver = driver_of(8, 32)
    with torch.inference_mode():
        driver.step([("a", SequenceSlice(0, 5, (0,))), ("b", SequenceSlice(0, 1, (2,)))])
    driver.step([("a", SequenceSlice(5, 2, (0,))), ("b", SequenceSlice(1, 1, (2,)))])
    x = torch.ones(2, 8, 16, requires_grad=True)
    rows = [SequenceSlice(7, 2, (0,))]
    out = driver.backend.forward(0, x[:, :4], x[:, 4:6], x[:, 6:], driver.backend.prepare(rows))
    assert not out.requires_grad


def test_a_step_without_rows() -> None:
    driver = driver_of(2, 32)
    empty = torch.zeros(0, 4, 16)
    out = driver.backend.forward(0, empty, empty[:, :2], empty[:, :2], driver.backend.prepare([]))
    assert out.shape == (0, 4, 16)


@pytest.mark.parametrize("kind", [*PAGED, *CONTIGUOUS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (2, 64), (1, 16), (3, 24), (1, 7)])
def test_bytes_per_token_are_those_of_the_pools(
    heads: int, dim: int, dtype: torch.dtype, kind: type[CompiledPagedAttention]
) -> None:
    backend = kind(CacheLayout(2, heads, dim, 9, 64), dtype, CPU, heads, 1.0)
    stored = backend.keys[0].nbytes + backend.values[0].nbytes
    assert kind.bytes_per_token(heads, dim, dtype.itemsize) * 9 * 64 == stored
    if dim % 32 == 0 and not issubclass(kind, CompiledInt8PagedAttention):
        assert stored == 9 * 64 * 2 * heads * dim * dtype.itemsize


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_the_cache_takes_memory_only_when_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    backend = CompiledPagedAttention(CacheLayout(4, 8, 128, 8192, 32), torch.bfloat16, CPU, 8, 1.0)
    assert backend.keys.nbytes + backend.values.nbytes > 2**32 - 1
    assert resident() - before < 2**26


@pytest.mark.parametrize("kind", PAGED)
def test_a_strip_is_all_written_when_it_begins(kind: type[CompiledPagedAttention]) -> None:
    """Else its later pages would be read before they are written, and their first write would interrupt all threads."""
    driver = driver_of(1, 64, (2, 2, 128), torch.bfloat16, kind)
    untouched = torch.full((64,), 0xFF, dtype=torch.uint8)
    for start, tokens, strips in ((0, 1, 1), (1, 30, 1), (31, 2, 2)):
        driver.step([("a", SequenceSlice(start, tokens, (0,)))])
        for pool in (driver.backend.keys, driver.backend.values):
            written = (pool.view(2, 2, -1, 64) != untouched).any(-1).all(-1)  # [heads, strips]
            assert written.sum(-1).tolist() == [strips, strips]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        driver_of(4, 32, (3, 2, 8))
    with pytest.raises(ConfigError, match="no multiple of 32"):
        driver_of(4, 16)
    with pytest.raises(ConfigError, match=r"not torch.float16 and 16"):
        driver_of(4, 32, dtype=torch.float16)
    with pytest.raises(HardwareError, match=r"GiB on cpu .* lower kv_cache_memory"):
        CompiledPagedAttention(CacheLayout(64, 128, 128, 2**32, 32), torch.float32, CPU, 128, 1.0)
    with pytest.raises(EngineError, match="needs 2 blocks, it has 1"):
        driver_of(4, 32).backend.prepare([SequenceSlice(0, 33, (0,))])
    with pytest.raises(EngineError, match="one slot of 32 tokens"):
        driver_of(2, 32, kind=CompiledContiguousAttention).backend.prepare([SequenceSlice(30, 3, (0,))])
    with pytest.raises(EngineError, match="in 2 slots"):
        driver_of(2, 32, kind=CompiledContiguousAttention).backend.prepare([SequenceSlice(0, 3, (0, 1))])
    backend, x = driver_of(4, 32).backend, torch.zeros(1, 8, 16)
    with pytest.raises(EngineError, match="AttentionMetadata"):
        backend.forward(0, x[:, :4], x[:, 4:6], x[:, 6:], AttentionMetadata([], 1))
    metadata, half = backend.prepare([SequenceSlice(0, 1, (0,))]), x.bfloat16()
    with pytest.raises(EngineError, match=r"made for torch.float32, not torch.bfloat16"):
        backend.forward(0, half[:, :4], half[:, 4:6], half[:, 6:], metadata)
