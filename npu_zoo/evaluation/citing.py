"""Results as evidence of the matrix rows that they ran under."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from npu_zoo.core.errors import UsageError
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import FeatureRow, layout_names, splits_of
from npu_zoo.core.specs import FamilySpec
from npu_zoo.evaluation.record import ModelUnderTest, ResultRecord, read_record
from npu_zoo.registry import Registry
from npu_zoo.testing.evidence import current_code
from npu_zoo.testing.simulation import Cell, measured_cells
from npu_zoo.testing.validation.records import CITED, put_records, record_file, require_writable
from npu_zoo.testing.validation.scope import Part, parts_of

_DAY = len("2026-01-01")


class Place(NamedTuple):
    """Where a row was measured: on so many devices of a product."""

    family: str
    row: str
    hardware: str
    devices: int


@dataclass(frozen=True)
class Source:
    """A record that can be cited, with the file that it is in."""

    path: Path
    record: ResultRecord
    model: ModelUnderTest

    @property
    def place(self) -> Place:
        """Where it ran."""
        model = self.model
        return Place(model.family, model.row, model.hardware, model.world_size)


@dataclass(frozen=True)
class Citation:
    """What some records say of a row in one place.

    Attributes:
        part: the plugin that brought the family.
        row: the row's number, from 1.
        cells: all combinations that the row offers there, by name with the records of each.
        file: where the evidence is written; None where combinations are missing.
    """

    place: Place
    part: Part
    row: int
    description: str
    cells: Mapping[str, Sequence[Source]]
    file: Path | None = None

    @property
    def missing(self) -> list[str]:
        """Combinations of which there is no record."""
        return [name for name, sources in self.cells.items() if not sources]


def cite(files: Sequence[Path], registry: Registry, folder: Path | None) -> list[Citation]:
    """Write evidence of the rows of which all combinations on a product and a number of devices have records.

    The rows of which some are missing stay as they are. The rule is that of ``npu-zoo validate --measure``.

    Args:
        folder: gets ``FAMILY.json``; where it is left out, the file beside the family's plugin is changed.

    Raises:
        UsageError: a record cannot be cited (all that cannot are named), or the evidence cannot be written.
    """
    sources = _sources(files, registry)
    citations = [_citation(place, of_place, registry) for place, of_place in _by_place(sources).items()]
    whole = [citation for citation in citations if not citation.missing]
    if whole:
        require_writable({citation.place.family: citation.part for citation in whole}.values(), folder)
    written = {citation.place: _write(citation, folder) for citation in whole}
    return [replace(citation, file=written.get(citation.place)) for citation in citations]


def _sources(files: Sequence[Path], registry: Registry) -> list[Source]:
    sources, refused = [], []
    for path in dict.fromkeys(files):
        record = read_record(path)
        reason = _why_not(record, registry)
        if record.model is None or reason:
            refused.append(f"{path} cannot be cited: {reason}")
        else:
            sources.append(Source(path, record, record.model))
    if refused:
        raise UsageError("\n".join(refused))
    return sources


def _why_not(record: ResultRecord, registry: Registry) -> str:
    """Why a record is no evidence of a row; empty where it is."""
    model = record.model
    if model is None:
        return f"npu-zoo {record.kind} ran no model of the zoo's own, so it is of no row"
    if model.simulated:
        return f"{model.hardware} was simulated, and a simulated device measures nothing"
    if model.family not in registry.families:
        return f"no model family is named '{model.family}'; families: {', '.join(registry.families) or 'none'}"
    family = registry.families[model.family]
    row = _row_of(family, model.row)
    if row is None:
        return f"{model.family} has no row {model.row} any more; run it again"
    code = current_code(family, registry.plugins[registry.owner(family.name)])
    if model.code != code:
        return f"it ran with code {model.code}, and that at hand is {code}; run it again"
    if not _cells_of(row, model):
        return f"{_combination(model)} is no combination of its row ({row.describe()})"
    return ""


def _row_of(family: FamilySpec, digest: str) -> FeatureRow | None:
    return next((row for row in family.rows if row_digest(row) == digest), None)


def _by_place(sources: Iterable[Source]) -> dict[Place, list[Source]]:
    found: dict[Place, list[Source]] = {}
    for source in sources:
        found.setdefault(source.place, []).append(source)
    return found


def _citation(place: Place, sources: Sequence[Source], registry: Registry) -> Citation:
    (part,) = parts_of(registry, families=[place.family])
    family = registry.families[place.family]
    row = _row_of(family, place.row)
    assert row is not None  # its sources were checked
    names = {id(source): {cell.name for cell in _cells_of(row, source.model)} for source in sources}
    cells = {cell.name: [source for source in sources if cell.name in names[id(source)]] for cell in _cells(row, place)}
    return Citation(place, part, part.subject(family, row).row, row.describe(), cells)


def _cells(row: FeatureRow, place: Place) -> list[Cell]:
    found = measured_cells(row, place.hardware, place.devices)
    return [cell for cell in found if cell.devices == place.devices]


def _cells_of(row: FeatureRow, model: ModelUnderTest) -> list[Cell]:
    """The row's combinations that a run was of; more than one where layouts of the row overlap."""
    place = Place(model.family, model.row, model.hardware, model.world_size)
    own = (model.dtype, model.attention, model.quantization, model.kv_cache_dtype)
    return [
        cell
        for cell in _cells(row, place)
        if (cell.dtype, cell.attention, cell.quantization, cell.kv_cache_dtype) == own
        and model.split in {layout_names(split)[0] for split in splits_of(cell.layout, cell.devices)}
    ]


def _combination(model: ModelUnderTest) -> str:
    return ", ".join(
        (model.hardware, model.dtype, model.attention, model.quantization, model.kv_cache_dtype, model.split)
    )


def _write(citation: Citation, folder: Path | None) -> Path:
    family = citation.part.registry.families[citation.place.family]
    record = _evidence(citation)
    file = record_file(citation.part, family, folder)
    try:
        put_records(citation.part, family, [record], functools.partial(_replaced, record), file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror or error}; name another: --evidence DIR") from None
    return file


def _replaced(new: EvidenceRecord, old: EvidenceRecord) -> bool:
    """Whether an earlier record of the same place goes; what validation measured stays."""
    if old.level != new.level or old.row != new.row or CITED not in old.shape:
        return False
    return old.code != new.code or all(old.shape.get(name) == new.shape[name] for name in ("hardware", "devices"))


def _evidence(citation: Citation) -> EvidenceRecord:
    sources = list({id(source): source for found in citation.cells.values() for source in found}.values())
    models = [source.model for source in sources]
    place = citation.place
    shape: dict[str, int | float | str] = {"variant": _joined(model.variant for model in models), **_shape(models)}
    shape |= {"hardware": place.hardware, "devices": place.devices}
    return EvidenceRecord(
        family=place.family,
        row=place.row,
        level="measured",
        date=max(source.record.date for source in sources)[:_DAY],
        shape={**shape, CITED: _joined(source.record.kind for source in sources)},
        versions=_versions(sources),
        figures=_figures(citation.cells),
        code=models[0].code,
    )


def _shape(models: Sequence[ModelUnderTest]) -> dict[str, int]:
    """The hyperparameters in which all runs were equal."""
    return {name: value for name, value in models[0].shape.items() if all(m.shape.get(name) == value for m in models)}


def _figures(cells: Mapping[str, Sequence[Source]]) -> dict[str, float]:
    """Figures by combination, command and name; of two runs of the same the later one's."""
    return {
        f"{cell}_{source.record.kind.replace(' ', '_')}_{name}": value
        for cell, sources in cells.items()
        for source in sorted(sources, key=lambda source: source.record.date)
        for name, value in source.record.figures.items()
    }


def _versions(sources: Sequence[Source]) -> dict[str, str]:
    """Of the software and devices of all runs; where they differ, each."""
    found: dict[str, list[str]] = {}
    for source in sources:
        machine = source.record.machine
        of_machine = {"cpu": machine.cpu, **machine.devices} if machine else {}
        for name, version in {**source.record.versions, **of_machine}.items():
            found.setdefault(name, []).append(version)
    return {name: _joined(versions) for name, versions in found.items()}


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))
