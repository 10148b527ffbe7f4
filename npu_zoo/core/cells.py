"""Combinations: what the rows of a matrix, or any other statement of what is offered, multiply out to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from npu_zoo.core.features import KINDS, AxisValue, Denial, FeatureRow, Status, layout_names, splits_of
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec

FEATURES: tuple[str, ...] = ("dtype", "attention", "quantization", "kv_cache_dtype", "long_sequence", "serving")
"""The axes that say neither where a model runs nor on how many devices."""

USUAL: dict[str, AxisValue] = {
    "quantization": "none",
    "kv_cache_dtype": "auto",
    "long_sequence": False,
    "serving": "offline",
}
"""The value that is meant where an axis is not spoken of."""

Box = tuple[tuple[Any, ...], ...]
"""Values by position: all combinations of them."""


class Cell(NamedTuple):
    """One combination. The axes stand in the order in which a refusal narrows them.

    Attributes:
        split: the sizes of :data:`~npu_zoo.core.features.KINDS`: world size and layout in one.
    """

    size: str
    hardware: str
    dtype: AxisValue
    split: tuple[int, ...]
    attention: AxisValue
    quantization: AxisValue
    kv_cache_dtype: AxisValue
    long_sequence: AxisValue
    serving: AxisValue

    @property
    def request(self) -> dict[str, AxisValue | tuple[AxisValue, ...]]:
        """What asks a matrix for it."""
        split, values = Split(*self.split), self._asdict()
        axes = {axis: values[axis] for axis in ("hardware", *FEATURES)}
        return {**axes, "world_size": split.world_size, "parallelism": layout_names(split)}

    def describe(self) -> str:
        """Such as ``atlas_800i_a2; float16; tp4; paged``; what is usual is left out."""
        return describe_box(tuple((value,) for value in self))


class Terms(NamedTuple):
    """What goes with a combination: whether a flag is needed, who says so, and what of it is derived."""

    status: Status
    source: str
    derived: tuple[str, ...]
    replicated_kv_heads: bool


class Denied(NamedTuple):
    """One value to which a source says no; ``hardware`` is empty where that is a product itself."""

    size: str
    hardware: str
    axis: str
    value: AxisValue
    source: str


@dataclass(frozen=True)
class Statement:
    """All that a matrix or a table says; a combination that it offers several times has terms for each.

    What a source says of a product that it denies altogether is left out.
    """

    cells: Mapping[Cell, tuple[Terms, ...]]
    denials: frozenset[Denied]

    @classmethod
    def of(cls, cells: Iterable[tuple[Cell, Terms]], denials: Iterable[Denied]) -> Statement:
        """All that is said one by one."""
        offered: dict[Cell, tuple[Terms, ...]] = {}
        for cell, terms in cells:
            offered[cell] = (*offered.get(cell, ()), terms)
        every = set(denials)
        products = {(denied.size, denied.value) for denied in every if denied.axis == "hardware"}
        return cls(offered, frozenset(d for d in every if (d.size, d.hardware) not in products))


def matrix_statement(family: FamilySpec) -> Statement:
    """What a family's rows and denials say, multiplied out row by row; no request is checked for it."""
    cells = (
        (cell, terms)
        for row, terms in zip(family.rows, map(_terms, family.rows), strict=True)
        for cell in row_cells(row)
        if not (family.conflicts and is_conflicting(family, cell))
    )
    return Statement.of(cells, (denied for denial in family.denials for denied in _denied(denial)))


@functools.lru_cache(maxsize=256)
def row_cells(row: FeatureRow) -> tuple[Cell, ...]:
    """Every combination that a row offers; one that two of its layouts make is there twice."""
    splits = [split for world in row.world_size for layout in row.parallelism for split in splits_of(layout, world)]
    features = (row.values(axis) for axis in FEATURES[1:])
    values = (row.sizes, row.hardware, row.dtype, map(split_sizes, splits), *features)
    return tuple(itertools.starmap(Cell, itertools.product(*values)))


def _terms(row: FeatureRow) -> Terms:
    return Terms(row.status, row.source, tuple(sorted(row.derived)), row.replicated_kv_heads)


def split_sizes(split: Split) -> tuple[int, ...]:
    """Its sizes in the order of :data:`~npu_zoo.core.features.KINDS`."""
    return tuple(int(getattr(split, kind)) for kind in KINDS)


def is_conflicting(family: FamilySpec, cell: Cell) -> bool:
    """Whether two of a combination's values exclude each other."""
    request = {axis: value[-1] if isinstance(value, tuple) else value for axis, value in cell.request.items()}
    return any(conflict.hits(request) for conflict in family.conflicts)


def boxes(combinations: Iterable[tuple[Any, ...]]) -> list[Box]:
    """The same combinations, told as a few products of values."""
    found: set[Box] = {tuple((value,) for value in combination) for combination in combinations}
    for position in reversed(range(max(map(len, found), default=0))):
        merged: dict[Box, set[Any]] = {}
        for box in found:
            merged.setdefault((*box[:position], *box[position + 1 :]), set()).update(box[position])
        found = {(*rest[:position], tuple(sorted(v, key=str)), *rest[position:]) for rest, v in merged.items()}
    return sorted(found, key=str)


def describe_box(box: Box) -> str:
    """Combinations of :class:`Cell` in words, without their sizes and what is usual."""
    named = zip(Cell._fields[1:], box[1:], strict=True)
    parts = [
        (f"{axis} " if axis in USUAL else "") + ", ".join(spell(axis, value) for value in values)
        for axis, values in named
        if axis not in USUAL or values != (USUAL[axis],)
    ]
    return "; ".join(parts)


def spell(axis: str, value: Any) -> str:
    """A value of an axis in words."""
    if axis == "split":
        return layout_names(Split(*value))[0]
    return str(value).lower() if isinstance(value, bool) else str(value)


def _denied(denial: Denial) -> Iterator[Denied]:
    places = ("",) if denial.axis == "hardware" else denial.hardware
    for size, place, value in itertools.product(denial.sizes, places, denial.values):
        yield Denied(size, place, denial.axis, value, denial.source)
