"""Prefixes that many rows of a step share: attended to once for all their queries, and merged with each row's rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from npu_zoo.core.attention import SequenceSlice
from npu_zoo.nn.attention.tables import first_blocks

# A shared prefix costs a gather and a merge; below this many saved token reads they are not worth it.
_MIN_SAVED_TOKENS = 1024


def find_shared_prefixes(rows: Sequence[SequenceSlice], block_size: int, cost: int = 2) -> list[tuple[list[int], int]]:
    """Groups of rows whose tables begin with the same blocks, all written before any of the group's new tokens.

    Args:
        cost: how many rows could read a prefix in the time in which it is gathered, attended to and merged.

    Returns:
        Row numbers and the number of shared blocks, for groups that are worth it.
    """
    by_first = defaultdict(list)
    for number, row in enumerate(rows):
        if row.start >= block_size:
            by_first[row.slots[0]].append(number)
    groups = []
    for members in by_first.values():
        if len(members) > cost:
            shared = _shared_blocks([rows[number] for number in members], block_size)
            if shared * block_size * (len(members) - cost) >= _MIN_SAVED_TOKENS:
                groups.append((members, shared))
    return groups


def _shared_blocks(rows: list[SequenceSlice], block_size: int) -> int:
    limit = min(row.start for row in rows) // block_size
    tables = np.stack([first_blocks(row.slots, limit) for row in rows])
    same = (tables == tables[0]).all(axis=0)
    return limit if same.all() else int(same.argmin())


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """The attention over two disjoint sets of keys, from each one's output [n, heads, head_dim] and lse [n, heads]."""
    share = torch.sigmoid(first_lse - second_lse).unsqueeze(-1)
    return torch.lerp(second.float(), first.float(), share).to(first.dtype)
