"""Change every cell of every built-in matrix, one at a time, and tell who notices.

    .venv/bin/python scripts/mutate_matrices.py                    # fails where a change is noticed by nobody
    .venv/bin/python scripts/mutate_matrices.py --list             # lists what the table alone notices too
    .venv/bin/python scripts/mutate_matrices.py --markdown FILE    # writes all that into a file

A value of a row's cell is dropped, one that is missing is added, and each is replaced by each; a row is left out, or
there twice. A layout that stands for the same splits as another (`tp+pp` of four ranks, `tp2+pp2`) is no other value.
Nothing is written into the tree: a family with other rows is made in memory. Four can notice:

- table: the comparison of the rows with the truth table (`npu_zoo.core.truth.differences`);
- refusals: the row's combinations and those beside it on the changed axis, asked for and held against the table;
- build: what a shape or a memory rules out, where the row did not offer it before: a world size or a layout of which no
  split divides the model, and weights that leave a device no room for one token;
- run: a combination on a CPU that no engine can be made for: no attention backend, kernel or quantization method, or
  experts to be shared where there are none. What a CPU does run, or is no longer asked to, it cannot notice.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.checkpoint import read_config
from npu_zoo.core.cells import Cell, row_cells
from npu_zoo.core.config import DEFAULT_KV_CACHE_FRACTION, EngineArgs
from npu_zoo.core.errors import NpuZooError
from npu_zoo.core.features import AXES, KINDS, FeatureRow, layout_names, splits_of
from npu_zoo.core.hardware import PRODUCTS, chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec
from npu_zoo.core.truth import differences, read_truth
from npu_zoo.fitting import GIB, workload_of
from npu_zoo.planning import plan_rank
from npu_zoo.registry import get_registry
from npu_zoo.request import Request, bundled_directory
from npu_zoo.selection import select_attention, select_kernels
from npu_zoo.splitting import split_faults
from npu_zoo.testing.validation.refusals import check_row, known_values

WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
SETS = ("sizes", *AXES, "derived")
SINGLE = ("status", "source", "replicated_kv_heads")
WHOLE = "rows"
COLUMNS = ("changes", "caught", "table", "refusals", "build", "run", "table alone")
_WIDTHS = (16, 21, *[10] * len(COLUMNS[:-1]), 11)
_JOBS = 2
_NOTHING_ASKED = EngineArgs()  # type: ignore[call-arg]
_NEIGHBOURS = {"sizes": ["size"], "world_size": ["split"], "parallelism": ["split"]}
"""The axes of a combination, where a field of a row is named otherwise."""


@dataclass(frozen=True)
class Mutation:
    """A family with one change.

    Attributes:
        row: the number of the row that was changed, from 0.
        axis: the field of the row; ``rows`` where the row itself was left out or doubled.
        kind: drop, add or replace.
        what: the value, or both.
        rows: all rows, changed.
    """

    family: FamilySpec
    row: int
    axis: str
    kind: str
    what: str
    rows: tuple[FeatureRow, ...]

    @property
    def mutated(self) -> FamilySpec:
        """The family as it would be."""
        return self.family.model_copy(update={"rows": self.rows})

    @property
    def before(self) -> FeatureRow:
        """The row as it is."""
        return self.family.rows[self.row]

    @property
    def after(self) -> FeatureRow | None:
        """The changed row; None where the row was left out or doubled."""
        return None if self.axis == WHOLE else self.rows[self.row]


@dataclass(frozen=True)
class Outcome:
    """Who notices a mutation; of ``run`` None where it is not of a CPU, or nothing is added there."""

    family: str
    row: int
    axis: str
    kind: str
    what: str
    table: bool
    refusals: bool
    build: bool
    run: bool | None

    @property
    def caught(self) -> bool:
        """Whether anybody does."""
        return self.table or self.refusals or self.build or bool(self.run)

    @property
    def by_table_alone(self) -> bool:
        """Whether neither building nor running it does."""
        return self.caught and not self.build and not self.run


def mutations(family: FamilySpec, number: int) -> Iterator[Mutation]:
    """Every change of one row."""
    rows, row = family.rows, family.rows[number]
    yield Mutation(family, number, WHOLE, "drop", "the row", rows[:number] + rows[number + 1 :])
    yield Mutation(family, number, WHOLE, "add", "the row once more", (*rows, row))
    domain = domains(family, row)
    for axis in SETS:
        for kind, what, values in changed_sets(axis, getattr(row, axis), domain[axis]):
            if axis != "parallelism" or _made(row, values) != _made(row, row.parallelism):
                yield _with(family, number, axis, kind, what, values)
    for axis in SINGLE:
        for value in domain[axis]:
            if value != getattr(row, axis):
                yield _with(family, number, axis, "replace", f"{getattr(row, axis)} by {value}", value)


def changed_sets(axis: str, values: Sequence[Any], domain: Sequence[Any]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Every set that differs in one value: the kind of change, the value, the set; none that a row cannot have."""
    missing = [value for value in domain if value not in values]
    if len(values) > 1 or not FeatureRow.model_fields[axis].is_required():
        yield from (("drop", str(v), tuple(other for other in values if other != v)) for v in values)
    yield from (("add", str(value), (*values, value)) for value in missing)
    for old, new in itertools.product(values, missing):
        yield "replace", f"{old} by {new}", tuple(new if value == old else value for value in values)


def domains(family: FamilySpec, row: FeatureRow) -> dict[str, tuple[Any, ...]]:
    """By field, every value that a row could have."""
    families = get_registry().families.values()
    rows = [row for family in families for row in family.rows]
    known = known_values(family, get_registry())
    return {
        **{axis: known[axis] for axis in AXES if axis in known},
        "sizes": known["size"],
        "world_size": tuple(sorted({*WORLD_SIZES, *row.world_size})),
        "parallelism": _layouts(rows, row),
        "derived": AXES,
        "status": ("supported", "experimental"),
        "source": tuple(dict.fromkeys((*(row.source for row in rows), "derived"))),
        "replicated_kv_heads": (False, True),
    }


def _layouts(rows: Iterable[FeatureRow], row: FeatureRow) -> tuple[str, ...]:
    """All layouts by kinds, all that a matrix spells out, and a row's world sizes in tensor parallel and in halves."""
    kinds = ["+".join(c) for count in range(1, len(KINDS) + 1) for c in itertools.combinations(KINDS, count)]
    spelt = [layout for other in rows for layout in other.parallelism]
    halves = [Split(world // 2, *more) for world in row.world_size if world % 2 == 0 for more in ((2,), (1, 1, 2))]
    whole = [Split(world, 1, experts) for world in row.world_size for experts in {1, world}]
    exact = [layout_names(split)[0] for split in (*whole, *halves)]
    return tuple(dict.fromkeys((*kinds, *spelt, *exact)))


def _made(row: FeatureRow, layouts: Iterable[str]) -> list[list[Split]]:
    """By layout the splits that it makes of the row's world sizes, whichever way it is spelt."""
    return [[split for world in row.world_size for split in splits_of(layout, world)] for layout in layouts]


def _with(family: FamilySpec, number: int, axis: str, kind: str, what: str, value: object) -> Mutation:
    changed = family.rows[number].model_copy(update={axis: value})
    return Mutation(family, number, axis, kind, what, (*family.rows[:number], changed, *family.rows[number + 1 :]))


def seen_by_table(mutation: Mutation) -> bool:
    """Whether the comparison with the family's truth table names a difference."""
    return bool(mutation.family.truth) and bool(differences(mutation.mutated, read_truth(mutation.family.truth)))


def seen_by_refusals(mutation: Mutation) -> bool:
    """Whether asking for the row's combinations and for those beside it on the changed axis shows a fault.

    Of a row that was left out the others are asked on all axes. One that is there twice changes no answer.
    """
    numbers, axes = [mutation.row], _NEIGHBOURS.get(mutation.axis, [mutation.axis])
    if mutation.axis == WHOLE:
        numbers, axes = list(range(len(mutation.rows))) if mutation.kind == "drop" else [], list(Cell._fields)
    asked = [axis for axis in axes if axis in Cell._fields]
    return any(fault for number in numbers for fault in check_row(mutation.mutated, number, axes=asked))


def seen_by_build(mutation: Mutation) -> bool:
    """Whether the changed row offers what a shape or a memory rules out, and did not before."""
    name, after = mutation.family.name, mutation.after
    return after is not None and bool(_unbuildable(name, after) - _unbuildable(name, mutation.before))


def _unbuildable(family: str, row: FeatureRow) -> set[tuple[object, ...]]:
    faults: set[tuple[object, ...]] = set()
    made = [(w, y, split) for w in row.world_size for y in row.parallelism for split in splits_of(y, w)]
    for size in (size for size in row.sizes if config_of(family, size)):
        fit = [entry for entry in made if _divides(family, size, entry[-1], row.replicated_kv_heads)]
        faults |= {(size, world) for world in {*row.world_size} - {world for world, _, _ in fit}}
        faults |= {(size, layout) for layout in {*row.parallelism} - {layout for _, layout, _ in fit}}
        splits = {split for _, _, split in fit}
        ways = itertools.product(row.hardware, row.dtype, row.quantization, row.kv_cache_dtype, splits)
        faults |= {(size, *way) for way in ways if not _fits(family, size, *way)}
    return faults


@functools.cache
def config_of(family: str, size: str) -> ModelConfig | None:
    """The shape of a size, of its first variant that has one; None for ``custom``."""
    variants = [variant for variant in get_registry().families[family].variants if variant.size == size]
    bundled = (bundled_directory(variant) for variant in variants)
    shapes = [ModelConfig.from_hf(read_config(directory)) for directory in bundled if directory]
    return next(iter(shapes + [variant.config for variant in variants if variant.config]), None)


@functools.cache
def _divides(family: str, size: str, split: Split, copies: bool) -> bool:
    """Whether a size can be split so."""
    spec, config = get_registry().families[family], config_of(family, size)
    assert config is not None
    row = spec.rows[0].model_copy(update={"replicated_kv_heads": copies})
    variant = next(variant for variant in spec.variants if variant.size == size)
    request = Request(family, spec, variant, "cpu", "float16", split, "paged", "none", "auto", "", False, config)
    return not split_faults(_NOTHING_ASKED, request, row, config, split)


@functools.cache
def _fits(
    family: str, size: str, hardware: str, dtype: str, quantization: str, kv_cache_dtype: str, split: Split
) -> bool:
    """Whether the largest device of a product has room for one token; of a CPU and a GPU nobody knows."""
    config, memory = config_of(family, size), max(PRODUCTS[hardware].memory_gib, default=0)
    assert config is not None
    if not memory:
        return True
    device, workload = chip_of(hardware).device, workload_of(_NOTHING_ASKED, config)
    plan = plan_rank(
        config, dtype, split, workload, quantization=quantization, kv_cache_dtype=kv_cache_dtype, device=device
    )
    return plan.cache_tokens(memory * GIB, DEFAULT_KV_CACHE_FRACTION[device]) > 0


def seen_by_run(mutation: Mutation) -> bool | None:
    """Whether running the family's CPU cells would fail: no engine can be made for one that was added.

    None where no cell of a CPU was added. Nothing is run for the answer: an engine is made where an attention backend,
    kernels and a quantization method are found, and no experts are to be shared that are not there. How a sequence
    becomes long and who serves is nothing that a run of a tiny checkpoint can tell.
    """
    if mutation.after is None:
        return None
    added = {cell for cell in {*row_cells(mutation.after)} - {*row_cells(mutation.before)} if cell.hardware == "cpu"}
    if not added:
        return None
    ways = {(c.dtype, c.attention, c.quantization, c.kv_cache_dtype, c.split[KINDS.index("ep")] > 1) for c in added}
    return not all(_runs(mutation.family.name, *way) for way in ways)


@functools.cache
def _runs(
    family: str, dtype: Any, attention: Any, quantization: Any, kv_cache_dtype: Any, shared_experts: bool
) -> bool:
    """Whether an engine on a CPU can be made for the family's demo model."""
    registry, config = get_registry(), config_of(family, "demo")
    assert config is not None
    try:
        select_attention(registry.attention_backends, attention, "cpu", dtype, config, None, kv_cache_dtype)
        select_kernels(registry.kernels, "cpu", dtype, config, quantization)
    except NpuZooError:
        return False
    return quantization in ("none", *registry.quantization_methods) and not (shared_experts and config.moe is None)


def judge(mutation: Mutation) -> Outcome:
    """Ask all four."""
    told = (mutation.family.name, mutation.row, mutation.axis, mutation.kind, mutation.what)
    seen = (seen_by_table(mutation), seen_by_refusals(mutation), seen_by_build(mutation), seen_by_run(mutation))
    return Outcome(*told, *seen)


def judge_row(name: str, number: int) -> list[Outcome]:
    """All changes of one row of a registered family."""
    return [judge(mutation) for mutation in mutations(get_registry().families[name], number)]


def judge_all(families: Iterable[str]) -> list[Outcome]:
    """All changes of all rows, in a few processes."""
    rows = [(name, number) for name in families for number in range(len(get_registry().families[name].rows))]
    with ProcessPoolExecutor(_JOBS) as pool:
        return [outcome for found in pool.map(judge_row, *zip(*rows, strict=True)) for outcome in found]


def summary(outcomes: Iterable[Outcome]) -> list[tuple[str, ...]]:
    """A line for each family and axis, and one for all: how many changes, and how many are noticed by whom."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.family, outcome.axis), []).append(outcome)
        groups.setdefault(("all", ""), []).append(outcome)
    groups["all", ""] = groups.pop(("all", ""))
    return [(*key, *map(str, _counts(found))) for key, found in groups.items()]


def _counts(found: Sequence[Outcome]) -> tuple[int, ...]:
    seen = [(o.caught, o.table, o.refusals, o.build, bool(o.run), o.by_table_alone) for o in found]
    return (len(found), *map(sum, zip(*seen, strict=True)))


def listed(outcomes: Iterable[Outcome]) -> list[str]:
    """Changes in words, those of one kind and cell in one line."""
    groups: dict[tuple[str, int, str, str], list[str]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.family, outcome.row, outcome.axis, outcome.kind), []).append(outcome.what)
    families = get_registry().families
    return [
        f"{family}, row {row} ({_place(families[family].rows[row])}), {axis}: {kind} {'; '.join(what)}"
        for (family, row, axis, kind), what in groups.items()
    ]


def _place(row: FeatureRow) -> str:
    return f"{', '.join(row.sizes)} on {', '.join(row.hardware)}"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The summary and every change that the table alone notices."""
    table = [("family", "axis", *COLUMNS), ("---",) * (len(COLUMNS) + 2), *summary(outcomes)]
    lines = [_share(outcomes), "", *(f"| {' | '.join(cells)} |" for cells in table)]
    alone = [outcome for outcome in outcomes if outcome.by_table_alone]
    lines += ["", "Noticed by the table or by refusals, and neither by build nor by run:", ""]
    return "\n".join([*lines, *(f"- {line}" for line in listed(alone))]) + "\n"


def _share(outcomes: Sequence[Outcome]) -> str:
    changes, caught, table, refusals, *_, alone = _counts(outcomes)
    return (
        f"{caught} of {changes} changes are noticed ({caught / changes:.2%}): {table} in the comparison with the truth "
        f"table, {refusals} by refusals; {alone} of them neither by build nor by run."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Judge every change; 1 where one is noticed by nobody."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="these alone; every built-in one by default")
    parser.add_argument("--markdown", metavar="FILE", help="write the summary and the list there")
    parser.add_argument("--list", action="store_true", help="list what the table alone notices")
    arguments = parser.parse_args(argv)
    begun = time.perf_counter()
    outcomes = judge_all(arguments.families or get_registry().families)
    for cells in (("family", "axis", *COLUMNS), *summary(outcomes)):
        print("".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip())
    print(f"{_share(outcomes)} {time.perf_counter() - begun:.0f} s")
    if arguments.list:
        print(*listed(outcome for outcome in outcomes if outcome.by_table_alone), sep="\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(outcomes), encoding="utf-8")
    missed = [outcome for outcome in outcomes if not outcome.caught]
    for line in listed(missed):
        print(f"noticed by nobody: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
