"""Charts as pictures: PNG for documents, SVG for the page. Needs matplotlib."""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import ConfigError
from npu_zoo.evaluation.plots.charts import Chart, LineChart, Point, RatioChart, Roof, RooflineChart
from npu_zoo.evaluation.plots.labels import label_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SOFTWARE = "npu-zoo bench plot"
"""What a PNG says of where it is from."""

COLOURS = ("#3b7dd8", "#d9730d", "#2e9e5b", "#c2559d", "#1799a6", "#d14b48", "#8a6fdf", "#a0764a")
"""Told apart on a white and on a dark ground, at a contrast of 3 and more on both."""

_MARKERS = "osD^vPX*"
_WIDTH, _DPI = 7.5, 150
_NOTE_LETTERS, _NOTE_LINE = 105, 0.17
"""A note's letters in a line, and a line's height in inches."""

_INK, _PAPER = "#1a1f24", "#ffffff"


def png(charts: Sequence[Chart], description: str = "") -> bytes:
    """All charts in one picture, below each other.

    Args:
        description: kept in the file beside the program's name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    heights = [_height(chart) for chart in charts]
    with _style():
        figure = _figure(sum(heights))
        parts = figure.subfigures(len(charts), 1, height_ratios=heights, squeeze=False)
        for part, chart in zip(parts[:, 0], charts, strict=True):
            _draw(chart, part)
        metadata = {"Software": SOFTWARE, **({"Description": description} if description else {})}
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI, facecolor=_PAPER, metadata=metadata)
    return stream.getvalue()


def svg(chart: Chart) -> str:
    """One chart as an element of a page, without its title; its ink is the page's.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with _style({"svg.hashsalt": chart.title}):
        figure = _figure(_height(chart))
        _draw(dataclasses.replace(chart, title=""), figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    element = stream.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg") :], flags=re.DOTALL)
    return element.replace(_INK, "currentColor").replace(_PAPER, "var(--ground)")


def _style(more: dict[str, Any] | None = None) -> Any:
    """Settings that hold while something is drawn and saved, whatever the user's own are."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError("plots need matplotlib, which is not installed: pip install 'npu-zoo[plots]'") from None
    own = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    rest = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#8b959e",
        "grid.alpha": 0.25,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "figure.constrained_layout.h_pad": 0.08,
    }
    settings: Any = {**mpl.rcParamsDefault, **own, **rest, **(more or {})}
    del settings["backend"]  # to set it, even to what it is, closes the caller's own figures
    return mpl.rc_context(settings)


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _height(chart: Chart) -> float:
    """Inches."""
    if isinstance(chart, RatioChart):
        return 1.5 + 0.22 * len(chart.ratios) + 0.12 * len(chart.cases)
    if isinstance(chart, RooflineChart):
        return 5.0 + 0.16 * max(0, len(chart.points) - 10) + _NOTE_LINE * len(_note_lines(chart))
    return 3.6 + 0.18 * (len(chart.series) // 3) + _NOTE_LINE * len(_note_lines(chart))


def _note_lines(chart: LineChart | RooflineChart) -> list[str]:
    return textwrap.wrap(chart.note, _NOTE_LETTERS)


@functools.singledispatch
def _draw(chart: object, figure: Figure | SubFigure) -> None:
    raise TypeError(type(chart))


@_draw.register
def _(chart: LineChart, figure: Any) -> None:
    axes = _axes(chart.title, figure)
    groups = list(dict.fromkeys(series.group for series in chart.series))
    for series in chart.series:
        place = groups.index(series.group)
        _line(axes, series.points, series.name, place, dashed=series.dashed)
    if chart.limit is not None:
        axes.axhline(chart.limit, color=_INK, linestyle=":", linewidth=1, label="allowed")
    axes.set_xlabel("\n".join((chart.x_label, *_note_lines(chart))))
    axes.set_ylabel(chart.y_label)
    _scale(axes, chart)
    _legend(axes, figure)


@_draw.register
def _(chart: RatioChart, figure: Any) -> None:
    axes = _axes(chart.title, figure)
    engines, step = chart.engines, 0.8 / len(chart.engines)
    for ratio in chart.ratios:
        number = engines.index(ratio.engine)
        row = chart.cases.index(ratio.case) + (number - (len(engines) - 1) / 2) * step
        colour = _colour(number)
        axes.plot((min(ratio.values), max(ratio.values)), (row, row), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(ratio.values, [row] * len(ratio.values), ".", color=colour, markersize=4, alpha=0.6)
        axes.plot(ratio.median, row, _marker(number), color=colour, markersize=6, markeredgecolor=_PAPER)
    for number, engine in enumerate(engines):
        axes.plot([], [], _marker(number), color=_colour(number), label=f"to {engine}")
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_yticks(range(len(chart.cases)), chart.cases)
    axes.set_ylim(len(chart.cases) - 0.5, -0.5)
    axes.set_xlabel(f"ratio; right of 1 {chart.subject} is better (median, least and most of the rounds)")
    _ratio_scale(axes, [value for ratio in chart.ratios for value in ratio.values])
    axes.grid(visible=False, axis="y")
    _legend(axes, figure)


@_draw.register
def _(chart: RooflineChart, figure: Any) -> None:
    axes = _axes(chart.title, figure)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = _reach(chart)
    for roof in chart.roofs:
        _roof(axes, roof, low, high)
    for number, group in enumerate(chart.groups):
        points = [point for point in chart.points if point.group == group]
        values = [point.intensity for point in points], [point.operations_per_s for point in points]
        axes.plot(*values, _marker(number), color=_colour(number), markersize=6, label=group)
    axes.set_xlim(low, high)
    bottom = min(point.operations_per_s for point in chart.points)
    axes.set_ylim(bottom / 3, 2.5 * max(roof.peak for roof in chart.roofs))
    axes.set_xlabel("\n".join(("operations per byte that the work needs", *_note_lines(chart))))
    axes.set_ylabel("operations/s")
    _legend(axes, figure)
    label_points(axes, chart, figure, _INK)


def _axes(title: str, figure: Any) -> Axes:
    axes: Axes = figure.subplots()
    axes.set_title(title)
    return axes


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _line(axes: Axes, points: Sequence[Point], name: str, place: int, *, dashed: bool) -> None:
    """A series, with the spread of points that have one."""
    style: dict[str, Any] = {"linestyle": "--", "markerfacecolor": _PAPER} if dashed else {}
    x, y = [point.x for point in points], [point.y for point in points]
    axes.plot(x, y, marker=_marker(place), color=_colour(place), label=name, markersize=5, linewidth=1.6, **style)
    for point in points:
        if point.low is not None and point.high is not None:
            axes.plot((point.x, point.x), (point.low, point.high), color=_colour(place), linewidth=4, alpha=0.35)


def _scale(axes: Axes, chart: LineChart) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    values = sorted({point.x for series in chart.series for point in series.points})
    if chart.x_scale == "log" and values[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(_apart(values), labels=[f"{value:g}" for value in _apart(values)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
    heights = [point.y for series in chart.series for point in series.points]
    if min(heights) > 0 and max(heights) > 20 * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
    else:
        axes.set_ylim(bottom=0)


def _apart(values: Sequence[float]) -> list[float]:
    """Ticks, without those that would stand in the way of the one before."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= 1.15 * kept[-1]:
            kept.append(value)
    return kept


def _ratio_scale(axes: Axes, values: Sequence[float]) -> None:
    """The same way to the left for half as for twice to the right."""
    from matplotlib.ticker import NullLocator

    least, most = min(*values, 0.95), max(*values, 1.05)
    axes.set_xscale("log")
    axes.set_xlim(least / 1.05, most * 1.05)
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
    ticks = [step for step in steps if least / 1.05 <= step <= most * 1.05]
    wide = most / least > 8
    shown = [tick for tick in ticks if not wide or tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)]
    axes.set_xticks(shown, labels=[f"{tick:g}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, figure: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or (labels and labels[0]):
        longest = max(map(len, labels))
        columns = max(1, min(len(labels), 4, 90 // (longest + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _reach(chart: RooflineChart) -> tuple[float, float]:
    """Operations per byte from left of the points and of the ridges to right of them."""
    found = [point.intensity for point in chart.points] + [roof.peak / roof.bandwidth for roof in chart.roofs]
    return min(found) / 4, max(found) * 4


def _roof(axes: Axes, roof: Roof, low: float, high: float) -> None:
    ridge = roof.peak / roof.bandwidth
    axes.plot((low, ridge, high), (low * roof.bandwidth, roof.peak, roof.peak), color=_INK, linewidth=1.4)
    told = f"{_scaled(roof.peak)} operations/s, {_scaled(roof.bandwidth)}B/s: {roof.name}"
    axes.annotate(told, (high, roof.peak), (-4, 4), textcoords="offset points", ha="right", va="bottom", fontsize=8)


def _scaled(value: float) -> str:
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g} "
