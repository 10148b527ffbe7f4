"""The rows of the matrix as plain tables, with what the sources deny, conflicts, notes and sources below."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence

from npu_zoo.core.evidence import row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.matrix_text import MatrixPart


def tables(parts: Sequence[MatrixPart], stale: Collection[tuple[str, str]]) -> str:
    """A section a part, as HTML.

    Args:
        parts: what is shown.
        stale: family names and row digests whose records are stale.
    """
    return "\n".join(_section(part, stale) for part in parts)


def _section(part: MatrixPart, stale: Collection[tuple[str, str]]) -> str:
    title, name = html.escape(part.family.title), html.escape(part.name)
    head = "".join(f'<th scope="col">{html.escape(column.replace("_", " "))}</th>' for column in part.columns)
    rows = "\n".join(_row(part, row, (part.family.name, row_digest(row)) in stale) for row in part.rows)
    lists = "".join(f"<h4>{html.escape(title)}</h4>\n{_list('ul', found)}" for title, found in part.lists)
    usual = f"<p>All rows: {html.escape(part.usual)}.</p>\n" if part.usual else ""
    return (
        f"<section>\n<h3>{title} <code>{name}</code></h3>\n"
        f'<div class="scroll" role="region" tabindex="0" aria-label="Rows of {title}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n"
        f"{usual}{lists}<h4>Sources</h4>\n{_list('ol', part.sources)}</section>"
    )


def _row(part: MatrixPart, row: FeatureRow, stale: bool) -> str:
    cells = part.cells(row, part.columns)
    if stale:
        cells[part.columns.index("evidence")] += " (stale)"
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _list(kind: str, items: Sequence[str]) -> str:
    return f"<{kind}>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + f"</{kind}>\n"
