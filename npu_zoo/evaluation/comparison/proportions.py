"""Shares of samples and their differences, with intervals that hold for few samples and for shares near 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds between which the true one lies with some confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Contingency:
    """How many samples two results got right, each alone or both."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> Contingency:
        """Count what two results did with each sample: right or wrong."""
        counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
        for pair in pairs:
            counts[pair] += 1
        return cls(counts[True, True], counts[True, False], counts[False, True], counts[False, False])

    @property
    def total(self) -> int:
        """All samples."""
        return self.both + self.only_a + self.only_b + self.neither


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """The share of successes with Wilson's score interval (Wilson 1927)."""
    z = _quantile(confidence)
    share = successes / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # At the ends the bound is the end itself, which rounding would miss.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == total else middle + half
    return Interval(share, low, high)


def paired_difference(table: Contingency, confidence: float = 0.95) -> Interval:
    """Share of B minus share of A over the same samples, with Newcombe's square-and-add interval.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10.
    """
    a = wilson(table.both + table.only_a, table.total, confidence)
    b = wilson(table.both + table.only_b, table.total, confidence)
    together = _correlation(table)
    difference = b.value - a.value
    below = _distance(b.value - b.low, a.high - a.value, together)
    above = _distance(b.high - b.value, a.value - a.low, together)
    return Interval(difference, max(-1.0, difference - below), min(1.0, difference + above))


def mcnemar(table: Contingency) -> float:
    """The exact two-sided p of McNemar's test: how likely so uneven a split of the samples that differ is by chance."""
    differing, fewer = table.only_a + table.only_b, min(table.only_a, table.only_b)
    term = tail = 1
    for k in range(fewer):
        term = term * (differing - k) // (k + 1)
        tail += term
    # Whole numbers, since 2 to the power of the samples is soon beyond a float.
    return 1.0 if 2 * fewer >= differing else (2 * tail) / (1 << differing)


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _distance(of_b: float, of_a: float, together: float) -> float:
    return math.sqrt(max(0.0, of_b * of_b - 2 * together * of_b * of_a + of_a * of_a))


def _correlation(table: Contingency) -> float:
    """Phi of the table, continuity corrected as the method has it; 0 where a margin is empty."""
    margins = math.prod(
        (
            table.both + table.only_a,
            table.only_b + table.neither,
            table.both + table.only_b,
            table.only_a + table.neither,
        )
    )
    if not margins:
        return 0.0
    excess = table.both * table.neither - table.only_a * table.only_b
    corrected = max(excess - table.total / 2, 0) if excess > 0 else excess
    return corrected / math.sqrt(margins)
