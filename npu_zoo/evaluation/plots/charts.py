"""What a plot shows, as plain numbers: points, spreads, and the table that says the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log"]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A value with its spread over rounds, where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the order of x.

    Attributes:
        group: series of one group have one colour.
        dashed: for the second of a group, such as a p99 beside a p50.
    """

    name: str
    points: tuple[Point, ...]
    group: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class LineChart:
    """Series over a common axis.

    Attributes:
        x_scale: ``log`` is to the base 2 with a tick at each value.
        limit: a bound that is drawn across; None for none.
        note: what a reader has to know, below the axis.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_scale: Scale = "linear"
    limit: float | None = None
    note: str = ""

    @property
    def columns(self) -> Row:
        """Of the table."""
        return ("series", self.x_label, self.y_label, *(("least", "most") if self._spreads else ()))

    def rows(self) -> Iterator[Row]:
        """A row for each point."""
        for series in self.series:
            for point in series.points:
                ends = (point.low, point.high) if self._spreads else ()
                yield (series.name, *map(_number, (point.x, point.y, *ends)))

    @property
    def _spreads(self) -> bool:
        return any(point.low is not None for series in self.series for point in series.points)


@dataclass(frozen=True)
class Ratio:
    """How one engine compares in a case, round by round; above 1 the subject is better."""

    case: str
    engine: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class RatioChart:
    """Ratios of one engine to others.

    Attributes:
        subject: the engine that is better where a ratio is above 1.
    """

    title: str
    subject: str
    ratios: tuple[Ratio, ...]
    columns: Row = ("case", "to", "median", "least", "most", "rounds")

    @property
    def cases(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(ratio.case for ratio in self.ratios))

    @property
    def engines(self) -> list[str]:
        """Those that the subject is compared with."""
        return list(dict.fromkeys(ratio.engine for ratio in self.ratios))

    def rows(self) -> Iterator[Row]:
        """A row for each case and engine."""
        for one in self.ratios:
            figures = (one.median, min(one.values), max(one.values))
            yield (one.case, one.engine, *map(_number, figures), str(len(one.values)))


@dataclass(frozen=True)
class Roof:
    """What a machine was measured to do: bytes/s and operations/s."""

    name: str
    bandwidth: float
    peak: float


@dataclass(frozen=True)
class WorkPoint:
    """A phase of a case: operations per byte that it needs at least, and operations/s that it came to."""

    label: str
    group: str
    intensity: float
    operations_per_s: float
    roof: Roof

    @property
    def share(self) -> float:
        """Of what the roof allows at its intensity."""
        return self.operations_per_s / min(self.roof.peak, self.roof.bandwidth * self.intensity)


@dataclass(frozen=True)
class RooflineChart:
    """Where cases lie under the roofs of their machines; ``note`` as in :class:`LineChart`."""

    title: str
    points: tuple[WorkPoint, ...]
    note: str = ""
    columns: Row = ("case", "phase", "operations/byte", "operations/s", "share of the roof", "machine")

    @property
    def roofs(self) -> list[Roof]:
        """Each once."""
        return list(dict.fromkeys(point.roof for point in self.points))

    @property
    def groups(self) -> list[str]:
        """Phases, each once."""
        return list(dict.fromkeys(point.group for point in self.points))

    def rows(self) -> Iterator[Row]:
        """A row for each point, and one for each roof."""
        for point in self.points:
            figures = (_number(point.intensity), _number(point.operations_per_s), f"{point.share:.1%}")
            yield (point.label, point.group, *figures, point.roof.name)
        for roof in self.roofs:
            ridge = _number(roof.peak / roof.bandwidth)
            yield ("roof", f"{_number(roof.bandwidth)} bytes/s", ridge, _number(roof.peak), "100.0%", roof.name)


Chart = LineChart | RatioChart | RooflineChart


def spread(x: float, y: float, values: Sequence[float]) -> Point:
    """A point with the least and the largest of its rounds; without a spread where there was one round."""
    return Point(x, y, min(values), max(values)) if len(values) > 1 else Point(x, y)


def _number(value: float | None) -> str:
    """Four digits, without an exponent where that is readable."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
