from __future__ import annotations

import itertools
import math
import statistics

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.programs.passing import Tally, mean_pass_at_k, parse_ks, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_program_that_passes(samples: int) -> None:
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        verdicts = [True] * passed + [False] * (samples - passed)
        choices = list(itertools.combinations(verdicts, k))
        assert pass_at_k(Tally(samples, passed), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_one_is_the_share_that_passes_and_large_numbers_stay_exact() -> None:
    assert pass_at_k(Tally(200, 37), 1) == pytest.approx(37 / 200)
    assert pass_at_k(Tally(10_000, 1), 5_000) == 0.5
    product = 1 - math.prod(1 - 100 / i for i in range(200 - 12 + 1, 200 + 1))
    assert pass_at_k(Tally(200, 12), 100) == pytest.approx(product)


def test_the_mean_has_the_standard_error_of_a_mean_over_problems() -> None:
    tallies = [Tally(10, passed) for passed in (0, 3, 10, 7, 1)]
    each = [pass_at_k(tally, 3) for tally in tallies]
    found = mean_pass_at_k(tallies, 3)
    assert found.value == pytest.approx(statistics.mean(each))
    assert found.stderr == pytest.approx(statistics.stdev(each) / math.sqrt(5))
    assert found.problems == 5
    share = mean_pass_at_k([Tally(1, 1)] * 40 + [Tally(1, 0)] * 60, 1)
    assert share.stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 99))
    assert mean_pass_at_k([Tally(1, 1)], 1) == (1.0, 0.0, 1)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match="there are 3"):
        pass_at_k(Tally(3, 1), k)
    with pytest.raises(UsageError, match=f"pass@{k} cannot be estimated from 3"):
        parse_ks(f"{k},1", 3)


def test_lists_of_k() -> None:
    assert parse_ks("10, 1,10", 20) == (1, 10)
    with pytest.raises(UsageError, match="no list of integers"):
        parse_ks("1,x", 20)
    with pytest.raises(UsageError, match="there are none"):
        mean_pass_at_k([], 1)
