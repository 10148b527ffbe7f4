from __future__ import annotations

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.nn.attention.sharing import find_shared_prefixes


def row(start, *slots, num_tokens=1):
    return SequenceSlice(start, num_tokens, slots)


def test_tables_are_compared_block_by_block():
    rows = [row(3000, 7, 8, 1), row(3000, 7, 8, 2), row(3000, 7, 9, 3), row(3000, 7, 8, 4)]
    assert find_shared_prefixes(rows, 1024) == [([0, 1, 2, 3], 1)]


def test_a_block_that_a_row_still_writes_is_not_shared():
    rows = [row(2500, 7, 8, 1), row(2500, 7, 8, 2), row(2047, 7, 8)]
    assert find_shared_prefixes(rows, 1024) == [([0, 1, 2], 1)]


def test_groups_are_told_apart_by_their_first_block():
    rows = [row(1024 + i, first, first + 1) for i, first in enumerate([1, 5, 1, 5, 1, 5, 9])]
    assert find_shared_prefixes(rows, 1024) == [([0, 2, 4], 1), ([1, 3, 5], 1)]


def test_what_saves_little_is_left_alone():
    pair = [row(5000, 7, 8), row(5000, 7, 9)]
    assert find_shared_prefixes(pair, 4096) == []
    short = [row(16, 7, number) for number in range(8, 12)]
    assert find_shared_prefixes(short, 16) == []


def test_the_writer_of_a_prefix_is_not_in_its_group():
    rows = [row(0, 7, num_tokens=1024), *(row(1024, 7, number) for number in (8, 9, 10))]
    assert find_shared_prefixes(rows, 1024) == [([1, 2, 3], 1)]
