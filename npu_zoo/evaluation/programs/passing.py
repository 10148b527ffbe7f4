"""pass@k: how likely it is that one of k programs for a problem passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from npu_zoo.core.errors import UsageError


class Tally(NamedTuple):
    """How many programs were made for a problem, and how many of them passed."""

    samples: int
    passed: int


class PassAtK(NamedTuple):
    """The mean of pass@k over problems, and the standard error of that mean (0 for one problem)."""

    value: float
    stderr: float
    problems: int


def pass_at_k(tally: Tally, k: int) -> float:
    """The unbiased estimate for one problem: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374, equation 1).

    Raises:
        UsageError: k is below 1, or above the number of samples.
    """
    if not 1 <= k <= tally.samples:
        raise UsageError(f"pass@{k} takes {max(k, 1)} programs per problem, and there are {tally.samples}")
    failing = math.comb(tally.samples - tally.passed, k)
    return float(1 - Fraction(failing, math.comb(tally.samples, k)))


def mean_pass_at_k(tallies: Sequence[Tally], k: int) -> PassAtK:
    """The mean over problems; its standard error is the problems' standard deviation over the root of their number.

    Raises:
        UsageError: there is no problem, or as :func:`pass_at_k`.
    """
    if not tallies:
        raise UsageError("pass@k is a mean over problems, and there are none")
    each = [pass_at_k(tally, k) for tally in tallies]
    count = len(each)
    mean = math.fsum(each) / count
    spread = math.fsum((value - mean) ** 2 for value in each) / (count - 1) if count > 1 else 0.0
    return PassAtK(mean, math.sqrt(spread / count), count)


def parse_ks(text: str, samples: int) -> tuple[int, ...]:
    """The values of k from ``1,10,100``, in order.

    Raises:
        UsageError: one is no integer, below 1, or above the number of samples.
    """
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"k={text!r} is no list of integers such as 1,10,100") from None
    wrong = [k for k in ks if not 1 <= k <= samples]
    if wrong:
        raise UsageError(
            f"pass@{wrong[-1]} cannot be estimated from {samples} programs per problem; "
            f"give k between 1 and {samples}, or n={max(wrong[-1], 1)}"
        )
    return tuple(ks)
