"""The feature matrix as Markdown and data. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import Conflict, Denial, FeatureRow, joined
from npu_zoo.core.specs import FamilySpec, VariantSpec

USUAL: dict[str, tuple[Any, ...]] = {
    "parallelism": ("tp",),
    "quantization": ("none",),
    "kv_cache_dtype": ("auto",),
    "long_sequence": (False,),
    "serving": ("offline",),
}
"""What axes have where nothing is said of them."""

_COLUMNS = ("sizes", "hardware", "dtype", "world_size", "attention", *USUAL, "source", "status", "evidence")


@dataclass(frozen=True)
class MatrixPart:
    """A family's rows, denials and conflicts, or one variant's.

    Attributes:
        stale: digests (:func:`npu_zoo.core.evidence.row_digest`) that records have of rows which they no longer prove,
            since the code or the row is another one today.
    """

    family: FamilySpec
    variant: VariantSpec | None
    rows: tuple[FeatureRow, ...]
    denials: tuple[Denial, ...]
    stale: frozenset[str] = frozenset()

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """Pairs of values that exclude each other."""
        return self.family.conflicts

    @property
    def name(self) -> str:
        """``family`` or ``family:variant``."""
        return f"{self.family.name}:{self.variant.name}" if self.variant else self.family.name

    @property
    def sizes(self) -> list[str]:
        """The sizes that its rows may speak of, in the order of the variants."""
        return [self.variant.size] if self.variant else list(dict.fromkeys(v.size for v in self.family.variants))

    @property
    def sources(self) -> list[str]:
        """Every source, in the order of first mention; a table cites them by number."""
        return list(dict.fromkeys([r.source for r in self.rows] + [d.source for d in self.denials]))

    @property
    def columns(self) -> list[str]:
        """The columns in which some row differs from the usual, and those that always count."""
        return [c for c in _COLUMNS if c not in USUAL or any(tuple(r.values(c)) != USUAL[c] for r in self.rows)]

    @property
    def usual(self) -> str:
        """What all rows share on the axes that have no column."""
        hidden = [axis for axis in USUAL if axis not in self.columns]
        return joined(f"{axis} {joined(USUAL[axis])}" for axis in hidden)

    @property
    def lists(self) -> list[tuple[str, list[str]]]:
        """What stands below its table, each list with its title; none is empty."""
        kinds: tuple[tuple[str, Callable[[MatrixPart], list[str]]], ...] = (
            ("The sources say no to", denial_lines),
            ("Exclude each other", conflict_lines),
            ("Notes", note_lines),
        )
        return [(title, lines(self)) for title, lines in kinds if lines(self)]

    def cells(self, row: FeatureRow, columns: Sequence[str]) -> list[str]:
        """A row as a table shows it."""
        return [self.cell(row, column) for column in columns]

    def cell(self, row: FeatureRow, column: str) -> str:
        """A row's cell as text; its source is a number."""
        if column == "source":
            return f"[{self.sources.index(row.source) + 1}]"
        if column == "evidence":
            return evidence_text(row, stale=self.is_stale(row))
        value = getattr(row, column)
        return joined(value) if isinstance(value, tuple) else str(value)

    def is_stale(self, row: FeatureRow) -> bool:
        """Whether what proved a row speaks of other code than today's."""
        return row_digest(row) in self.stale

    def data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "family": self.family.name,
            "variant": self.variant.name if self.variant else None,
            "title": self.family.title,
            "rows": [row.model_dump(mode="json") for row in self.rows],
            "stale_rows": [number for number, row in enumerate(self.rows, 1) if self.is_stale(row)],
            "denials": [denial.model_dump(mode="json") for denial in self.denials],
            "conflicts": [conflict.model_dump(mode="json") for conflict in self.conflicts],
        }


def part_of(family: FamilySpec, variant: VariantSpec | None, stale: Iterable[EvidenceRecord] = ()) -> MatrixPart:
    """The part of a family's matrix that speaks of a variant's size, or all of it.

    Args:
        stale: the family's records that no longer prove anything.
    """
    digests = frozenset(record.row for record in stale)
    if variant is None:
        return MatrixPart(family, None, family.rows, family.denials, digests)
    denials = tuple(denial for denial in family.denials if variant.size in denial.sizes)
    return MatrixPart(family, variant, family.matrix.of_size(variant.size), denials, digests)


def evidence_text(row: FeatureRow, *, stale: bool) -> str:
    """How far a row is proven, with which world sizes where it has others too, and whether that still holds."""
    some = row.evidence_devices not in ((), row.world_size)
    level = f"{row.evidence} on {joined(row.evidence_devices)}" if some else row.evidence
    return f"{level} (stale)" if stale and row.evidence != "claimed" else level


def denial_lines(part: MatrixPart) -> list[str]:
    """What the sources say no to, one sentence each."""
    lines = []
    for denial in part.denials:
        where = f" on {joined(denial.hardware)}" if denial.hardware else ""
        reason = f" ({denial.reason})" if denial.reason else ""
        number = part.sources.index(denial.source) + 1
        lines.append(f"{denial.axis} {joined(denial.values)}: no, for {joined(denial.sizes)}{where}{reason} [{number}]")
    return lines


def conflict_lines(part: MatrixPart) -> list[str]:
    """The pairs of values that exclude each other, one sentence each."""
    return [
        f"{c.first[0]}={joined([c.first[1]])} excludes {c.second[0]}={joined([c.second[1]])}: {c.reason}"
        for c in part.conflicts
    ]


def note_lines(part: MatrixPart) -> list[str]:
    """What single rows have to say beside their cells."""
    copied = [f"{joined(row.sizes)} on {joined(row.hardware)}" for row in part.rows if row.replicated_kv_heads]
    notes = [f"{joined(row.sizes)} on {joined(row.hardware)}: {row.note}" for row in part.rows if row.note]
    lost = part.stale - {row_digest(row) for row in part.family.rows}
    if lost:
        notes.append(
            f"{len(lost)} evidence records speak of rows that are no longer there; `npu-zoo validate` names them"
        )
    if copied:
        listed = "; ".join(dict.fromkeys(copied))
        notes.append(f"key-value heads are copied where tensor parallel exceeds them: {listed}")
    return notes


def markdown(parts: Sequence[MatrixPart]) -> str:
    """A section a part: a table, what the sources deny, conflicts, notes, sources."""
    return "\n".join(_markdown_part(part) for part in parts)


def _markdown_part(part: MatrixPart) -> str:
    columns = part.columns
    lines = [f"## {part.family.title} (`{part.name}`)", ""]
    lines += ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in part.cells(r, columns)) + " |" for r in part.rows]
    if part.usual:
        lines += ["", f"All rows: {part.usual}."]
    for title, found in part.lists:
        lines += ["", f"{title}:", "", *(f"- {line}" for line in found)]
    lines += ["", "Sources:", "", *(f"{number}. {source}" for number, source in enumerate(part.sources, 1))]
    return "\n".join(lines) + "\n"
