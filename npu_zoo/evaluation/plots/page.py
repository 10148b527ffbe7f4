"""One page with every chart and its numbers, which needs neither network nor other files."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from npu_zoo import __version__
from npu_zoo.evaluation.plots.charts import Chart
from npu_zoo.evaluation.plots.selection import Given

GENERATOR = "npu-zoo bench plot"
"""What a page says of where it is from."""

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?")
_RECORD_COLUMNS = ("record", "command", "date", "model", "machine", "versions")


def page(given: Sequence[Given], charts: Sequence[Chart], pictures: Iterable[str]) -> str:
    """The page as HTML.

    Args:
        pictures: the SVG element of each chart.
    """
    title = "Benchmarks: " + ", ".join(dict.fromkeys(one.record.kind for one in given))
    sections = [_section(chart, picture) for chart, picture in zip(charts, pictures, strict=True)]
    style = resources.files("npu_zoo.evaluation.plots").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="{GENERATOR}">',
            f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
            f"<h1>{html.escape(title)}</h1>",
            _table(_RECORD_COLUMNS, [_record_row(one) for one in given], f"Written by npu-zoo {__version__}."),
            *sections,
            "</body>\n</html>\n",
        ]
    )


def _section(chart: Chart, picture: str) -> str:
    name = html.escape(chart.title, quote=True)
    labelled = picture.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
    table = _table(chart.columns, chart.rows(), "")
    return (
        f"<section>\n<h2>{name}</h2>\n{labelled}\n<details open><summary>Numbers</summary>{table}</details>\n</section>"
    )


def _record_row(given: Given) -> tuple[str, ...]:
    record = given.record
    model, machine = record.model, record.machine
    ran = f"{model.name} in {model.dtype}, {model.split}" if model else ""
    on = f"{machine.hardware}, {machine.cpu}, {machine.cores} cores" if machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return (given.path.name, f"npu-zoo {record.kind}", record.date, ran, on, versions)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="number"' if _NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"
