"""``bench plot``: records as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npu_zoo.cli.output import note
from npu_zoo.core.errors import UsageError


def plot(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD…", help="Files that bench wrote with --json.")],
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write all charts below each other as PNG.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with charts and numbers.")
    ] = None,
) -> None:
    """Draw what bench measured: throughput against batch, latency against load, ratios, and the roofline.

    Several records are drawn together, each under its file's name. The page needs no network and no other file.
    """
    from npu_zoo.evaluation.plots.output import require_plot_place, write_html, write_png
    from npu_zoo.evaluation.plots.selection import read_given, select

    if png is None and page is None:
        raise UsageError("nothing is asked for; name a file: --png FILE, --html FILE, or both")
    if png == page:
        raise UsageError(f"--png and --html name the same file, {png}; name two")
    for path in filter(None, (png, page)):
        require_plot_place(path)
    given = read_given(records)
    charts, left_out = select(given)
    for text in left_out:
        note(text)
    if png:
        write_png(charts, png)
        note(f"wrote {png}")
    if page:
        write_html(given, charts, page)
        note(f"wrote {page}")
