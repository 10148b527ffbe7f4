"""Where plots are written: whole, and over nothing but earlier plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.plots import drawing
from npu_zoo.evaluation.plots.charts import Chart
from npu_zoo.evaluation.plots.page import GENERATOR, page
from npu_zoo.evaluation.plots.selection import Given
from npu_zoo.testing.files import write_whole

_HEAD = 2048


def require_plot_place(path: Path) -> None:
    """Refuse a file that :func:`write_png` and :func:`write_html` would not replace.

    Raises:
        UsageError: there is something there that is no plot of ours.
    """
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is no file; name one for the plot")
    if not path.exists():
        return
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if head and GENERATOR.encode() not in head:
        raise UsageError(f"{path} exists and was not written by `{GENERATOR}`; name another file, or remove it")


def write_png(charts: Sequence[Chart], path: Path) -> None:
    """Draw charts into a PNG.

    Raises:
        UsageError: something else is there, or it cannot be written.
        ConfigError: matplotlib is not installed.
    """
    _write(path, drawing.png(charts))


def write_html(given: Sequence[Given], charts: Sequence[Chart], path: Path) -> None:
    """Draw charts into a page; raises as :func:`write_png`."""
    _write(path, page(given, charts, [drawing.svg(chart) for chart in charts]))


def _write(path: Path, content: str | bytes) -> None:
    require_plot_place(path)
    try:
        write_whole(path, content)
    except OSError as error:
        raise UsageError(f"the plot {path} cannot be written: {error.strerror or error}; name another file") from None
