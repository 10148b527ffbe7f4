"""FeatureMatrix.check over random matrices, against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from npu_zoo.checkpoint import read_config
from npu_zoo.core.features import (
    AXES,
    KINDS,
    Conflict,
    Denial,
    FeatureMatrix,
    FeatureRow,
    Verdict,
    layout_names,
    split_flags,
    splits_of,
)
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory

DOMAIN: dict[str, tuple[Any, ...]] = {
    "hardware": ("atlas_800i_a2", "atlas_300i_duo", "cpu"),
    "dtype": ("float16", "bfloat16"),
    "parallelism": ("tp", "tp+ep", "tp+pp"),
    "world_size": (1, 2, 4),
    "attention": ("paged", "flash"),
    "quantization": ("none", "w8a8"),
    "kv_cache_dtype": ("auto", "int8"),
    "long_sequence": (False, True),
    "serving": ("offline", "tgi"),
}
SIZE = "7b"


def subsets(axis: str) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(DOMAIN[axis]), min_size=1, unique=True).map(tuple)


ROWS = st.builds(
    FeatureRow,
    sizes=st.sampled_from([(SIZE,), ("33b",), (SIZE, "33b")]),
    source=st.sampled_from(["a README", "zoo"]),
    status=st.sampled_from(["supported", "experimental"]),
    **{axis: subsets(axis) for axis in DOMAIN},
)
CELLS = st.sampled_from([(axis, value) for axis, values in DOMAIN.items() for value in values])
PAIRS = st.tuples(CELLS, CELLS | st.just(("enable_prefix_caching", True))).filter(lambda pair: pair[0][0] != pair[1][0])
CONFLICTS = PAIRS.map(lambda pair: Conflict(first=pair[0], second=pair[1], reason="they exclude each other"))
DENIALS = CELLS.map(
    lambda c: Denial(sizes=(SIZE,), hardware=DOMAIN["hardware"], axis=c[0], values=(c[1],), source="a README")
)
MATRICES = st.builds(
    FeatureMatrix,
    rows=st.lists(ROWS, max_size=5).map(tuple),
    denials=st.lists(DENIALS, max_size=3).map(tuple),
    conflicts=st.lists(CONFLICTS, max_size=3).map(tuple),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[FeatureMatrix, dict[str, Any]]:
    """A matrix and a possible request that differs from one of its rows on at most two axes, so that many pass."""
    matrix = draw(MATRICES)
    row = draw(st.sampled_from(matrix.rows)) if matrix.rows else None
    strays = draw(st.sets(st.sampled_from(AXES), max_size=2)) if row else set(AXES)
    offered = {axis: DOMAIN[axis] if row is None or axis in strays else row.values(axis) for axis in AXES}
    request = {axis: draw(st.sampled_from(values)) for axis, values in offered.items()}
    if not splits_of(request["parallelism"], request["world_size"]):
        request["parallelism"] = "tp"
    return matrix, request


OPTIONS = st.fixed_dictionaries({"enable_prefix_caching": st.booleans()})


def passes(matrix: FeatureMatrix, request: dict[str, Any], experimental: bool, options: dict[str, Any]) -> bool:
    """Brute force: one row that may be taken holds every value, and no conflict holds both of its values."""
    everything = {**request, **options}
    for conflict in matrix.conflicts:
        if all(everything[axis] == value for axis, value in (conflict.first, conflict.second)):
            return False
    rows = [r for r in matrix.rows if SIZE in r.sizes and (experimental or r.status == "supported")]
    return any(all(request[axis] in getattr(row, axis) for axis in DOMAIN) for row in rows)


def check(matrix: FeatureMatrix, request: dict[str, Any], experimental: bool, options: dict[str, Any]) -> Verdict:
    return matrix.check("family:7b", SIZE, request, allow_experimental=experimental, options=options)


def test_the_domain_covers_every_axis() -> None:
    assert tuple(DOMAIN) == AXES


@given(cases(), st.booleans(), OPTIONS)
def test_supported_exactly_when_one_row_holds_everything(
    case: tuple[FeatureMatrix, dict[str, Any]], experimental: bool, options: dict[str, Any]
) -> None:
    matrix, request = case
    verdict = check(matrix, request, experimental, options)
    assert verdict.supported == passes(matrix, request, experimental, options)
    if verdict.supported:
        assert verdict.row in matrix.rows
        assert (verdict.reasons, verdict.alternatives) == ((), ())
    else:
        assert verdict.reasons
        assert verdict.row is None


@given(cases(), st.booleans(), OPTIONS)
def test_every_reason_speaks_of_the_request(
    case: tuple[FeatureMatrix, dict[str, Any]], experimental: bool, options: dict[str, Any]
) -> None:
    matrix, request = case
    for reason in check(matrix, request, experimental, options).reasons:
        assert {**options, **request}[reason.axis] == reason.value
        assert f"{reason.axis}=" in reason.message
        assert reason.value not in reason.supported
        assert set(reason.supported) <= set(DOMAIN.get(reason.axis, ()))


@given(cases(), st.booleans(), OPTIONS)
def test_alternatives_pass_and_none_that_changes_less_was_missed(
    case: tuple[FeatureMatrix, dict[str, Any]], experimental: bool, options: dict[str, Any]
) -> None:
    matrix, request = case
    verdict = check(matrix, request, experimental, options)
    everything = (dict(zip(DOMAIN, values, strict=True)) for values in itertools.product(*DOMAIN.values()))
    possible = (o for o in everything if splits_of(o["parallelism"], o["world_size"]))
    passing = [other for other in possible if passes(matrix, other, experimental, options)]
    if not verdict.supported:
        assert min(len(passing), 1) <= len(verdict.alternatives) <= 3
    assert all(alternative in passing for alternative in verdict.alternatives)
    for first in verdict.alternatives[:1]:
        assert not any(_changes(request, other) < _changes(request, first) for other in passing)


def _changes(request: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {axis for axis in DOMAIN if request[axis] != other[axis]}


@given(cases())
def test_experimental_rows_need_the_flag_and_the_refusal_names_it(
    case: tuple[FeatureMatrix, dict[str, Any]],
) -> None:
    matrix, request = case
    without = check(matrix, request, False, {"enable_prefix_caching": False})
    with_flag = check(matrix, request, True, {"enable_prefix_caching": False})
    named = ["--allow-experimental" in reason.message for reason in without.reasons]
    assert with_flag.supported or not without.supported
    if with_flag.supported and not without.supported:
        assert with_flag.status == "experimental"
        assert all(named)
    else:
        assert not any(named)


@given(cases(), OPTIONS)
def test_conflicts_are_symmetric(case: tuple[FeatureMatrix, dict[str, Any]], options: dict[str, Any]) -> None:
    matrix, request = case
    turned = [Conflict(first=c.second, second=c.first, reason=c.reason) for c in matrix.conflicts]
    mirrored = matrix.model_copy(update={"conflicts": tuple(turned)})
    one, other = (check(m, request, True, options) for m in (matrix, mirrored))
    assert one.supported == other.supported
    assert one.alternatives == other.alternatives
    assert len(one.reasons) == len(other.reasons)


def row(**changes: Any) -> FeatureRow:
    cell: dict[str, Any] = {"hardware": ("atlas_800i_a2",), "dtype": ("float16",), "world_size": (1,)}
    return FeatureRow(**{"sizes": (SIZE,), "attention": ("paged",), "source": "a README"} | cell | changes)


def ask(**changes: Any) -> dict[str, Any]:
    return {axis: row().values(axis)[0] for axis in AXES} | changes


def test_columns_are_not_independent() -> None:
    duo = row(hardware=("atlas_300i_duo",), world_size=(2,))
    matrix = FeatureMatrix(rows=(row(dtype=("float16", "bfloat16")), duo))
    verdict = matrix.check("m", SIZE, ask(hardware="atlas_300i_duo", dtype="bfloat16", world_size=2))
    assert [(r.axis, r.supported) for r in verdict.reasons] == [("dtype", ("float16",))]


def test_an_experimental_cell_quotes_the_denial_and_names_the_flag() -> None:
    rows = (row(), row(dtype=("bfloat16",), status="experimental", source="zoo"))
    denial = Denial(
        sizes=(SIZE,),
        hardware=("atlas_800i_a2",),
        axis="dtype",
        values=("bfloat16",),
        source="README of a vendor",
        reason="no such unit",
    )
    verdict = FeatureMatrix(rows=rows, denials=(denial,)).check("m", SIZE, ask(dtype="bfloat16"))
    assert verdict.reasons[0].message == (
        "dtype=bfloat16 is not supported by m on atlas_800i_a2; supported: float16 "
        "(the README of a vendor says no: no such unit); "
        "the zoo offers this as experimental; --allow-experimental runs it"
    )


def test_a_conflict_with_an_engine_option_is_not_answered_with_the_same_request() -> None:
    conflict = Conflict(
        first=("attention", "flash"), second=("enable_prefix_caching", True), reason="nothing can be shared"
    )
    matrix = FeatureMatrix(rows=(row(attention=("flash", "paged")),), conflicts=(conflict,))
    verdict = matrix.check("m", SIZE, ask(attention="flash"), options={"enable_prefix_caching": True})
    assert verdict.reasons[0].message == "attention=flash excludes enable_prefix_caching=True: nothing can be shared"
    assert [alternative["attention"] for alternative in verdict.alternatives] == ["paged"]
    assert matrix.check("m", SIZE, ask(attention="flash"), options={"enable_prefix_caching": False}).supported


def test_nearest_keeps_what_costs_most_to_give_up() -> None:
    rows = (row(serving=("offline", "tgi")), row(hardware=("cpu",), world_size=(2,)), row(dtype=("bfloat16",)))
    verdict = FeatureMatrix(rows=rows).check("m", SIZE, ask(world_size=2))
    assert [(a["hardware"], a["dtype"], a["world_size"]) for a in verdict.alternatives] == [
        ("atlas_800i_a2", "float16", 1),
        ("atlas_800i_a2", "bfloat16", 1),
        ("cpu", "float16", 2),
    ]
    assert verdict.describe().splitlines()[1:] == [
        "nearest supported requests:",
        "  --hardware atlas_800i_a2 --dtype float16 --world-size 1 --attention paged",
        "  --hardware atlas_800i_a2 --dtype bfloat16 --world-size 1 --attention paged",
        "  --hardware cpu --dtype float16 --world-size 2 --attention paged",
    ]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (Split(), ("tp1", "tp")),
        (Split(8), ("tp8", "tp")),
        (Split(8, ep=8), ("tp8+ep8", "tp+ep")),
        (Split(8, pp=2), ("tp8+pp2", "tp+pp")),
        (Split(pp=2), ("pp2", "pp")),
        (Split(dp=4), ("dp4", "dp")),
        (Split(dp=4, ep=2), ("ep2+dp4", "ep+dp")),
        (Split(4, 2, 8, 2), ("tp4+pp2+ep8+dp2", "tp+pp+ep+dp")),
    ],
)
def test_layout_names(split: Split, names: tuple[str, ...]) -> None:
    assert layout_names(split) == names


@pytest.mark.parametrize(
    ("layout", "world_size", "splits"),
    [
        ("tp", 1, [(1,)]), ("tp", 8, [(8,)]), ("pp", 1, []), ("pp", 4, [(1, 4)]), ("dp", 3, [(1, 1, 1, 3)]),
        ("tp+ep", 8, [(8, 1, 8), (8, 1, 4), (8, 1, 2)]), ("tp+pp", 8, [(4, 2), (2, 4)]), ("tp+pp", 2, []),
        ("tp8+ep4", 8, [(8, 1, 4)]), ("tp8+pp2", 16, [(8, 2)]), ("tp8+pp2", 8, []), ("tp8+ep3", 8, []),
        ("ep+dp", 4, [(1, 1, 4, 4), (1, 1, 2, 4)]), ("tp+ep+dp", 4, [(2, 1, 4, 2), (2, 1, 2, 2)]),
        ("tp4+ep8+dp2", 8, [(4, 1, 8, 2)]), ("tp+pp+ep", 4, [(2, 2, 2)]), ("tp+pp+dp", 8, [(2, 2, 1, 2)]),
    ],
)  # fmt: skip
def test_splits_of_layouts(layout: str, world_size: int, splits: list[tuple[int, ...]]) -> None:
    assert splits_of(layout, world_size) == tuple(Split(*split) for split in splits)


SIZES = st.integers(1, 8)


@given(tp=SIZES, pp=SIZES, dp=SIZES, data=st.data())
def test_a_split_is_offered_under_both_of_its_names(tp: int, pp: int, dp: int, data: st.DataObject) -> None:
    ep = data.draw(st.sampled_from([n for n in range(1, dp * tp + 1) if dp * tp % n == 0]))
    split = Split(tp, pp, ep, dp)
    exact, kinds = layout_names(split)
    assert splits_of(exact, split.world_size) == (split,)
    assert split in splits_of(kinds, split.world_size)
    assert row(parallelism=(exact, kinds)).parallelism == (exact, kinds)
    words = split_flags(split).replace("--", "").split()
    asked = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert Split(*(asked.get(kind, 1) for kind in KINDS)) == split


def test_every_layout_of_a_row_is_one_of_a_world_of_it() -> None:
    rows = [row for family in get_registry().families.values() for row in family.rows]
    assert [
        (row, layout) for row in rows for layout in row.parallelism if not any(map_worlds(layout, row.world_size))
    ] == []
    assert [
        (row, world)
        for row in rows
        for world in row.world_size
        if not any(splits_of(y, world) for y in row.parallelism)
    ] == []


def map_worlds(layout: str, world_sizes: tuple[int, ...]) -> list[tuple[Split, ...]]:
    return [splits_of(layout, world) for world in world_sizes]


def test_rows_whose_ranks_exceed_the_key_value_heads_offer_copies_of_them() -> None:
    """Shapes that are known; of ``custom`` any may come, and vendors' rows claim copies only where they have them."""
    for family in get_registry().families.values():
        latent = all(v.config.mla for v in family.variants if v.config)
        for number, row in enumerate(family.rows):
            variants = [v for v in family.variants if v.size in row.sizes]
            bundled = [ModelConfig.from_hf(read_config(d)) for v in variants if (d := bundled_directory(v))]
            shapes = [shape for shape in (*bundled, *(v.config for v in variants)) if shape and not shape.mla]
            most = max(split.tp for y in row.parallelism for world in row.world_size for split in splits_of(y, world))
            exceeds = any(shape.num_key_value_heads < most for shape in shapes)
            of_any_shape = "custom" in row.sizes and most > 1 and not latent
            assert row.replicated_kv_heads == (exceeds or of_any_shape), (family.name, number)


def test_an_alternative_is_spelt_so_that_it_asks_for_its_split() -> None:
    matrix = FeatureMatrix(rows=(row(parallelism=("tp+pp", "ep+dp"), world_size=(2, 4), dtype=("bfloat16",)),))
    asked = ask(world_size=4, parallelism=layout_names(Split(2, 2)))
    flags = "  --hardware atlas_800i_a2 --dtype bfloat16 --world-size"
    assert matrix.check("m", SIZE, asked).describe().splitlines()[2:] == [f"{flags} 4 --attention paged --tp 2 --pp 2"]
    asked = ask(world_size=8, parallelism=layout_names(Split(ep=8, dp=8)))
    assert matrix.check("m", SIZE, asked).describe().splitlines()[3:] == [
        f"{flags} 4 --attention paged --ep 4 --dp 4",
        f"{flags} 2 --attention paged --ep 2 --dp 2",
        f"{flags} 4 --attention paged --tp 2 --pp 2",
    ]


def test_a_row_may_offer_an_exact_split_alone() -> None:
    matrix = FeatureMatrix(rows=(row(parallelism=("tp8+pp2",), world_size=(16,)),))
    assert matrix.check("m", SIZE, ask(world_size=16, parallelism=layout_names(Split(8, 2)))).supported
    refused = matrix.check("m", SIZE, ask(world_size=16, parallelism=layout_names(Split(4, 4))))
    assert [(r.axis, r.supported) for r in refused.reasons] == [("parallelism", ("tp8+pp2",))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": ("atlas_900",)}, "unknown hardware atlas_900; known: atlas_800i_a2"),
        ({"world_size": (0, 1)}, "world sizes start at 1"),
        ({"dtype": ("int4",)}, "dtype"),
        ({"attention": ()}, "attention"),
        ({"parallelism": ("tp", "sp")}, "unknown layout 'sp'; join tp, pp, ep, dp in this order"),
        ({"parallelism": ("dp+tp",)}, "unknown layout 'dp\\+tp'"),
        ({"parallelism": ("tp+tp",)}, "unknown layout"),
        ({"parallelism": ("tp0",)}, "unknown layout"),
        ({"parallelism": ("tp8pp2",)}, "unknown layout"),
        ({"world_sizes": (1,)}, "world_sizes"),
    ],
)
def test_a_malformed_row_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        row(**changes)
