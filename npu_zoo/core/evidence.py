"""Evidence records: what proves a matrix row, and when a record no longer speaks of the code at hand."""

from __future__ import annotations

import ast
import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from npu_zoo.core.features import EvidenceLevel, FeatureRow


class EvidenceRecord(BaseModel):
    """One run that proves a row above the level of a claim.

    Attributes:
        row: :func:`row_digest` of the row that it proves.
        level: ``simulated`` (the NPU code path ran on the simulated runtime) or ``measured`` (ran on that hardware).
        date: ISO date of the run.
        shape: what ran, such as hidden size, heads per rank, head_dim, layers, lengths.
        versions: SoC, CANN, torch, torch_npu, npu_zoo, as far as they took part.
        figures: what was measured, with the unit in the name.
        code: :func:`code_digest` of the files that the claim rests on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    row: str
    level: Literal["simulated", "measured"]
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    shape: dict[str, int | float | str]
    versions: dict[str, str]
    figures: dict[str, float] = Field(default_factory=dict)
    code: str


def row_digest(row: FeatureRow) -> str:
    """A digest of everything a row claims; its status, evidence and note are not part of the claim."""
    claim = row.model_dump_json(exclude={"status", "evidence", "evidence_devices", "note"})
    return hashlib.sha256(claim.encode()).hexdigest()[:16]


def code_digest(files: Iterable[Path], digest_of: Callable[[bytes], str] | None = None) -> str:
    """A digest of Python files by their syntax trees, the same under every Python version.

    Comments, formatting and docstrings do not change it; a changed statement does.

    Args:
        digest_of: gives :func:`source_digest` of a file's content, from a memory of its own.

    Raises:
        OSError: a file cannot be read.
        SyntaxError: a file is not Python.
    """
    sources = sorted((path.name, (digest_of or source_digest)(path.read_bytes())) for path in files)
    return hashlib.sha256("\0".join(itertools.chain.from_iterable(sources)).encode()).hexdigest()[:16]


def source_digest(source: bytes) -> str:
    """A digest of one file's syntax tree.

    Raises:
        SyntaxError: it is not Python.
    """
    tree = ast.parse(source)
    _strip_docstrings(tree)
    return hashlib.sha256(_dump(tree).encode()).hexdigest()


def read_records(file: Path) -> tuple[EvidenceRecord, ...]:
    """The records in a JSON file, a list of objects; none where it does not exist.

    Raises:
        ValueError: it holds anything else.
    """
    if not file.exists():
        return ()
    return tuple(TypeAdapter(list[EvidenceRecord]).validate_json(file.read_bytes()))


def proven(rows: Iterable[FeatureRow], records: Iterable[EvidenceRecord]) -> tuple[FeatureRow, ...]:
    """Rows with the level that their records give them; whether a record is stale is for CI to see."""
    by_row: dict[str, list[EvidenceRecord]] = {}
    for record in records:
        by_row.setdefault(record.row, []).append(record)
    return tuple(_proven(row, by_row.get(row_digest(row), [])) for row in rows)


def _proven(row: FeatureRow, records: list[EvidenceRecord]) -> FeatureRow:
    if not records:
        return row
    level = "measured" if any(record.level == "measured" for record in records) else "simulated"
    devices = {record.shape.get("devices") for record in records if record.level == level}
    sizes = sorted(size for size in devices if isinstance(size, int))
    return row.model_copy(update={"evidence": level, "evidence_devices": tuple(sizes)})


def evidence_level(row: FeatureRow, records: Iterable[EvidenceRecord], code: str) -> tuple[EvidenceLevel, bool]:
    """The highest level that the records prove for a row, and whether a record for it has gone stale.

    Args:
        row: the row in question.
        records: all records of its family.
        code: today's :func:`code_digest` of the files that the row rests on.
    """
    of_row = [record for record in records if record.row == row_digest(row)]
    fresh = {record.level for record in of_row if record.code == code}
    level: EvidenceLevel = "measured" if "measured" in fresh else "simulated" if fresh else "claimed"
    return level, any(record.code != code for record in of_row)


def _dump(value: Any) -> str:
    # Unlike ast.dump, whose text changed in 3.12 and 3.13: what is absent or empty is left out.
    if isinstance(value, ast.AST):
        fields = [(name, getattr(value, name, None)) for name in value._fields]
        kept = [(n, v) for n, v in fields if isinstance(value, ast.Constant) or v not in (None, [])]
        return f"{type(value).__name__}({', '.join(f'{n}={_dump(v)}' for n, v in kept)})"
    return f"[{', '.join(map(_dump, value))}]" if isinstance(value, list) else repr(value)


def _strip_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
