"""Truth tables: what a family's sources offer, written by hand, and where the family's matrix says anything else.

A table is laid out as the vendors' tables are: a line for each size, the splits under each product, yes or no under
each dtype, kind of attention and feature. That is another form than the rows', so that a slip is not made in both.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from npu_zoo.core.cells import (
    FEATURES,
    USUAL,
    Box,
    Cell,
    Denied,
    Statement,
    Terms,
    boxes,
    describe_box,
    matrix_statement,
    spell,
    split_sizes,
)
from npu_zoo.core.errors import PluginError, validation_lines
from npu_zoo.core.features import KINDS, Attention, AxisValue, FeatureRow, Status, layout_names, splits_of
from npu_zoo.core.hardware import PRODUCTS, DType
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec

_PART = re.compile(r"(tp|pp|ep|dp) (\d+(?:, \d+)*)")
_ALTERNATIVE = re.compile(rf"{_PART.pattern}(?: {_PART.pattern})*")


def _known_product(name: str) -> str:
    if name not in PRODUCTS:
        raise ValueError(f"unknown hardware {name}; known: {', '.join(PRODUCTS)}")
    return name


def _readable_splits(text: str) -> str:
    if text != "no":
        parse_splits(text)
    return text


Answer = Literal["yes", "no"]
ProductName = Annotated[str, AfterValidator(_known_product)]
Answers = Answer | dict[ProductName, Answer]
"""One answer for every product of a line, or one for each product that is spoken of."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Columns(_Frozen):
    """What stands in the columns of a line, or of every line of a table.

    Attributes:
        dtype, attention, quantization, kv_cache_dtype, long_sequence, serving: by value, whether the source offers it.
            A no is what the source denies; of what is not named it does not speak. Where no value of one of the last
            four has a yes the usual one is meant (:data:`npu_zoo.core.cells.USUAL`).
        derived: the axes whose values follow from the source without being stated in it.
        replicated_kv_heads: whether ranks may hold copies of key-value heads.
    """

    dtype: dict[DType, Answers] = Field(default_factory=dict)
    attention: dict[Attention, Answers] = Field(default_factory=dict)
    quantization: dict[str, Answers] = Field(default_factory=dict)
    kv_cache_dtype: dict[str, Answers] = Field(default_factory=dict)
    long_sequence: dict[Literal["true", "false"], Answers] = Field(default_factory=dict)
    serving: dict[str, Answers] = Field(default_factory=dict)
    derived: tuple[str, ...] = ()
    replicated_kv_heads: bool = False

    def answers(self, axis: str) -> dict[AxisValue, Answers]:
        """The answers on an axis, by value."""
        given: Mapping[str, Answers] = getattr(self, axis)
        return {value == "true" if axis == "long_sequence" else value: answer for value, answer in given.items()}


class Line(_Columns):
    """What one source says of sizes of a model.

    Attributes:
        sizes: those that it says the same of.
        hardware: by product ``no``, or the splits that it offers there: ``tp 1, 2, 4`` or ``tp 8; tp 8 ep 8``. Kinds
            that stand together multiply: ``tp 4 ep 2, 4`` are two splits of four ranks.
    """

    sizes: tuple[str, ...] = Field(min_length=1)
    hardware: dict[ProductName, Annotated[str, AfterValidator(_readable_splits)]] = Field(default_factory=dict)

    @property
    def splits(self) -> dict[str, tuple[Split, ...]]:
        """By product, what is offered there."""
        return {product: parse_splits(text) for product, text in self.hardware.items() if text != "no"}


class SourceTable(_Columns):
    """What one source says. What stands in the table itself goes for each line that says nothing else of the value.

    Attributes:
        source: the document, named as the rows name it; ``zoo`` for what this project adds.
        status: of all that it offers.
        about: where it stands there, and how contradictions were decided.
    """

    source: str
    status: Status = "supported"
    about: str = ""
    lines: tuple[Line, ...]

    @model_validator(mode="after")
    def _complete(self) -> SourceTable:
        for line, axis in itertools.product(self.lines, ("dtype", "attention")):
            empty = [product for product in line.splits if not self._offered(line, axis, product)]
            if empty:
                raise ValueError(f"{', '.join(line.sizes)} on {', '.join(empty)}: no {axis} is offered")
        return self

    def cells(self) -> Iterator[tuple[Cell, Terms]]:
        """Every combination that is offered."""
        for line in self.lines:
            derived = tuple(sorted({*self.derived, *line.derived}))
            terms = Terms(self.status, self.source, derived, line.replicated_kv_heads or self.replicated_kv_heads)
            for product, splits in line.splits.items():
                dtypes, *others = (self._offered(line, axis, product) for axis in FEATURES)
                sizes = map(split_sizes, splits)
                for values in itertools.product(line.sizes, (product,), dtypes, sizes, *others):
                    yield Cell._make(values), terms

    def denials(self) -> Iterator[Denied]:
        """Every value to which the source says no: on the products that it names, or else on those of the line."""
        for line in self.lines:
            for size, (product, text) in itertools.product(line.sizes, line.hardware.items()):
                if text == "no":
                    yield Denied(size, "", "hardware", product, self.source)
            for size, axis in itertools.product(line.sizes, FEATURES):
                for value, answer in self._answers(line, axis).items():
                    where = answer if isinstance(answer, dict) else dict.fromkeys(line.splits, answer)
                    yield from (Denied(size, p, axis, value, self.source) for p, word in where.items() if word == "no")

    def _answers(self, line: Line, axis: str) -> dict[AxisValue, Answers]:
        return {**self.answers(axis), **line.answers(axis)}

    def _offered(self, line: Line, axis: str, product: str) -> tuple[AxisValue, ...]:
        answers = self._answers(line, axis).items()
        found = (v for v, a in answers if (a.get(product) if isinstance(a, dict) else a) == "yes")
        return tuple(found) or ((USUAL[axis],) if axis in USUAL else ())


class TruthTable(_Frozen):
    """All that the sources of a family offer and deny, written by hand from them and never from the rows.

    Attributes:
        about: what the sources are, and what none of them says.
    """

    about: str
    tables: tuple[SourceTable, ...]

    @functools.cached_property
    def statement(self) -> Statement:
        """Every combination and every denial."""
        cells = (cell for table in self.tables for cell in table.cells())
        return Statement.of(cells, (denied for table in self.tables for denied in table.denials()))


@dataclass(frozen=True)
class Difference:
    """One thing in which a matrix and its table differ.

    Attributes:
        axis: what tells them apart: a field of :class:`~npu_zoo.core.cells.Cell` or of
            :class:`~npu_zoo.core.cells.Terms`, ``world_size``, ``parallelism``, ``rows`` or ``denials``.
    """

    sizes: tuple[str, ...]
    axis: str
    message: str

    def __str__(self) -> str:
        return self.message


@functools.cache
def read_truth(reference: str) -> TruthTable:
    """The table that ``package:file`` names.

    Raises:
        PluginError: there is no such file, or it holds anything else.
    """
    package, _, name = reference.partition(":")
    try:
        text = (importlib.resources.files(package) / name).read_text(encoding="utf-8")
        return TruthTable.model_validate_json(text)
    except ValidationError as error:
        raise PluginError("\n".join(validation_lines(error, reference))) from error
    except (OSError, ImportError, UnicodeDecodeError) as error:
        raise PluginError(f"cannot read the truth table {reference}: {error}") from error


def parse_splits(text: str) -> tuple[Split, ...]:
    """The splits that a line offers on a product; see :class:`Line`.

    Raises:
        ValueError: it is malformed, or names a split that no ranks can make.
    """
    found: list[Split] = []
    for alternative in text.split("; "):
        if not _ALTERNATIVE.fullmatch(alternative):
            raise ValueError(f"'{alternative}' names no splits; write them as 'tp 1, 2, 4; tp 8 ep 8'")
        parts = {kind: tuple(map(int, sizes.split(", "))) for kind, sizes in _PART.findall(alternative)}
        found += [Split(*sizes) for sizes in itertools.product(*(parts.get(kind, (1,)) for kind in KINDS))]
    for split in found:
        if 0 in split_sizes(split) or split.stage_size % split.ep:
            raise ValueError(f"no ranks make {layout_names(split)[0]}: sizes start at 1, and ep divides tp x dp")
    return tuple(found)


def differences(family: FamilySpec, truth: TruthTable) -> list[Difference]:
    """Where a family's matrix and its table differ, in words; empty where they say the same.

    A row's note and evidence are no part of either.
    """
    matrix, table = matrix_statement(family), truth.statement
    return [
        *_idle_values(family.rows),
        *_only_in(matrix.cells, table.cells, "the matrix offers {} and the table does not"),
        *_only_in(table.cells, matrix.cells, "the table offers {} and the matrix does not"),
        *_repeated(matrix.cells, "two rows, or two layouts of one, offer the same"),
        *_repeated(table.cells, "two lines of the table offer the same"),
        *_other_terms(matrix.cells, table.cells),
        *_only_denied_in(matrix.denials - table.denials, "the matrix quotes", "the table does not have"),
        *_only_denied_in(table.denials - matrix.denials, "the table has", "the matrix does not quote"),
    ]


def _idle_values(rows: Iterable[FeatureRow]) -> Iterator[Difference]:
    """World sizes and layouts that a row names and that come to nothing together."""
    for row in rows:
        named = f"{', '.join(row.sizes)}: a row on {', '.join(row.hardware)} names"
        made = {(world, layout) for world in row.world_size for layout in row.parallelism if splits_of(layout, world)}
        for world in set(row.world_size) - {world for world, _ in made}:
            yield Difference(row.sizes, "world_size", f"{named} world_size {world}, which none of its layouts makes")
        for layout in set(row.parallelism) - {layout for _, layout in made}:
            yield Difference(row.sizes, "parallelism", f"{named} layout {layout}, which none of its world sizes makes")


def _only_in(one: Mapping[Cell, Any], other: Mapping[Cell, Any], text: str) -> Iterator[Difference]:
    for box in boxes(one.keys() - other.keys()):
        axis = _telling_axis(box, other)
        values = box[Cell._fields.index(axis)]
        yield _difference(box, axis, text.format(f"{axis} {', '.join(spell(axis, value) for value in values)}"))


def _telling_axis(box: Box, others: Iterable[Cell]) -> str:
    """The first axis on which nothing of the others is left; none of them is in the box."""
    for position, axis in enumerate(Cell._fields[:-1]):
        others = [cell for cell in others if cell[position] in box[position]]
        if not others:
            return axis
    return Cell._fields[-1]


def _repeated(cells: Mapping[Cell, tuple[Terms, ...]], text: str) -> Iterator[Difference]:
    for box in boxes(cell for cell, terms in cells.items() if len(terms) > 1):
        yield _difference(box, "rows", text)


def _other_terms(
    matrix: Mapping[Cell, tuple[Terms, ...]], table: Mapping[Cell, tuple[Terms, ...]]
) -> Iterator[Difference]:
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in (cell for cell in matrix.keys() & table.keys() if matrix[cell] != table[cell]):
        for field, one, other in zip(Terms._fields, matrix[cell][0], table[cell][0], strict=True):
            if one != other:
                found.setdefault((field, _listed(one), _listed(other)), []).append(cell)
    for (field, one, other), cells in found.items():
        for box in boxes(cells):
            yield _difference(box, field, f"{field} is {one} in the matrix and {other} in the table")


def _listed(value: Any) -> str:
    return ", ".join(value) or "nothing" if isinstance(value, tuple) else str(value).lower()


def _only_denied_in(denials: frozenset[Denied], has: str, lacks: str) -> Iterator[Difference]:
    for sizes, hardware, axes, values, sources in boxes(denials):
        where = f" on {', '.join(hardware)}" if any(hardware) else ""
        what = f"{', '.join(axes)} {', '.join(spell('', value) for value in values)}{where}"
        text = f"{', '.join(sizes)}: {has} a no of {', '.join(sources)} to {what}, which {lacks}"
        yield Difference(sizes, "denials", text)


def _difference(box: Box, axis: str, text: str) -> Difference:
    return Difference(box[0], axis, f"{', '.join(box[0])}: {text} ({describe_box(box)})")
