"""A block table against the list that it stands for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.engine.block_table import BlockTable

Steps = list[int | None]


@given(st.lists(st.one_of(st.integers(0, 2**31 - 1), st.none()), max_size=80))
def test_it_is_the_list_of_what_was_added_and_not_taken_away(steps: Steps) -> None:
    table, plain = BlockTable(), list[int]()
    for step in steps:
        if step is not None:
            table.append(step)
            plain.append(step)
        elif plain:
            assert table.pop() == plain.pop()
    assert (list(table), len(table), bool(table)) == (plain, len(plain), bool(plain))
    assert table == plain
    assert table[: len(plain) // 2] == plain[: len(plain) // 2]
    assert np.asarray(table).tolist() == plain
    assert pickle.loads(pickle.dumps(table)) == table


def test_taking_from_an_empty_one_is_refused() -> None:
    with pytest.raises(IndexError):
        BlockTable().pop()


def test_an_array_of_it_is_a_view_that_growth_leaves_alone() -> None:
    table = BlockTable(range(8))
    view = np.asarray(table)
    assert np.shares_memory(view, np.asarray(table))
    for number in range(100):
        table.append(number)
    assert view.tolist() == list(range(8))
