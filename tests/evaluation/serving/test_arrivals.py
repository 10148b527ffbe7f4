"""Arrivals against the closed forms of their distributions."""

from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.evaluation.serving.arrivals import OpenLoop

COUNT = 20_000


def times(loop: OpenLoop, count: int, seed: int = 0) -> list[float]:
    return list(itertools.islice(loop.send_times(Random(seed)), count))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_times_between_requests_have_the_mean_and_the_variance_of_a_gamma_distribution(
    rate: float, burstiness: float
) -> None:
    gaps = np.diff([0.0, *times(OpenLoop(rate, burstiness=burstiness), COUNT)])
    variance = 1 / (burstiness * rate**2)
    # The sample variance of n draws has a standard error of variance * sqrt((kurtosis - 1) / n); a gamma's is 3 + 6/k.
    spread = math.sqrt((2 + 6 / burstiness) / COUNT)
    assert gaps.mean() == pytest.approx(1 / rate, abs=4 * math.sqrt(variance / COUNT))
    assert gaps.var() == pytest.approx(variance, rel=4 * spread)


def test_counts_of_a_poisson_process_vary_as_much_as_they_are() -> None:
    rate, window = 10.0, 2.0
    sent = np.array(times(OpenLoop(rate), COUNT))
    counts, _ = np.histogram(sent, np.arange(0, sent[-1] - window, window))
    assert counts.mean() == pytest.approx(rate * window, rel=0.03)
    assert counts.var() == pytest.approx(rate * window, rel=0.15)


@given(st.integers(1, 9), st.floats(0.1, 100), st.integers(1, 60))
def test_bursts_are_sent_at_once_and_keep_the_rate(size: int, rate: float, count: int) -> None:
    expected = [burst * size / rate for burst in range(count) for _ in range(size)]
    assert times(OpenLoop(rate, "burst", burst_size=size), count) == pytest.approx(expected[:count])


@given(st.floats(0.01, 1e4), st.floats(0.05, 50), st.integers(0, 9))
def test_the_same_seed_gives_the_same_times_in_order(rate: float, burstiness: float, seed: int) -> None:
    loop = OpenLoop(rate, burstiness=burstiness)
    sent = times(loop, 50, seed)
    assert sent == times(loop, 50, seed) == sorted(sent)
    assert sent != times(loop, 50, seed + 1)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert times(OpenLoop(math.inf), 3) == [0.0, 0.0, 0.0]
