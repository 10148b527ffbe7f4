"""How far the logits of two runs lie apart, position by position, and the rule by which MindIE's tests judge it."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORST = 5


@dataclass(frozen=True)
class KlRule:
    """Bounds of KL(A || B) in nats, A being the reference; each position of each sample counts once.

    Source: MindIE ModelTest (tests/modeltest/base/model_test.py), which fails a data set where a single position is
    above 1e-3, or more than 0.5 % of all its positions are above 1e-4.

    Attributes:
        largest: no position may be above it.
        usual: at most ``share`` of the positions may be above it.
    """

    largest: float = 1e-3
    usual: float = 1e-4
    share: float = 0.005


MINDIE_RULE = KlRule()


@dataclass(frozen=True)
class SampleDivergence:
    """A sample's worst position, from 0 of those that were saved."""

    sample: str
    position: int
    kl: float


@dataclass
class Divergence:
    """What was seen of two runs' logits so far.

    Attributes:
        invalid: positions of either run that are no logits: a NaN, +inf, or -inf throughout; by sample.
        same_top: positions at which both runs hold the same token for the most likely.
    """

    rule: KlRule = MINDIE_RULE
    same_top: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    _kl: array[float] = field(default_factory=lambda: array("d"))
    _worst: list[tuple[float, str, int]] = field(default_factory=list)

    def add(self, sample: str, chunks: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        """Count a sample's logits, given as pairs of arrays [positions, vocab] in the order of positions."""
        start, worst = 0, (0.0, 0)
        for a, b in chunks:
            sound = valid_rows(a) & valid_rows(b)
            if not sound.all():
                self.invalid[sample] = self.invalid.get(sample, 0) + int((~sound).sum())
            places, a, b = start + np.flatnonzero(sound), a[sound], b[sound]
            start += len(sound)
            if len(places):
                kl = kl_divergence(a, b)
                self._kl.extend(kl.tolist())
                self.same_top += int((a.argmax(-1) == b.argmax(-1)).sum())
                worst = max(worst, (float(kl.max()), -int(places[kl.argmax()])))
        if worst[0] > 0:
            self._keep(worst[0], sample, -worst[1])

    def _keep(self, kl: float, sample: str, position: int) -> None:
        heapq.heappush(self._worst, (kl, sample, position))
        if len(self._worst) > _WORST:
            heapq.heappop(self._worst)

    @property
    def positions(self) -> int:
        """Positions that are logits in both runs."""
        return len(self._kl)

    @property
    def worst(self) -> list[SampleDivergence]:
        """The samples with the largest KL, the worst first; none that is equal in both runs."""
        return [SampleDivergence(sample, at, kl) for kl, sample, at in sorted(self._worst, key=lambda w: (-w[0], w[1]))]

    def above(self, bound: float) -> int:
        """Positions whose KL is above a bound."""
        return int((self._values() > bound).sum())

    @property
    def largest(self) -> float:
        """The largest KL."""
        return float(self._values().max(initial=0.0))

    @property
    def mean(self) -> float:
        """The mean KL."""
        return float(self._values().mean()) if self.positions else 0.0

    def percentile(self, percent: float) -> float:
        """The KL that so many percent of the positions do not exceed; one that was seen, not one between two."""
        return float(np.percentile(self._values(), percent, method="inverted_cdf")) if self.positions else 0.0

    @property
    def passes(self) -> bool:
        """Whether the rule holds; it does not where nothing was compared or a position had no logits."""
        few = self.above(self.rule.usual) <= self.rule.share * self.positions
        return bool(self.positions) and not self.invalid and not self.above(self.rule.largest) and few

    def _values(self) -> NDArray[np.float64]:
        return np.array(self._kl, dtype=np.float64)


def valid_rows(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rows of which a softmax exists: no NaN, no +inf, and not -inf throughout; -inf is a masked token."""
    largest: NDArray[np.bool_] = np.isfinite(logits.max(-1))  # a NaN is a row's maximum
    return largest


def kl_divergence(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(softmax(a) || softmax(b)) of each row in nats, in float64; inf where b masks a token that a does not.

    Args:
        a: [positions, vocab], rows that :func:`valid_rows` takes.
        b: the same shape.
    """
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    probability = np.exp(log_a)
    with np.errstate(invalid="ignore"):  # both masked: -inf minus -inf, of probability 0
        terms = probability * (log_a - log_b)
    terms[probability == 0] = 0
    # Rounding may leave a sum that is truly 0 a little below it.
    total: NDArray[np.float64] = np.maximum(terms.sum(-1), 0)
    return total


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
