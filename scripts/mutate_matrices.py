"""Change every cell of every built-in matrix, one at a time, and tell who notices.

    .venv/bin/python scripts/mutate_matrices.py                    # fails where a change is noticed by nobody
    .venv/bin/python scripts/mutate_matrices.py --list             # lists what the table alone notices too
    .venv/bin/python scripts/mutate_matrices.py --markdown FILE    # writes docs/mutations.md

A value of a row's cell is dropped, one that is missing is added, and each is replaced by each; a row is left out, or
there twice. A layout that stands for the same splits as another (`tp+pp` of four ranks, `tp2+pp2`) is no other value.
Nothing is written into the tree: a family with other rows is made in memory. Who can notice:

- table: the comparison of the rows with the truth table (`npu_zoo.core.truth.differences`);
- refusals: the row's combinations and those beside it on the changed axis, asked for and held against the table;
- spec: what else `npu-zoo validate --level spec` claims of the row: dtypes that a chip has, layouts and world sizes
  that go together, attention backends, kernels and quantization methods that are registered;
- build: a world size of which no split divides a shape, weights that leave a device no room for a token;
- run: a combination on a CPU that was not there before and that no engine can be made for. What a CPU can run, whoever
  asked for it, no run notices, nor what is no longer asked.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npu_zoo.core.cells import FEATURES, Cell
from npu_zoo.core.features import AXES, KINDS, FeatureRow, layout_names, splits_of
from npu_zoo.core.hardware import chip_of
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.core.truth import differences, read_truth
from npu_zoo.registry import get_registry
from npu_zoo.testing.shapes import config_of, kinds_of, tiny_config
from npu_zoo.testing.validation.build import allowed_splits, fits
from npu_zoo.testing.validation.cells import Combination, resolve_combination
from npu_zoo.testing.validation.claims import Claim, ClaimFails, Subject
from npu_zoo.testing.validation.refusals import check_row, known_values
from npu_zoo.testing.validation.run import cells_of_one
from npu_zoo.testing.validation.scope import Part
from npu_zoo.testing.validation.spec import row_claims as spec_claims

WORLD_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
SETS = ("sizes", *AXES, "derived")
SINGLE = ("status", "source", "replicated_kv_heads")
WHOLE = "rows"
SEEN_BY = ("table", "refusals", "spec", "build", "run")
COLUMNS = ("changes", "noticed", *SEEN_BY, "table alone")
_WIDTHS = (16, 21, *[10] * len(COLUMNS[:-1]), 11)
_JOBS = 2
_NEIGHBOURS = {"sizes": ["size"], "world_size": ["split"], "parallelism": ["split"]}
"""The axes of a combination, where a field of a row is named otherwise."""

_OF_A_PLACE = ("dtype", "attention", "quantization")
_SPEC_CLAIMS = {
    **dict.fromkeys(("sizes", "hardware", "dtype"), _OF_A_PLACE),
    **dict.fromkeys(("world_size", "parallelism"), ("parallelism",)),
    **dict.fromkeys(("attention", "kv_cache_dtype"), ("attention",)),
    "quantization": ("quantization",),
}
"""Of the claims of a row's specs those that a change of a field can touch, by the axis that they blame."""

_BUILT = {"sizes", "hardware", "dtype", "world_size", "parallelism", "quantization", "kv_cache_dtype"}
_BUILT |= {"replicated_kv_heads"}


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
    """Who notices a mutation, of :data:`SEEN_BY`; ``run`` is None where nothing is added on a CPU."""

    family: str
    row: int
    axis: str
    kind: str
    what: str
    table: bool = False
    refusals: bool = False
    spec: bool = False
    build: bool = False
    run: bool | None = None

    @property
    def noticed(self) -> bool:
        """Whether anybody does."""
        return any(getattr(self, name) for name in SEEN_BY)

    @property
    def by_table_alone(self) -> bool:
        """Whether nobody does but the table, by itself or by the refusals that it asks for."""
        return self.noticed and not (self.spec or self.build or self.run)


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


def seen_by_spec(mutation: Mutation) -> bool:
    """Whether another claim of the changed row's specs fails."""
    after, family = mutation.after, mutation.mutated
    judged = _SPEC_CLAIMS.get(mutation.axis, ())
    if after is None or not judged:
        return False
    registry = get_registry()
    part = Part(registry.plugins[registry.owner(family.name)], registry)
    return any(
        claim.judge().status == "fails"
        for claim in spec_claims(part, family, mutation.row, after)
        if claim.subject.axis in judged
    )


def seen_by_build(mutation: Mutation) -> bool:
    """Whether the changed row offers what a shape or a memory rules out, and did not before."""
    name, after = mutation.family.name, mutation.after
    if after is None or mutation.axis not in _BUILT:
        return False
    return bool(_unbuildable(name, after) - _unbuildable(name, mutation.before))


@functools.lru_cache(maxsize=64)
def _unbuildable(name: str, row: FeatureRow) -> frozenset[Claim]:
    """Claims that fail, without the building itself, which takes as long for all rows as it takes."""
    return frozenset(claim for claim in _build_claims(name, row) if claim.judge().status == "fails")


def _build_claims(name: str, row: FeatureRow) -> Iterator[Claim]:
    family = get_registry().families[name]
    sizes = {variant.size: variant for variant in reversed(family.variants) if config_of(variant, family)}
    for size in (size for size in row.sizes if size in sizes):
        subject, variant = Subject("", name, name=size), sizes[size]
        for world in row.world_size:
            divides = functools.partial(_require_split, family, variant, row, world)
            yield Claim("build", subject, f"{world}", divides)
            for hardware in (hardware for hardware in row.hardware if chip_of(hardware).device == "npu"):
                holds = functools.partial(fits, name, variant.name, row, world, hardware)
                yield Claim("build", subject, f"{world} on {hardware}", holds)


def _require_split(family: FamilySpec, variant: VariantSpec, row: FeatureRow, world: int) -> dict[str, float | str]:
    config = config_of(variant, family)
    assert config is not None
    if not allowed_splits(family, variant, row, config, world)[0]:
        raise ClaimFails("no split is allowed")
    return {}


def seen_by_run(mutation: Mutation) -> bool | None:
    """Whether running the changed row's combinations on a CPU would fail: no engine can be made for one of them.

    None where no combination of a CPU was added. Nothing is run for the answer, so one whose engine would compute
    something wrong is no failure here. Of several ranks only those splits are run that a shape allows, and who serves
    is nothing to an engine.
    """
    if mutation.after is None:
        return None
    added = _combinations(mutation.after) - _combinations(mutation.before)
    if not added:
        return None
    name, ways = mutation.family.name, {replace(combination, serving="offline") for combination in added}
    return not all(_is_resolved(name, combination) for combination in ways)


def _combinations(row: FeatureRow) -> set[Combination]:
    return set(cells_of_one(row)) if "cpu" in row.hardware else set()


@functools.cache
def _is_resolved(name: str, combination: Combination) -> bool:
    """Whether an engine can be made for a tiny model of a family, under a row of this combination alone."""
    family = get_registry().families[name]
    place = {"sizes": (family.variants[0].size,), "world_size": (1,), "source": "zoo"}
    values = {axis: (getattr(combination, axis),) for axis in ("hardware", *FEATURES)}
    row = FeatureRow.model_validate({**place, **values})
    resolve = functools.partial(resolve_combination, name, row, tiny_config(kinds_of(family, row)[0]), combination)
    claim = Claim("run", Subject("", name), combination.name, lambda: {"engine": resolve().engine})
    return claim.judge().status == "holds"


def judge(mutation: Mutation) -> Outcome:
    """Ask everybody."""
    told = (mutation.family.name, mutation.row, mutation.axis, mutation.kind, mutation.what)
    table, refusals = seen_by_table(mutation), seen_by_refusals(mutation)
    return Outcome(*told, table, refusals, seen_by_spec(mutation), seen_by_build(mutation), seen_by_run(mutation))


def judge_family(name: str) -> list[Outcome]:
    """All changes of the rows of a registered family."""
    family = get_registry().families[name]
    return [judge(mutation) for number in range(len(family.rows)) for mutation in mutations(family, number)]


def judge_all(families: Iterable[str]) -> list[Outcome]:
    """All changes of all rows, a family in a process, which keeps what it finds of shapes and engines."""
    with ProcessPoolExecutor(_JOBS) as pool:
        return [outcome for found in pool.map(judge_family, families) for outcome in found]


def summary(outcomes: Iterable[Outcome]) -> list[tuple[str, ...]]:
    """A line for each family and axis, and one for all: how many changes, and how many are noticed by whom."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.family, outcome.axis), []).append(outcome)
        groups.setdefault(("all", ""), []).append(outcome)
    groups["all", ""] = groups.pop(("all", ""))
    return [(*key, *map(str, _counts(found))) for key, found in groups.items()]


def _counts(found: Sequence[Outcome]) -> tuple[int, ...]:
    names = ("noticed", *SEEN_BY, "by_table_alone")
    return (len(found), *(sum(bool(getattr(outcome, name)) for outcome in found) for name in names))


def listed(outcomes: Iterable[Outcome]) -> list[str]:
    """Changes in words, those of one kind and cell in one line."""
    groups: dict[tuple[str, int, str, str], list[str]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.family, outcome.row, outcome.axis, outcome.kind), []).append(outcome.what)
    families = get_registry().families
    return [
        f"{family}, row {row + 1} ({_place(families[family].rows[row])}), {axis}: {kind} {'; '.join(what)}"
        for (family, row, axis, kind), what in groups.items()
    ]


def _place(row: FeatureRow) -> str:
    return f"{', '.join(row.sizes)} on {', '.join(row.hardware)}"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """A page of what was noticed by whom."""
    head = f"| {' | '.join(('family', 'axis', *COLUMNS))} |"
    rows = [f"| {' | '.join(cells)} |" for cells in summary(outcomes)]
    return INTRODUCTION + "\n".join([_share(outcomes), "", head, "|" + " --- |" * (2 + len(COLUMNS)), *rows]) + "\n"


def _share(outcomes: Sequence[Outcome]) -> str:
    counts = dict(zip(COLUMNS, _counts(outcomes), strict=True))
    changes, noticed, alone = counts["changes"], counts["noticed"], counts["table alone"]
    return (
        f"{noticed} of {changes} changes are noticed ({noticed / changes:.2%}): {counts['table']} in the comparison "
        f"with the truth table, {counts['refusals']} by refusals; {alone} by nothing else."
    )


INTRODUCTION = """\
<!-- Generated by scripts/mutate_matrices.py; do not edit. -->

# Every change of one cell

`make verify` changes each cell of each built-in matrix in every way that makes another matrix (a value dropped,
added or replaced, a row dropped or doubled) and asks who notices: the comparison with the family's truth table and
the refusals of neighbouring combinations, which `npu-zoo validate --level spec` makes, the other claims of specs,
those of shapes (build), and those of runs, judged by what an engine can be made for. `table alone` counts what
nothing but the first two notices: that would run or be refused as well as before, and is wrong only because a
source says something else. `--list` names those.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Judge every change; 1 where one is noticed by nobody."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="these alone; every built-in one by default")
    parser.add_argument("--markdown", metavar="FILE", help="write the page there")
    parser.add_argument("--check", metavar="FILE", help="fail where the page there says anything else")
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
    if arguments.check and Path(arguments.check).read_text(encoding="utf-8") != markdown(outcomes):
        print(f"{arguments.check} says something else; write it with --markdown {arguments.check}", file=sys.stderr)
        return 1
    missed = [outcome for outcome in outcomes if not outcome.noticed]
    for line in listed(missed):
        print(f"noticed by nobody: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
