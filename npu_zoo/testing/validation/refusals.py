"""The combinations beside a row's: whether each is accepted or refused as it should be, and for the axis to blame.

A neighbour differs from a combination of the row on one axis; world size and layout depend on each other and count as
one, the split. What is offered is told by the family's truth table, or else by the product of its rows' sets; neither
asks :meth:`FeatureMatrix.check`. Axes are judged in their order, and that says whom a refusal has to name:

- the changed axis and no other, where nothing that is offered has its value and the combination's on the axes before;
- else what is offered with that value lacks something on the axes behind: one or more of those, and no other;
- of a split its world size, its layout or both, and then what the layouts that are left may lack behind it;
- of another size that nothing is offered of, every axis.

Without ``allow_experimental`` an experimental row's own combinations are refused, and no axis is to blame for that of
their neighbours. Where the flag alone is missing, every reason names it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from npu_zoo.core.cells import Cell, Statement, is_conflicting, matrix_statement, row_cells, split_sizes
from npu_zoo.core.features import KINDS, Attention, AxisValue, FeatureRow, Verdict, splits_of
from npu_zoo.core.hardware import DTYPES, PRODUCTS
from npu_zoo.core.specs import FamilySpec
from npu_zoo.core.truth import read_truth
from npu_zoo.registry import Registry, get_registry

NEIGHBOURS: tuple[str, ...] = Cell._fields
"""On what a neighbour may differ: the size, or one of the axes in their order."""

_WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
_SPLIT = ("parallelism", "world_size")
_FLAG = "--allow-experimental"
_ITSELF = "none"


@dataclass(frozen=True)
class Fault:
    """A combination that is refused or accepted against what is stated, or refused for the wrong reason.

    Attributes:
        row: the number of the row that it is a neighbour of, from 0.
        axis: the one that was changed; ``none`` for a combination of the row itself.
        kind: what is wrong, the same for all faults of its kind.
        message: the same of this combination.
    """

    row: int
    axis: str
    kind: str
    message: str


def row_refusals(
    family: FamilySpec, number: int, registry: Registry | None = None, axes: Collection[str] = NEIGHBOURS
) -> tuple[int, list[str]]:
    """Ask for a row's combinations and for their neighbours.

    Args:
        number: of the row, from 0.
        registry: whose quantization methods are asked for too; this process's by default.
        axes: those of :data:`NEIGHBOURS` to change.

    Returns:
        How many requests were checked, and what is wrong, one line for each kind of fault and axis.
    """
    asked, found = 0, list[Fault]()
    for fault in check_row(family, number, registry, axes):
        asked += 1
        found += [fault] if fault else []
    alike: dict[tuple[str, str], list[Fault]] = {}
    for fault in found:
        alike.setdefault((fault.axis, fault.kind), []).append(fault)
    return asked, [_told(faults) for faults in alike.values()]


def refusal_faults(family: FamilySpec, registry: Registry | None = None) -> list[Fault]:
    """Every fault of every row of a family."""
    numbers = range(len(family.rows))
    return [fault for number in numbers for fault in check_row(family, number, registry) if fault]


def check_row(
    family: FamilySpec, number: int, registry: Registry | None = None, axes: Collection[str] = NEIGHBOURS
) -> Iterator[Fault | None]:
    """What each request has shown: first those of the row's combinations, then those of their neighbours."""
    judge, bases = _Judge(family), list(_bases(family.rows[number]))
    known = known_values(family, registry or get_registry())
    neighbours = (found for axis in axes for found in _neighbours(bases, axis, known[axis]))
    for asked in itertools.chain(((base, base, _ITSELF) for base in bases), neighbours):
        for experimental in (False, True):
            yield _fault(number, judge, _Question(*asked, experimental))


def _fault(number: int, judge: _Judge, asked: _Question) -> Fault | None:
    wrong = judge.wrong(asked)
    if not wrong:
        return None
    return Fault(number, asked.axis, wrong, f"{judge.family.name}:{asked.cell.size}: {asked.cell.describe()}: {wrong}")


def known_values(family: FamilySpec, registry: Registry) -> dict[str, tuple[AxisValue | tuple[int, ...], ...]]:
    """By axis, every value that there is: the products, what plugins register, and what any row of the family names."""
    registered = {
        "hardware": tuple(PRODUCTS),
        "dtype": DTYPES,
        "attention": get_args(Attention),
        "quantization": ("none", "sparse", *registry.quantization_methods),
        "kv_cache_dtype": ("auto", "int8"),
        "long_sequence": (False, True),
        "serving": ("offline", "mindie_service", "tgi"),
    }
    named = {axis: [value for row in family.rows for value in row.values(axis)] for axis in registered}
    values = {axis: tuple(dict.fromkeys((*registered[axis], *named[axis]))) for axis in registered}
    sizes = tuple(dict.fromkeys(variant.size for variant in family.variants))
    return {"size": sizes, **values, "split": _known_splits()}


class _Offers:
    """What is offered, told without the matrix."""

    def __init__(self, statement: Statement) -> None:
        self._cells = {flag: _offered(statement, flag) for flag in (False, True)}
        self._beginnings = {
            flag: {cell[:end] for cell in cells for end in range(1, len(Cell._fields) + 1)}
            for flag, cells in self._cells.items()
        }

    def holds(self, cell: Cell, experimental: bool) -> bool:
        return cell in self._cells[experimental]

    def begins(self, cell: Cell, axis: str, experimental: bool) -> bool:
        """Whether something that is offered has the cell's values up to an axis and on it."""
        return cell[: Cell._fields.index(axis) + 1] in self._beginnings[experimental]


@functools.cache
def _offers_of(truth: str) -> _Offers:
    return _Offers(read_truth(truth).statement)


def _offered(statement: Statement, experimental: bool) -> frozenset[Cell]:
    stated = statement.cells.items()
    return frozenset(cell for cell, terms in stated if experimental or any(t.status == "supported" for t in terms))


@dataclass(frozen=True)
class _Question:
    """A combination that is asked for, and the one of the row that it differs from on an axis."""

    base: Cell
    cell: Cell
    axis: str
    experimental: bool

    @property
    def flag(self) -> str:
        return f" with {_FLAG}" if self.experimental else ""


class _Judge:
    """A family's matrix and what it is held against."""

    def __init__(self, family: FamilySpec) -> None:
        self.family, self.matrix = family, family.matrix
        self.offers = _offers_of(family.truth) if family.truth else _Offers(matrix_statement(family))
        self.held_against = "its truth table" if family.truth else "what its rows multiply out to"

    def wrong(self, asked: _Question) -> str:
        """What is wrong with the answer to a question; empty where nothing is."""
        cell, experimental = asked.cell, asked.experimental
        verdict, offered = self._check(cell, experimental), self.offers.holds(cell, experimental)
        if verdict.supported:
            return "" if offered else f"is accepted{asked.flag}, and {self.held_against} does not offer it"
        if offered:
            return f"is refused{asked.flag}, and {self.held_against} offers it"
        if self.offers.holds(cell, True):
            silent = [reason.axis for reason in verdict.reasons if _FLAG not in reason.message]
            return f"is experimental, and the refusal of {', '.join(silent)} does not name {_FLAG}" if silent else ""
        judged = asked.axis != _ITSELF and self.offers.holds(asked.base, experimental)
        return self._misnamed(asked, verdict) if judged and not is_conflicting(self.family, cell) else ""

    def _check(self, cell: Cell, experimental: bool) -> Verdict:
        model = f"{self.family.name}:{cell.size}"
        return self.matrix.check(model, cell.size, cell.request, allow_experimental=experimental, alternatives=False)

    def _misnamed(self, asked: _Question, verdict: Verdict) -> str:
        """How a refusal names other axes than those to blame."""
        axis, named = asked.axis, {"split" if r.axis in _SPLIT else r.axis for r in verdict.reasons}
        behind = set(NEIGHBOURS[NEIGHBOURS.index(axis) + 1 :])
        if self.offers.begins(asked.cell, axis, asked.experimental):
            blamed, right = f"an axis behind {axis}", bool(named) and named <= behind
        elif axis == "size":
            blamed, right = "every axis", named == behind
        elif axis == "split":
            blamed, right = "its split", axis in named and named - {axis} <= behind
        else:
            blamed, right = f"{axis} alone", named == {axis}
        return "" if right else f"is refused for {', '.join(sorted(named)) or 'nothing'}, and to blame is {blamed}"


def _bases(row: FeatureRow) -> Iterator[Cell]:
    """Combinations of a row: each of its values with each of its sizes and products, not all with all."""
    places, others = _columns(row)
    most = max(map(len, others), default=0)
    for number, place in enumerate(places):
        turns = (
            [values[(turn + number * shift) % len(values)] for shift, values in enumerate(others, 1)]
            for turn in range(most)
        )
        yield from dict.fromkeys(Cell._make((*place, *chosen)) for chosen in turns)


def _columns(row: FeatureRow) -> tuple[list[tuple[Any, ...]], list[list[Any]]]:
    """The sizes and products that a row offers something for, and its values by axis."""
    columns: list[list[Any]] = [list(dict.fromkeys(column)) for column in zip(*row_cells(row), strict=True)]
    return list(itertools.product(*columns[:2])), columns[2:]


def _neighbours(bases: Iterable[Cell], axis: str, known: Iterable[Any]) -> Iterator[tuple[Cell, Cell, str]]:
    """A combination, a neighbour of it and the axis on which they differ.

    Splits are many: each is asked once for each size and product, the values of other axes once for each combination.
    """
    pairs: Iterable[tuple[Cell, Any]] = itertools.product(bases, known)
    if axis == "split":
        places = (list(group) for _, group in itertools.groupby(bases, lambda cell: cell[:2]))
        pairs = (pair for place in places for pair in zip(itertools.cycle(place), known, strict=False))
    for base, value in pairs:
        if getattr(base, axis) != value:
            yield base, base._replace(**{axis: value}), axis


@functools.cache
def _known_splits() -> tuple[tuple[int, ...], ...]:
    """Of every layout and world size the first split and the last."""
    kinds = [chosen for count in range(1, len(KINDS) + 1) for chosen in itertools.combinations(KINDS, count)]
    splits = (splits_of("+".join(chosen), world) for world in _WORLD_SIZES for chosen in kinds)
    return tuple(dict.fromkeys(split_sizes(split) for found in splits for split in (*found[:1], *found[-1:])))


def _told(faults: Sequence[Fault]) -> str:
    more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
    return f"{faults[0].message}{more}"
