from __future__ import annotations

import math
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_zoo.core.attention import AttentionMetadata, CacheLayout, SequenceSlice
from npu_zoo.core.errors import ConfigError, EngineError, HardwareError
from npu_zoo.nn.attention.paged import PagedAttention

from .conftest import TOLERANCE, Driver

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged(num_blocks, block_size, heads=(2, 1, 8), dtype=torch.float32, layers=1, poison=True):
    layout = CacheLayout(layers, heads[1], heads[2], num_blocks, block_size)
    backend = PagedAttention(layout, dtype, CPU, heads[0], heads[2] ** -0.5)
    if poison:  # what was never written must not matter, but for the block of zeros
        backend.cache.keys[:, :num_blocks] = math.nan
        backend.cache.values[:, :num_blocks] = math.nan
    return Driver(backend, heads, dtype, layers)


def blocks_for(length, block_size):
    return -(-length // block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2, 16), (4, 1, 8), (6, 2, 32), (1, 1, 128)])
def test_prompt_then_tokens(dtype, heads):
    driver = paged(8, 4, heads, dtype, layers=2)
    table = (5, 0, 7, 2)
    driver.step([("a", SequenceSlice(0, 7, table[:2]))])
    for start in range(7, 13):
        driver.step([("a", SequenceSlice(start, 1, table[: blocks_for(start + 1, 4)]))])


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_contexts_at_block_borders(block_size, delta):
    length = max(2, 2 * block_size + delta)
    driver = paged(6, block_size) if block_size > 1 else paged(8, 1)
    table = (3, 1, 4, 0, 5)[: blocks_for(length + 1, block_size)]
    driver.step([("a", SequenceSlice(0, length, table))])
    driver.step([("a", SequenceSlice(length, 1, table))])


def test_chunks_continue_a_prompt():
    driver = paged(8, 4)
    for start, length in ((0, 3), (3, 6), (9, 1), (10, 7)):
        driver.step([("a", SequenceSlice(start, length, (6, 1, 4, 0, 3)))])


def test_rows_of_all_kinds_in_one_step():
    driver = paged(24, 4, (4, 2, 16))
    driver.step([("a", SequenceSlice(0, 9, (0, 9, 4))), ("b", SequenceSlice(0, 2, (7,)))])
    driver.step(
        [
            ("c", SequenceSlice(0, 5, (11, 3))),
            ("a", SequenceSlice(9, 1, (0, 9, 4))),
            ("d", SequenceSlice(0, 5, (12, 20))),
            ("b", SequenceSlice(2, 7, (7, 6, 5))),
            ("e", SequenceSlice(0, 1, (1,))),
            ("f", SequenceSlice(0, 5, (13, 21))),
        ]
    )


def test_prompts_longer_than_a_query_block():
    driver = paged(80, 8, (2, 1, 8))
    driver.step([("a", SequenceSlice(0, 300, tuple(range(79, 41, -1)))), ("b", SequenceSlice(0, 3, (0,)))])
    driver.step([("a", SequenceSlice(300, 290, tuple(range(79, 5, -1))))])


def test_long_tables_beside_short_ones():
    driver = paged(64, 2, (2, 2, 8))
    tables = {0: tuple(range(40)), 1: (40, 41), 2: (42,), 3: tuple(range(50, 63))}
    lengths = {0: 77, 1: 3, 2: 1, 3: 25}
    driver.step([(name, SequenceSlice(0, lengths[name], tables[name])) for name in tables])
    driver.step([(name, SequenceSlice(lengths[name], 1, tables[name])) for name in tables])


def share_prefix(driver, prefix, block_size, followers, same_step):
    """One sequence writes a prefix and others go on from its blocks, with chunks and single tokens."""
    count = prefix // block_size
    table = tuple(range(count, 0, -1))
    owner = ("owner", SequenceSlice(0, prefix, table))
    rows = []
    free = count + 1
    for number in range(followers):
        length = (1, 3, 9)[number % 3]
        more = blocks_for(length, block_size)
        rows.append((number, SequenceSlice(prefix, length, table + tuple(range(free, free + more)))))
        free += more
    return [[*rows[:2], owner, *rows[2:]]] if same_step else [[owner], rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(("prefix", "followers"), [(8, 3), (256, 8)])
def test_sequences_share_blocks(dtype, same_step, prefix, followers):
    """The second size is one where shared blocks are attended to once for all."""
    heads = (4, 2, 16)
    driver = paged(80, 8, heads, dtype)
    steps = share_prefix(driver, prefix, 8, followers, same_step)
    for rows in steps:
        if any(name == 0 for name, _ in rows):
            assert bool(driver.backend.prepare([row for _, row in rows]).shared) == (prefix == 256)
        run_with_forks(driver, rows, prefix)


def run_with_forks(driver, rows, prefix):
    """Draw the step's tensors so that the oracle's followers see the owner's keys, written in this very step too."""
    total = sum(row.num_tokens for _, row in rows)
    query = driver.random(total, driver.num_heads, driver.head_dim)
    key, value = (driver.random(total, driver.num_kv_heads, driver.head_dim) for _ in range(2))
    out = driver.backend.forward(0, query, key, value, driver.backend.prepare([row for _, row in rows]))
    firsts, first = {}, 0
    for name, row in rows:
        firsts[name] = first
        first += row.num_tokens
    if "owner" in firsts:
        part = slice(firsts["owner"], firsts["owner"] + prefix)
        driver.record([(n, r) for n, r in rows if n == "owner"], key[part], value[part])
    for name, _ in rows:
        if name != "owner":
            driver.fork("owner", name, prefix)
    others = [(name, row) for name, row in rows if name != "owner"]
    picked = [i for name, row in others for i in range(firsts[name], firsts[name] + row.num_tokens)]
    driver.record(others, key[picked], value[picked])
    expected = driver.expect(rows, query)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[driver.dtype])


@st.composite
def schedules(draw):
    """Steps of random rows over sequences that grow, with a random block table each."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    steps = draw(
        st.lists(
            st.dictionaries(st.integers(0, 4), st.integers(1, 9), min_size=1, max_size=5).flatmap(
                lambda lengths: st.permutations(list(lengths.items()))
            ),
            min_size=1,
            max_size=4,
        )
    )
    return block_size, steps, draw(st.randoms(use_true_random=False))


@settings(max_examples=60, deadline=None)
@given(schedules(), st.sampled_from([(2, 2, 8), (4, 2, 4), (3, 1, 16)]), st.sampled_from(DTYPES))
def test_any_mix_of_rows(schedule, heads, dtype):
    block_size, steps, random = schedule
    totals = {}
    for step in steps:
        for name, length in step:
            totals[name] = totals.get(name, 0) + length
    needed = {name: blocks_for(total, block_size) for name, total in totals.items()}
    numbers = list(range(sum(needed.values()) + 2))
    random.shuffle(numbers)
    tables = {name: tuple(numbers.pop() for _ in range(count)) for name, count in needed.items()}
    driver = paged(sum(needed.values()) + 2, block_size, heads, dtype)
    starts = dict.fromkeys(totals, 0)
    for step in steps:
        rows = []
        for name, length in step:
            used = tables[name][: blocks_for(starts[name] + length, block_size)]
            rows.append((name, SequenceSlice(starts[name], length, used)))
            starts[name] += length
        driver.step(rows)


def test_reused_blocks_keep_nothing_of_the_old_sequence():
    driver = paged(2, 8, poison=False)
    driver.backend.cache.keys[:, 0] = math.nan
    driver.backend.cache.values[:, 0] = math.inf
    driver.step([("a", SequenceSlice(0, 1, (0,)))])
    driver.step([("a", SequenceSlice(1, 4, (0,)))])


def test_large_scores_do_not_overflow_float16():
    driver = paged(2, 4, (1, 1, 128), torch.float16)
    big = torch.full((1, 1, 128), 40.0, dtype=torch.float16)
    out = driver.backend.forward(0, big, big, big, driver.backend.prepare([SequenceSlice(0, 1, (0,))]))
    torch.testing.assert_close(out, big)


def test_in_and_out_of_inference_mode():
    driver = paged(8, 4)
    with torch.inference_mode():
        driver.step([("a", SequenceSlice(0, 5, (0, 1))), ("b", SequenceSlice(0, 1, (2,)))])
    driver.step([("a", SequenceSlice(5, 2, (0, 1))), ("b", SequenceSlice(1, 1, (2,)))])
    x = torch.ones(2, 2, 8, requires_grad=True)
    rows = [SequenceSlice(7, 2, (0, 1, 3))]
    out = driver.backend.forward(0, x, x[:, :1], x[:, :1], driver.backend.prepare(rows))
    assert not out.requires_grad


def test_a_step_without_rows():
    driver = paged(2, 4)
    empty = torch.zeros(0, 2, 8)
    out = driver.backend.forward(0, empty, empty[:, :1], empty[:, :1], driver.backend.prepare([]))
    assert out.shape == (0, 2, 8)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_the_cache_takes_memory_only_when_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    backend = PagedAttention(CacheLayout(4, 8, 128, 8192, 32), torch.bfloat16, CPU, 8, 1.0)
    assert backend.cache.keys.nbytes + backend.cache.values.nbytes > 2**32
    assert not backend.cache.values[3, 8191].any()
    assert resident() - before < 2**26


def test_more_memory_than_there_is_is_refused():
    with pytest.raises(HardwareError, match=r"GiB on cpu .* lower kv_cache_memory"):
        PagedAttention(CacheLayout(64, 128, 128, 2**32, 32), torch.float32, CPU, 128, 1.0)


def test_bytes_per_token():
    assert PagedAttention.bytes_per_token(8, 128, 2) == 4096


def test_too_few_blocks_are_refused():
    backend = paged(4, 4).backend
    with pytest.raises(EngineError, match="needs 3 blocks, it has 2"):
        backend.prepare([SequenceSlice(0, 9, (0, 1))])


def test_uneven_heads_are_refused():
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        paged(4, 4, (3, 2, 8))


def test_foreign_metadata_is_refused():
    driver = paged(4, 4)
    x = torch.zeros(1, 2, 8)
    with pytest.raises(EngineError, match="AttentionMetadata"):
        driver.backend.forward(0, x, x[:, :1], x[:, :1], AttentionMetadata([], 1))
