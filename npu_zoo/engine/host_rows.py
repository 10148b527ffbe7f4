"""Searches of logits in a CPU's memory, by whichever of numpy and torch has loops over vectors for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CACHED_VALUES = 2**18
"""Values that are worked on at once: what stays in a core's cache, and is not fetched from fresh memory each step."""


def row_parts(num_rows: int, size: int) -> Iterator[slice]:
    """Rows of a [num_rows, size] matrix in parts that a cache holds."""
    step = max(1, _CACHED_VALUES // max(1, size))
    return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def argmax(logits: Tensor) -> list[int]:
    """The place of the largest value of each row, the first of several; [N, vocab_size] on a CPU."""
    found: list[int] = []
    for part in row_parts(*logits.shape):
        found += logits[part].float().numpy().argmax(-1).tolist()
    return found


def draw(row: NDArray[Any], share: float) -> int:
    """The place at which a row's cumulative distribution reaches a share of it, 0 to 1; minus infinity is never drawn.

    Args:
        row: float32 logits.
    """
    places = np.flatnonzero(row > -np.inf)
    if not len(places):  # all are NaN: whatever the model computed, there is no distribution
        return len(row) - 1
    kept = torch.from_numpy(row[places])
    cumulative = torch.exp((kept - kept.amax()).double()).cumsum(0).numpy()
    # Scaling by the last sum keeps a share near 1 inside the range whatever was rounded.
    picked = np.searchsorted(cumulative, share * cumulative[-1], side="right")
    return int(places[min(int(picked), len(places) - 1)])


def largest(row: NDArray[Any], count: int) -> list[int]:
    """The places of a row's ``count`` largest values in their order, the first of equals first."""
    if not count:
        return []
    least = np.partition(row, -count)[-count]
    places = np.flatnonzero(row >= least)
    order = np.argsort(-row[places], kind="stable")
    found: list[int] = places[order[:count]].tolist()
    return found


def rank(row: NDArray[Any], place: int) -> int:
    """1 for the largest value of a row, and so on; equal ones have the same."""
    return int(np.count_nonzero(row > row[place])) + 1
