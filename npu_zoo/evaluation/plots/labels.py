"""Names of points, placed where they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from npu_zoo.evaluation.plots.charts import Roof, RooflineChart, WorkPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_REACHES = (12, 22, 32, 42, 54, 68, 84, 102)
_SIDES = ((0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_PLACES = ((1, 0), (-1, 0), *((x, y * reach) for reach in _REACHES for x, y in _SIDES))
"""Where a label may stand beside its point: sideways in half widths of its own, and up in points."""

_FONT_SIZE = 7.5
_STEPS = 200
"""Places along a roof that labels keep away from."""


Box = tuple[float, float, float, float]
"""Left, lower, right and upper end in pixels."""


def label_points(axes: Axes, chart: RooflineChart, figure: Any, colour: str) -> None:
    """Name each point of a roofline where its name covers no other, no point and no roof."""
    whole = figure.figure if figure.figure is not None else figure
    whole.draw_without_rendering()  # which places the axes
    frame = _extents(axes.get_window_extent())
    taken = [_text_box(text) for text in axes.texts]
    taken += [_around(axes, point.intensity, point.operations_per_s, 6) for point in chart.points]
    taken += [_around(axes, *spot, 2) for roof in chart.roofs for spot in _along(roof, *axes.get_xlim())]
    for point in sorted(chart.points, key=lambda point: -point.operations_per_s):
        taken.append(_label(axes, point, taken, frame, colour))


def _along(roof: Roof, low: float, high: float) -> Iterator[tuple[float, float]]:
    """Places on a roof, evenly on a logarithmic axis."""
    for step in range(_STEPS + 1):
        x = low * (high / low) ** (step / _STEPS)
        yield x, min(roof.peak, roof.bandwidth * x)


def _label(axes: Axes, point: WorkPoint, taken: Sequence[Box], frame: Box, colour: str) -> Box:
    """Write a point's name at the first place that is free, or at the last where none is; gives what it covers."""
    place = (point.intensity, point.operations_per_s)
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": _FONT_SIZE}
    text = axes.annotate(point.label, place, (0, 0), **style)
    x, y, side, box = _free_place(text, taken, frame)
    text.remove()
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
    line["relpos"] = ((1 - side) / 2, 0.5 if side else (0.0 if y > 0 else 1.0))
    axes.annotate(point.label, place, (x, y), arrowprops=line, **style).set_in_layout(False)
    return box


def _free_place(text: Any, taken: Sequence[Box], frame: Box) -> tuple[float, float, int, Box]:
    """A label's offset in points, the side that it is on, and what it covers there."""
    scale = text.figure.dpi / 72
    left, lower, right, upper = _text_box(text)
    for side, y in _PLACES:
        x = side * ((right - left) / scale / 2 + 7)
        moved = (left + x * scale, lower + y * scale, right + x * scale, upper + y * scale)
        if _inside(moved, frame) and not any(_meet(moved, other) for other in taken):
            break
    return x, y, side, moved


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _text_box(text: Any) -> Box:
    """What the words cover, with some air beside them."""
    left, lower, right, upper = _extents(text.get_window_extent())
    return (left - 4, lower, right + 4, upper)


def _around(axes: Axes, x: float, y: float, reach: float) -> Box:
    across, up = map(float, axes.transData.transform((x, y)))
    return (across - reach, up - reach, across + reach, up + reach)


def _extents(box: Bbox) -> Box:
    left, lower, right, upper = map(float, box.extents)
    return (left, lower, right, upper)
