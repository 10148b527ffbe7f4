"""The feature matrix as one web page that needs no network: filters, a grid of cells, and what is behind each of them.

The page's own files lie beside this module: ``page.html`` is the frame, ``rules.js`` what the matrix answers to a
request that leaves axes open, ``page.js`` what is shown of it. Without JavaScript its tables are still there.
"""

from __future__ import annotations

import importlib.resources
import json
import string
from collections.abc import Collection, Sequence
from typing import Any

from npu_zoo.cli.matrix_page.data import page_data
from npu_zoo.cli.matrix_page.tables import tables
from npu_zoo.matrix_text import MatrixPart

__all__ = ["page"]


def page(parts: Sequence[MatrixPart], stale: Collection[tuple[str, str]] = ()) -> str:
    """The page as HTML.

    Args:
        parts: what it shows.
        stale: family names and digests of rows (:func:`npu_zoo.core.evidence.row_digest`) with records that no longer
            speak of the code at hand.
    """
    return string.Template(_file("page.html")).substitute(
        style=_file("page.css"),
        tables=tables(parts, stale),
        data=_json(page_data(parts, stale)),
        rules=_file("rules.js"),
        script=_file("page.js"),
    )


def _file(name: str) -> str:
    return (importlib.resources.files(__name__) / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that no reader of HTML can take for the end of its element, or for a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
