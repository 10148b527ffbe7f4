from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_zoo.core.attention import CacheLayout, SequenceSlice
from npu_zoo.core.errors import EngineError
from npu_zoo.nn.attention.contiguous import ContiguousAttention
from npu_zoo.nn.attention.paged import PagedAttention

from .conftest import TOLERANCE, Driver

CPU = torch.device("cpu")


def contiguous(slots, slot_size, heads=(2, 1, 8), dtype=torch.float32, layers=1):
    layout = CacheLayout(layers, heads[1], heads[2], slots, slot_size)
    return Driver(ContiguousAttention(layout, dtype, CPU, heads[0], heads[2] ** -0.5), heads, dtype, layers)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("slot_size", [20, 64, 70, 200])
def test_prompts_chunks_and_tokens(dtype, slot_size):
    driver = contiguous(3, slot_size, (4, 2, 8), dtype, layers=2)
    driver.step([("a", SequenceSlice(0, 9, (2,))), ("b", SequenceSlice(0, 1, (0,)))])
    driver.step([("b", SequenceSlice(1, 5, (0,))), ("a", SequenceSlice(9, 1, (2,)))])
    driver.step([("a", SequenceSlice(10, 9, (2,))), ("c", SequenceSlice(0, 20, (1,)))])
    driver.step([("a", SequenceSlice(19, 1, (2,)))])


def test_a_slot_filled_to_its_end():
    driver = contiguous(2, 130)
    driver.step([("a", SequenceSlice(0, 129, (1,)))])
    driver.step([("a", SequenceSlice(129, 1, (1,)))])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any), min_size=1, max_size=3))
def test_equal_to_paged(steps):
    """Three sequences grow step by step; both backends see the same rows."""
    layout = CacheLayout(1, 2, 8, 3, 128)
    flash = ContiguousAttention(layout, torch.float32, CPU, 4, 0.3)
    paged = PagedAttention(CacheLayout(1, 2, 8, 24, 16), torch.float32, CPU, 4, 0.3)
    starts = [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    for lengths in steps:
        names = [name for name in range(3) if lengths[name]]
        total = sum(lengths)
        query, key, value = (torch.randn(total, h, 8, generator=generator) for h in (4, 2, 2))
        tables = {name: tuple(range(name, 24, 3)) for name in names}
        rows = [[SequenceSlice(starts[n], lengths[n], t(n)) for n in names] for t in (lambda n: (n,), tables.get)]
        outs = [
            backend.forward(0, query, key, value, backend.prepare(r))
            for backend, r in zip((flash, paged), rows, strict=True)
        ]
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
        for name in names:
            starts[name] += lengths[name]


def test_a_row_longer_than_its_slot_is_refused():
    with pytest.raises(EngineError, match="one slot of 32 tokens"):
        contiguous(2, 32).backend.prepare([SequenceSlice(30, 3, (0,))])


def test_a_row_with_two_slots_is_refused():
    with pytest.raises(EngineError, match="in 2 slots"):
        contiguous(2, 32).backend.prepare([SequenceSlice(0, 3, (0, 1))])
