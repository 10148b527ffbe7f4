"""Attention over int8 keys and values against the same attention over what they are restored to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo.core.attention import CacheLayout, SequenceSlice
from npu_zoo.nn.attention.int8 import Int8BlockCache, Int8ContiguousAttention, Int8PagedAttention, quantize
from npu_zoo.nn.attention.paged import PagedAttention
from npu_zoo.nn.attention.workspace import Workspace

from .conftest import Driver

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of a code with its scale and shift, where a CPU does not multiply and add at once."""

Heads = tuple[int, int, int]


def restored(x: Tensor) -> Tensor:
    """What int8 keeps of vectors along the last dimension, by numpy, one vector after the other."""
    out = np.zeros(tuple(x.shape), dtype=np.float32)
    rows = x.float().numpy()
    for place in np.ndindex(*rows.shape[:-1]):
        step = np.abs(rows[place]).max() / np.float32(127)
        if step:
            out[place] = np.rint(rows[place] / step) * step
    return torch.from_numpy(out)


class Int8Driver(Driver):
    """The oracle sees restored keys and values, in float32."""

    def record(self, rows: list[tuple[object, SequenceSlice]], key: Tensor, value: Tensor) -> None:
        super().record(rows, restored(key), restored(value))


def driver_of(
    num_blocks: int,
    block_size: int,
    heads: Heads = (2, 1, 8),
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
    kind: type[PagedAttention] = Int8PagedAttention,
) -> Int8Driver:
    """A driver over a cache of garbage, which what was never written must not show."""
    layout = CacheLayout(layers, heads[1], heads[2], num_blocks, block_size)
    backend = kind(layout, dtype, CPU, heads[0], heads[2] ** -0.5)
    cache = backend.cache
    assert isinstance(cache, Int8BlockCache)
    draw = torch.Generator().manual_seed(1)
    for pool in (cache.keys, cache.values):
        pool[:, : cache.num_blocks].random_(0, 256, generator=draw)
    cache.key_scales[:, : cache.num_blocks] = math.nan
    return Int8Driver(backend, heads, dtype, layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2, 16), (4, 1, 8), (6, 2, 32), (1, 1, 128)])
def test_prompt_then_tokens(heads: Heads, dtype: torch.dtype) -> None:
    driver = driver_of(8, 4, heads, dtype, layers=2)
    table = (5, 0, 7, 2)
    driver.step([("a", SequenceSlice(0, 7, table[:2]))])
    for start in range(7, 13):
        driver.step([("a", SequenceSlice(start, 1, table[: -(-(start + 1) // 4)]))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_longer_than_what_is_restored_at_once(dtype: torch.dtype) -> None:
    driver = driver_of(24, 64, (4, 2, 16), dtype)
    scattered, run = tuple(range(23, 11, -1)), tuple(range(11))
    driver.step([("a", SequenceSlice(0, 610, scattered)), ("b", SequenceSlice(0, 560, run))])
    driver.step([("b", SequenceSlice(560, 70, run)), ("a", SequenceSlice(610, 33, scattered))])
    driver.step([("a", SequenceSlice(643, 1, scattered)), ("b", SequenceSlice(630, 1, run))])


def test_a_prefix_that_many_share_is_attended_to_once() -> None:
    driver = driver_of(64, 64, (4, 2, 16))
    prefix = (33, 39, 17, 4, 0, 20, 8, 1)
    driver.step([("owner", SequenceSlice(0, 512, prefix))])
    free = [number for number in range(64) if number not in prefix]
    rows: list[tuple[object, SequenceSlice]] = []
    for name, length in enumerate((1, 3, 1, 9, *[1] * 11)):
        driver.fork("owner", name, 512)
        rows.append((name, SequenceSlice(512, length, (*prefix, free.pop()))))
    assert driver.backend.prepare([row for _, row in rows]).shared  # type: ignore[attr-defined]
    driver.step(rows)


def test_one_slot_per_sequence() -> None:
    driver = driver_of(3, 150, (4, 2, 16), kind=Int8ContiguousAttention)
    driver.step([("a", SequenceSlice(0, 120, (2,))), ("b", SequenceSlice(0, 5, (0,)))])
    driver.step([("a", SequenceSlice(120, 20, (2,))), ("b", SequenceSlice(5, 1, (0,)))])
    driver.step([("a", SequenceSlice(140, 1, (2,))), ("b", SequenceSlice(6, 1, (0,)))])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([(2, 2, 8), (4, 2, 4), (3, 1, 16)]), st.sampled_from(DTYPES))
def test_any_mix_of_rows(data: st.DataObject, heads: Heads, dtype: torch.dtype) -> None:
    size = data.draw(st.sampled_from([1, 3, 8, 64]))
    steps = data.draw(st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1), max_size=4))
    blocks = -(-36 // size)
    numbers = data.draw(st.permutations(range(4 * blocks)))
    driver, starts = driver_of(4 * blocks, size, heads, dtype), dict.fromkeys(range(4), 0)
    for step in steps:
        rows: list[tuple[object, SequenceSlice]] = []
        for name, length in step.items():
            used = -(-(starts[name] + length) // size)
            rows.append((name, SequenceSlice(starts[name], length, numbers[name * blocks :][:used])))
            starts[name] += length
        driver.step(rows)


def test_blocks_that_are_used_again_keep_nothing() -> None:
    driver = driver_of(1, 8)
    driver.step([("a", SequenceSlice(0, 8, (0,)))])
    driver.step([("b", SequenceSlice(0, 1, (0,)))])
    driver.step([("b", SequenceSlice(1, 3, (0,)))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_depend_on_their_token_alone(dtype: torch.dtype) -> None:
    """Whatever the step, its order and its other tokens, and whether they are read back or handed on."""
    x = torch.randn(2, 12, 2, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    workspace = Workspace(dtype, CPU)
    found = []
    for parts in ([range(12)], [range(5), range(5, 12)], [[n] for n in range(11, -1, -1)]):
        cache = Int8BlockCache(1, 3, 4, 2, 16, dtype, CPU)
        cache.open(np.arange(3))
        for part in parts:
            at = torch.tensor(list(part))
            key, value = cache.write(0, x[0, at], x[1, at], at // 4, at % 4)
            torch.testing.assert_close(torch.stack((key, value)), restored(x[:, at]).to(dtype), rtol=0, atol=0)
        for blocks in (slice(0, 3), torch.arange(3)):
            keys, values = cache.read(0, blocks, 12, workspace)
            torch.testing.assert_close(keys.permute(2, 0, 1), restored(x[0]).to(dtype), rtol=ROUNDING[dtype], atol=0)
            torch.testing.assert_close(values.transpose(0, 1), restored(x[1]).to(dtype), rtol=ROUNDING[dtype], atol=0)
        found.append(torch.cat([pool.flatten() for pool in (cache.keys, cache.values, cache.key_scales)]))
    assert all(torch.equal(found[0], other) for other in found[1:])


HARD: dict[str, Any] = {
    "zeros": 0.0,
    "huge": 3e38,
    "the least number": 1e-45,
    "more than a scale can hold": 2.6e-43,
    "infinite": math.inf,
    "not a number": math.nan,
}


@pytest.mark.parametrize("value", HARD.values(), ids=HARD)
def test_a_hard_vector_harms_only_itself(value: float) -> None:
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(3))
    x[1, 0] = value
    cache = Int8BlockCache(1, 1, 4, 2, 16, torch.float32, CPU)
    cache.open(np.arange(1))
    places = torch.zeros(3, dtype=torch.long), torch.arange(3)
    cache.write(0, x, x, *places)
    keys, values = cache.read(0, slice(0, 1), 3, Workspace(torch.float32, CPU))
    keys = keys.permute(2, 0, 1)
    beside = torch.ones(3, 2, dtype=torch.bool)
    beside[1, 0] = False
    for kept in (keys, values.transpose(0, 1)):
        torch.testing.assert_close(kept[beside], restored(x[beside]), rtol=ROUNDING[torch.float32], atol=0)
        if math.isfinite(value):
            torch.testing.assert_close(kept[1, 0], x[1, 0], rtol=0.01, atol=1e-43)
        else:
            assert not kept[1, 0].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
def test_no_number_is_further_from_its_code_than_half_a_step(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    codes, scale = quantize(x)
    assert codes.abs().max() <= 127
    assert torch.equal(codes, codes.round())
    step = x.abs().max().double() / 127
    assert bool(((codes.double() * scale.double() - x.double()).abs() <= step * 0.5001 + 1e-42).all())


def test_decode_reads_bytes_and_makes_no_copy_of_the_context() -> None:
    """In an attention of one token over a context, nothing as large as the restored context is allocated."""
    context, heads = 4096, (8, 8, 64)
    driver = driver_of(64, 64, heads)
    table = tuple(range(64))
    backend = driver.backend
    x = torch.randn(1, 8, 64)
    metadata = backend.prepare([SequenceSlice(context - 1, 1, table)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        backend.forward(0, x, x, x, metadata)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < taken < context * 8 * 64  # a byte of each of the keys


def test_bytes_per_token_are_those_of_the_pools() -> None:
    for heads, dim in ((8, 128), (2, 64), (1, 16), (3, 24)):
        cache = Int8BlockCache(1, 9, 64, heads, dim, torch.bfloat16, CPU)
        stored = sum(pool[0, :9].nbytes for pool in (cache.keys, cache.values, cache.key_scales))
        assert Int8PagedAttention.bytes_per_token(heads, dim, 2) * 9 * 64 == stored
        assert Int8PagedAttention.bytes_per_token(heads, dim, 4) * 9 * 64 == stored
    assert Int8PagedAttention.bytes_per_token(8, 128, 2) == 8 * (128 + 16 + 4 + 128 + 8)
