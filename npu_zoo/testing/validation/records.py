"""Evidence records out of outcomes: of each row all of whose combinations agreed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from npu_zoo.checkpoint import read_config
from npu_zoo.core.errors import UsageError
from npu_zoo.core.evidence import EvidenceRecord, read_records, row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.request import bundled_directory
from npu_zoo.testing.evidence import current_code
from npu_zoo.testing.files import write_whole
from npu_zoo.testing.shapes import rank_shape
from npu_zoo.testing.simulation import record_of, variant_of
from npu_zoo.testing.validation.claims import Outcome
from npu_zoo.testing.validation.scope import Part

FILE = "evidence.json"
SHOWN = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Hyperparameters that a record shows."""

CITED = "cited"
"""Names in a record's shape the commands whose results it cites; records that validation made have no such entry."""

_OWN = ("cell", "devices")
"""Figures that say what ran, and are none of the record's."""

MadeLevel = Literal["simulated", "measured"]


@dataclass(frozen=True)
class Written:
    """A family's file of records.

    Attributes:
        made: rows that have a new record.
        failed: rows that lost theirs, or have none, since something of them failed.
    """

    file: Path
    made: int
    failed: int


def write_records(
    parts: Iterable[Part],
    outcomes: Sequence[Outcome],
    level: MadeLevel,
    folder: Path | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[Written]:
    """Write each family's records: new ones of the rows that ran, and those that it has of others.

    Args:
        outcomes: those of the level; rows of which some could not be told keep what they have, unless others failed.
        folder: gets ``FAMILY.json``; where it is left out, the file beside the family's plugin is replaced.
        versions: of the hardware and its software, where they took part.

    Raises:
        UsageError: the plugin's folder cannot be written to.
    """
    written = []
    for part in parts:
        for family in part.families:
            of_family = [outcome for outcome in outcomes if outcome.subject.family == family.name]
            if any(outcome.status != "skipped" for outcome in of_family):
                written.append(_write_family(part, family, of_family, level, folder, versions))
    return written


def _write_family(
    part: Part,
    family: FamilySpec,
    outcomes: Sequence[Outcome],
    level: MadeLevel,
    folder: Path | None,
    versions: Mapping[str, str] | None,
) -> Written:
    file = record_file(part, family, folder)
    code, made, ran = current_code(family, part.record), [], set()
    for _, row in part.rows(family):
        number = part.subject(family, row).row
        of_row = [outcome for outcome in outcomes if outcome.subject.row == number]
        found = {outcome.status for outcome in of_row}
        if found == {"holds"}:
            made.append(_record(family, row, of_row, code, level, versions))
        if found == {"holds"} or "fails" in found:  # of a row that is told in part nothing is known
            ran.add(row_digest(row))

    def replaced(record: EvidenceRecord) -> bool:
        cited = CITED in record.shape and record.code == code
        return record.level == level and record.row in ran and not cited

    put_records(part, family, made, replaced, file)
    return Written(file, len(made), len(ran) - len(made))


def put_records(
    part: Part,
    family: FamilySpec,
    made: Iterable[EvidenceRecord],
    replaced: Callable[[EvidenceRecord], bool],
    file: Path,
) -> None:
    """Write a family's new records to a file, beside what it holds already.

    Args:
        replaced: whether one of the family's earlier records goes; those of rows that are no more go in any case.
    """
    before = read_records(file)
    kept = [record for record in before if record.family == family.name and not replaced(record)]
    known = {row_digest(row): number for number, row in part.rows(family)}
    own = sorted((r for r in (*kept, *made) if r.row in known), key=lambda r: (known[r.row], r.level))
    records = [*(record for record in before if record.family != family.name), *own]
    write_whole(file, json.dumps([record.model_dump(mode="json") for record in records], indent=2) + "\n")


def _record(
    family: FamilySpec,
    row: FeatureRow,
    outcomes: Sequence[Outcome],
    code: str,
    level: MadeLevel,
    versions: Mapping[str, str] | None,
) -> EvidenceRecord:
    variant = variant_of(family, row)
    assert variant is not None  # it ran
    config = _what_ran(variant)
    shape: dict[str, int | float | str] = {"variant": variant.name, **{name: getattr(config, name) for name in SHOWN}}
    shape["devices"] = max(int(outcome.figures["devices"]) for outcome in outcomes)
    cells = {
        str(outcome.figures["cell"]): {
            name: float(value) for name, value in outcome.figures.items() if name not in _OWN
        }
        for outcome in outcomes
    }
    return record_of(family, row, shape, cells, code, level=level, versions=versions)


def _what_ran(variant: VariantSpec) -> ModelConfig:
    directory = bundled_directory(variant)
    if directory is not None:
        return ModelConfig.from_hf(read_config(directory))
    assert variant.config is not None
    return rank_shape(variant.config, Split())


def require_writable(parts: Iterable[Part], folder: Path | None = None) -> None:
    """Refuse what :func:`write_records` could not write to, before anything is run.

    Raises:
        UsageError: a folder cannot be written to, or a file in it holds no records; says what to do.
    """
    if folder:
        _make_writable(folder)
    for part in parts:
        for family in part.families:
            file = record_file(part, family, folder)
            try:
                read_records(file)
            except (OSError, ValueError):
                raise UsageError(f"{file} exists and holds no evidence records; remove it, or --evidence DIR") from None


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror or error}; name another: --evidence DIR") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written to; name another: --evidence DIR")


def record_file(part: Part, family: FamilySpec, folder: Path | None) -> Path:
    """Where a family's records go: ``FAMILY.json`` in a folder, or else the file beside its plugin.

    Raises:
        UsageError: no folder is given, and the plugin's cannot be told or written to.
    """
    return folder / f"{family.name}.json" if folder else evidence_file(part)


def evidence_file(part: Part) -> Path:
    """Where a plugin keeps its records: beside the module that its entry point names.

    Raises:
        UsageError: it cannot be told, or not be written to.
    """
    module = part.record.target.partition(":")[0]
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or not spec.origin:
        raise UsageError(f"where plugin {part.record.name} lies cannot be told; name a folder: --evidence DIR")
    folder = Path(spec.origin).parent
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder}, where plugin {part.record.name} lies, cannot be written to: --evidence DIR")
    return folder / FILE
