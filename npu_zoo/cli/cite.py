"""``cite``: results as evidence of matrix rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npu_zoo.cli.output import print_table

if TYPE_CHECKING:
    from npu_zoo.evaluation.citing import Citation

INCOMPLETE = 1


def cite(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD…", help="Files that bench and eval wrote with --json.")
    ],
    evidence: Annotated[
        Path,
        typer.Option("--evidence", metavar="DIR", help="Write to FAMILY.json in this folder. Default: evidence."),
    ] = Path("evidence"),
) -> None:
    """Cite results of bench and eval as evidence that rows were measured.

    A row is measured on a product and a number of devices once there are records of all of its combinations there, as
    with validate --measure. Records of simulated devices, of other code than that at hand or of rows that are no more
    are refused. The exit code is 1 where combinations of a row are missing, which are named.
    """
    from npu_zoo.evaluation.citing import cite as cite_records
    from npu_zoo.registry import get_registry

    citations = cite_records(records, get_registry(), evidence)
    print_table(("row", "on", "devices", "combinations", "evidence"), map(_row, citations))
    if any(citation.missing for citation in citations):
        raise typer.Exit(INCOMPLETE)


def _row(citation: Citation) -> tuple[str, ...]:
    place, cells = citation.place, len(citation.cells)
    found = cells - len(citation.missing)
    told = str(citation.file) if citation.file else f"none; missing: {', '.join(citation.missing)}"
    row = f"{place.family} row {citation.row}: {citation.description}"
    return (row, place.hardware, str(place.devices), f"{found} of {cells}", told)
