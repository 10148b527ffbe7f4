"""Intervals and tests of shares, against scipy and against counting every table there is."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from npu_zoo.evaluation.comparison.proportions import Contingency, mcnemar, paired_difference, wilson

COUNTS = st.integers(0, 400)
TABLES = st.builds(Contingency, COUNTS, COUNTS, COUNTS, COUNTS).filter(lambda table: table.total > 0)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_an_interval_of_a_share_is_scipy_s(total: int, share: float, confidence: float) -> None:
    successes = round(share * total)
    found = wilson(successes, total, confidence)
    expected = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(TABLES)
def test_mcnemar_is_the_binomial_test_of_the_samples_that_differ(table: Contingency) -> None:
    differing = table.only_a + table.only_b
    expected = binomtest(table.only_a, differing).pvalue if differing else 1.0
    assert mcnemar(table) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_samples() -> None:
    table = Contingency(0, 5100, 4900, 0)
    assert mcnemar(table) == pytest.approx(binomtest(5100, 10000).pvalue, rel=1e-6)
    assert mcnemar(Contingency(0, 40000, 0, 0)) == 0.0


def test_newcombe_s_own_example() -> None:
    """Table II of the paper has 36, 12, 2, 0 of 50: 0.20 from 0.0569 to 0.3404."""
    found = paired_difference(Contingency(both=36, only_a=2, only_b=12, neither=0))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


@given(TABLES)
def test_a_difference_the_other_way_round_is_the_negative(table: Contingency) -> None:
    there = paired_difference(table)
    back = paired_difference(Contingency(table.both, table.only_b, table.only_a, table.neither))
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))
    assert -1 <= there.low <= there.value <= there.high <= 1


@pytest.mark.parametrize("cells", [(0.7, 0.1, 0.1, 0.1), (0.85, 0.02, 0.08, 0.05), (0.3, 0.2, 0.2, 0.3)])
def test_the_interval_of_a_difference_holds_the_true_one_about_as_often_as_it_says(cells: tuple[float, ...]) -> None:
    total, held = 25, 0.0
    truth = cells[2] - cells[1]
    for both, only_a, only_b in itertools.product(range(total + 1), repeat=3):
        neither = total - both - only_a - only_b
        if neither >= 0:
            counts = (both, only_a, only_b, neither)
            ways = math.factorial(total) / math.prod(map(math.factorial, counts))
            found = paired_difference(Contingency(*counts))
            weight = ways * math.prod(p**n for p, n in zip(cells, counts, strict=True))
            held += weight * (found.low <= truth <= found.high)
    assert held > 0.93


def test_samples_are_counted_by_who_got_them_right() -> None:
    pairs = [(True, True)] * 4 + [(True, False)] * 3 + [(False, True)] * 2 + [(False, False)]
    assert Contingency.of(pairs) == Contingency(both=4, only_a=3, only_b=2, neither=1)
