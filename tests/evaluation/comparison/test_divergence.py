"""KL of logits against scipy's relative entropy in float64, and the rule that judges it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy

from npu_zoo.evaluation.comparison.divergence import Divergence, kl_divergence, valid_rows

Logits = NDArray[np.float32]
FINITE = st.floats(-1e4, 1e4, width=32)
PAIRS = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8).flatmap(
    lambda shape: st.tuples(arrays(np.float32, shape, elements=FINITE), arrays(np.float32, shape, elements=FINITE))
)


def noisy(positions: int, noise: float, seed: int = 0) -> tuple[Logits, Logits]:
    draws = np.random.default_rng(seed)
    a = draws.normal(0, 3, (positions, 500)).astype(np.float32)
    return a, (a + draws.normal(0, noise, a.shape)).astype(np.float32)


def seen(a: Logits, b: Logits, sample: str = "t/1", chunk: int = 7) -> Divergence:
    found = Divergence()
    found.add(sample, ((a[i : i + chunk], b[i : i + chunk]) for i in range(0, len(a), chunk)))
    return found


@given(PAIRS)
def test_kl_is_never_negative_and_zero_between_equals(pair: tuple[Logits, Logits]) -> None:
    a, b = pair
    assert (kl_divergence(a, b) >= 0).all()
    assert (kl_divergence(a, a.copy()) == 0).all()


@given(PAIRS, st.floats(-100, 100, width=32))
def test_a_constant_on_all_logits_changes_nothing(pair: tuple[Logits, Logits], offset: float) -> None:
    a, b = (half.clip(-50, 50) for half in pair)
    moved = kl_divergence((a.astype(np.float64) + offset).astype(np.float64), b)  # type: ignore[arg-type]
    assert moved == pytest.approx(kl_divergence(a, b), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("noise", [1e-4, 0.01, 1.0])
def test_kl_is_scipy_s_relative_entropy(noise: float) -> None:
    a, b = noisy(20, noise)
    p, q = softmax(a.astype(np.float64), -1), softmax(b.astype(np.float64), -1)
    assert kl_divergence(a, b) == pytest.approx(entropy(p, q, axis=-1), rel=1e-6, abs=1e-15)


def test_masked_tokens_are_of_no_weight_unless_the_other_run_takes_them() -> None:
    a = np.array([[0.0, 1.0, -np.inf], [0.0, 1.0, -np.inf], [0.0, 1.0, 2.0]], np.float32)
    b = np.array([[0.0, 1.0, -np.inf], [0.0, 1.0, 0.0], [0.0, 1.0, -np.inf]], np.float32)
    kl = kl_divergence(a, b)
    assert kl[0] == 0
    assert kl[1] == pytest.approx(np.log((1 + np.e + 1) / (1 + np.e)))
    assert kl[2] == np.inf


def test_rows_without_a_softmax_are_told() -> None:
    rows = np.array([[0, 1], [np.nan, 1], [np.inf, 1], [-np.inf, -np.inf], [-np.inf, 1]], np.float32)
    assert valid_rows(rows).tolist() == [True, False, False, False, True]


def test_figures_are_of_all_positions_however_they_come() -> None:
    a, b = noisy(100, 0.02)
    kl = kl_divergence(a, b)
    for chunk in (1, 7, 1000):
        found = seen(a, b, chunk=chunk)
        assert (found.positions, found.largest, found.mean) == (100, kl.max(), pytest.approx(kl.mean()))
        assert found.percentile(99) == np.sort(kl)[98]
        assert found.above(1e-4) == (kl > 1e-4).sum()
        assert found.same_top == (a.argmax(-1) == b.argmax(-1)).sum()
        assert (found.worst[0].position, found.worst[0].kl) == (kl.argmax(), kl.max())


def test_the_worst_samples_are_named_the_worst_first() -> None:
    found = Divergence()
    for number in range(9):
        found.add(f"t/{number}", [noisy(3, 0.01 * (number % 7), number)])
    kls = [one.kl for one in found.worst]
    assert len(kls) == 5
    assert kls == sorted(kls, reverse=True)
    assert found.worst[0].sample == "t/6"


def rows_of(kl: float, positions: int) -> tuple[Logits, Logits]:
    """Rows of two tokens whose KL is a little below, found by bisection."""
    low, high = 0.0, 2.0
    a = np.zeros((1, 2), np.float32)
    for _ in range(60):
        middle = (low + high) / 2
        b = np.array([[0, middle]], np.float32)
        low, high = (middle, high) if kl_divergence(a, b)[0] < kl else (low, middle)
    b = np.array([[0, low]], np.float32)
    return a.repeat(positions, 0), b.repeat(positions, 0)


@pytest.mark.parametrize(
    ("positions", "passes"),
    [
        ({9e-5: 1000}, True),
        ({9e-5: 995, 9e-4: 5}, True),
        ({9e-5: 994, 9e-4: 6}, False),
        ({9e-5: 999, 1.1e-3: 1}, False),
        ({1e-9: 100_000, 1.1e-3: 1}, False),
        ({9e-5: 10, 9e-4: 1}, False),
        ({}, False),
    ],
)
def test_the_rule(positions: dict[float, int], passes: bool) -> None:
    found = Divergence()
    for kl, count in positions.items():
        found.add(str(kl), [rows_of(kl, count)])
    assert found.passes is passes


def test_a_position_without_logits_fails_the_rule_and_is_counted_by_sample() -> None:
    a, b = noisy(50, 0.0)
    found = seen(a, b)
    assert found.passes
    b[17] = np.nan
    b[18, 3] = np.inf
    found = seen(a, b)
    assert (found.positions, found.invalid, found.passes) == (48, {"t/1": 2}, False)
    assert seen(a, np.full_like(b, np.nan)).positions == 0
