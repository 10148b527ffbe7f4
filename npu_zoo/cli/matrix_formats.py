"""The feature matrix as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from npu_zoo.cli.output import print_fields, print_items, print_table
from npu_zoo.core.features import FeatureRow, joined
from npu_zoo.matrix_text import USUAL, MatrixPart


def print_tables(parts: Sequence[MatrixPart]) -> None:
    """Write every part as a table that fits the terminal; below it what the sources deny, conflicts, notes, sources."""
    for position, part in enumerate(parts):
        print(("\n" if position else "") + f"{part.name}: {part.family.title}")
        _print_rows(part)
        print()
        print_fields({"all rows:": _shared(part)})
        for title, found in part.lists:
            print()
            print_items(title, found)
        print()
        for number, source in enumerate(part.sources, 1):
            print(f"[{number}] {source}")


def _print_rows(part: MatrixPart) -> None:
    """The rows; what deviates from the usual shares one column, as a terminal is narrow."""
    columns = ["sizes", "hardware", "dtype", "world_size", "attention"][0 if part.variant is None else 1 :]
    rows = [[_short(cell) for cell in part.cells(row, columns)] for row in part.rows]
    if set(part.columns) & set(USUAL):
        columns.append("further")
        for cells, row in zip(rows, part.rows, strict=True):
            cells.append("\n".join(f"{axis.replace('_', ' ')} {part.cell(row, axis)}" for axis in _unusual(row)))
    columns.append("status")
    for cells, row in zip(rows, part.rows, strict=True):
        proven = "" if row.evidence == "claimed" else f" {part.cell(row, 'evidence')}"
        cells.append(f"{row.status}{proven} {part.cell(row, 'source')}")
    print_table([c.replace("_", " ") for c in columns], rows)


def _unusual(row: FeatureRow) -> list[str]:
    return [axis for axis, usual in USUAL.items() if tuple(row.values(axis)) != usual]


def _shared(part: MatrixPart) -> str:
    """What goes for every row, or for every row that does not say otherwise."""
    told = any(set(part.columns) & set(USUAL))
    usual = joined(f"{axis} {joined(value)}" for axis, value in USUAL.items())
    claims = "" if any(row.evidence != "claimed" for row in part.rows) else ", evidence claimed"
    return f"{usual}{', where no other is named' if told else ''}{claims}"


def _short(cell: str) -> str:
    """A cell with the short spellings of the dtypes, which every command takes too."""
    for name, short in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")):
        cell = cell.replace(name, short)
    return cell
