"""Truth tables: what a line means, where a matrix differs from its table, and the built-in families' own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from npu_zoo.core.cells import Cell, boxes, matrix_statement, row_cells
from npu_zoo.core.errors import PluginError
from npu_zoo.core.features import Conflict, Denial, FeatureRow
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.core.truth import Difference, TruthTable, differences, parse_splits, read_truth
from npu_zoo.registry import get_registry

FAMILIES = get_registry().families
README = "README of a vendor"
LINE: dict[str, Any] = {
    "sizes": ["7b"],
    "hardware": {"atlas_800i_a2": "tp 1, 2", "atlas_300i_duo": "tp 2"},
    "dtype": {"float16": "yes", "bfloat16": {"atlas_800i_a2": "yes", "atlas_300i_duo": "no"}},
    "attention": {"paged": "yes", "flash": "no"},
    "serving": {"offline": "yes", "mindie_service": "yes", "tgi": "no"},
}


def table(*lines: dict[str, Any], **columns: Any) -> TruthTable:
    one = {"source": README, "lines": list(lines) or [LINE], **columns}
    return TruthTable.model_validate({"about": "a test", "tables": [one]})


def row(**changes: Any) -> FeatureRow:
    values: dict[str, Any] = {"sizes": ("7b",), "hardware": ("atlas_800i_a2",), "dtype": ("float16", "bfloat16")}
    values |= {"world_size": (1, 2), "attention": ("paged",), "serving": ("offline", "mindie_service")}
    return FeatureRow(**values | {"source": README} | changes)


ROWS = (row(), row(hardware=("atlas_300i_duo",), dtype=("float16",), world_size=(2,)))
DENIALS = (
    Denial(sizes=("7b",), hardware=("atlas_300i_duo",), axis="dtype", values=("bfloat16",), source=README),
    Denial(
        sizes=("7b",),
        hardware=("atlas_800i_a2", "atlas_300i_duo"),
        axis="attention",
        values=("flash",),
        source=README,
    ),
    Denial(sizes=("7b",), hardware=("atlas_800i_a2", "atlas_300i_duo"), axis="serving", values=("tgi",), source=README),
)


def family(*rows: FeatureRow, denials: tuple[Denial, ...] = DENIALS, **changes: Any) -> FamilySpec:
    return FamilySpec(
        name="tiny",
        title="Tiny",
        architectures=("LlamaForCausalLM",),
        model="tiny.model:Model",
        variants=tuple(VariantSpec(name=size, size=size) for size in ("7b", "33b")),
        default_variant="7b",
        rows=rows or ROWS,
        denials=denials,
        **changes,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_matrix_says_what_its_table_says(name: str) -> None:
    assert FAMILIES[name].truth
    assert differences(FAMILIES[name], read_truth(FAMILIES[name].truth)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_cpu_a_table_has_every_split_of_up_to_four_ranks(name: str) -> None:
    cells = read_truth(FAMILIES[name].truth).statement.cells
    experts = any(variant.config and variant.config.moe for variant in FAMILIES[name].variants)
    sizes = [s for s in itertools.product(range(1, 5), repeat=4) if s[0] * s[1] * s[3] <= 4 and s[0] * s[3] % s[2] == 0]
    expected = {split for split in sizes if experts or split[2] == 1}
    for size in {variant.size for variant in FAMILIES[name].variants}:
        assert {cell.split for cell in cells if cell[:2] == (size, "cpu")} == expected


def test_every_table_ships_with_its_plugin() -> None:
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8")
    for name in FAMILIES:
        (line,) = (line for line in text.splitlines() if line.startswith(f'"npu_zoo.plugins.{name}" = '))
        assert '"truth.json"' in line


@pytest.mark.parametrize(
    ("text", "splits"),
    [
        ("tp 1", [Split()]),
        ("tp 1, 2, 8", [Split(), Split(2), Split(8)]),
        ("tp 8; tp 8 ep 8", [Split(8), Split(8, ep=8)]),
        ("tp 4 ep 2, 4", [Split(4, ep=2), Split(4, ep=4)]),
        ("tp 2 pp 2 ep 4 dp 2; dp 3", [Split(2, 2, 4, 2), Split(dp=3)]),
    ],
)
def test_splits_of_a_line(text: str, splits: list[Split]) -> None:
    assert list(parse_splits(text)) == splits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": {"atlas_800i_a2": "1, 2"}}, "'1, 2' names no splits; write them as 'tp 1, 2, 4; tp 8 ep 8'"),
        ({"hardware": {"atlas_800i_a2": "yes"}}, "'yes' names no splits"),
        ({"hardware": {"atlas_800i_a2": "tp 2 ep 3"}}, r"no ranks make tp2\+ep3"),
        ({"hardware": {"atlas_800i_a2": "tp 0"}}, "sizes start at 1"),
        ({"hardware": {"atlas_900": "tp 1"}}, "unknown hardware atlas_900; known: atlas_800i_a2"),
        ({"dtype": {"float16": {"atlas_900": "yes"}}}, "unknown hardware atlas_900"),
        ({"dtype": {"float16": "perhaps"}}, "'yes' or 'no'"),
        ({"dtype": {"fp16": "yes"}}, "fp16"),
        ({"dtype": {"float16": {"atlas_800i_a2": "yes"}}}, "7b on atlas_300i_duo: no dtype is offered"),
        ({"attention": {"flash": "no"}}, "7b on atlas_800i_a2, atlas_300i_duo: no attention is offered"),
        ({"sizes": []}, "sizes"),
        ({"world_size": [1]}, "world_size"),
    ],
)
def test_a_malformed_line_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        table({**LINE, **changes})


def test_a_line_without_a_yes_means_what_is_usual() -> None:
    cells = table({**LINE, "serving": {"tgi": "no"}}).statement.cells
    assert {cell[5:] for cell in cells} == {("none", "auto", False, "offline")}
    cells = table({**LINE, "long_sequence": {"true": "yes"}, "quantization": {"w8a8": "yes"}}).statement.cells
    assert {cell[5:8] for cell in cells} == {("w8a8", "auto", True)}


def test_what_stands_in_the_table_goes_for_its_lines_unless_they_say_otherwise() -> None:
    plain = {key: value for key, value in LINE.items() if key != "attention"}
    cells = table(plain, {**plain, "sizes": ["33b"], "attention": {"flash": "yes"}}, attention={"paged": "yes"})
    found = {(cell.size, cell.attention) for cell in cells.statement.cells}
    assert found == {("7b", "paged"), ("33b", "paged"), ("33b", "flash")}


def test_a_matrix_and_a_table_that_say_the_same_do_not_differ() -> None:
    assert differences(family(), table()) == []
    assert len(matrix_statement(family()).cells) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize(
    ("changes", "axis", "message"),
    [
        (
            {"dtype": ("float16", "float32")},
            "dtype",
            "7b: the matrix offers dtype float32 and the table does not (atlas_800i_a2; float32; tp1, tp2; paged; "
            "serving mindie_service, offline)",
        ),
        (
            {"world_size": (1, 2, 4)},
            "split",
            "7b: the matrix offers split tp4 and the table does not (atlas_800i_a2; bfloat16, float16; tp4; paged; "
            "serving mindie_service, offline)",
        ),
        (
            {"world_size": (2,)},
            "split",
            "7b: the table offers split tp1 and the matrix does not (atlas_800i_a2; bfloat16, float16; tp1; paged; "
            "serving mindie_service, offline)",
        ),
        (
            {"hardware": ("atlas_800i_a2", "cpu"), "serving": ("offline",)},
            "hardware",
            "7b: the matrix offers hardware cpu and the table does not (cpu; bfloat16, float16; tp1, tp2; paged)",
        ),
        (
            {"sizes": ("33b",)},
            "size",
            "33b: the matrix offers size 33b and the table does not (atlas_800i_a2; bfloat16, float16; tp1, tp2; "
            "paged; serving mindie_service, offline)",
        ),
        (
            {"kv_cache_dtype": ("auto", "int8"), "dtype": ("float16",)},
            "kv_cache_dtype",
            "7b: the matrix offers kv_cache_dtype int8 and the table does not (atlas_800i_a2; float16; tp1, tp2; "
            "paged; kv_cache_dtype int8; serving mindie_service, offline)",
        ),
        (
            {"status": "experimental"},
            "status",
            "7b: status is experimental in the matrix and supported in the table (atlas_800i_a2; bfloat16, float16; "
            "tp1, tp2; paged; serving mindie_service, offline)",
        ),
        (
            {"derived": ("dtype",)},
            "derived",
            "7b: derived is dtype in the matrix and nothing in the table (atlas_800i_a2; bfloat16, float16; tp1, tp2; "
            "paged; serving mindie_service, offline)",
        ),
        (
            {"parallelism": ("tp", "tp8+pp2")},
            "parallelism",
            "7b: a row on atlas_800i_a2 names layout tp8+pp2, which none of its world sizes makes",
        ),
        (
            {"parallelism": ("tp1", "tp2"), "world_size": (1, 2, 3)},
            "world_size",
            "7b: a row on atlas_800i_a2 names world_size 3, which none of its layouts makes",
        ),
        (
            {"parallelism": ("tp", "tp2")},
            "rows",
            "7b: two rows, or two layouts of one, offer the same (atlas_800i_a2; bfloat16, float16; tp2; paged; "
            "serving mindie_service, offline)",
        ),
    ],
)
def test_a_difference_in_words(changes: dict[str, Any], axis: str, message: str) -> None:
    found = differences(family(row(**changes), ROWS[1]), table())
    assert Difference(("33b",) if changes.get("sizes") else ("7b",), axis, message) in found


@pytest.mark.parametrize("field", ["source", "replicated_kv_heads"])
def test_who_says_so_and_copies_of_heads_are_compared(field: str) -> None:
    other = {"source": "zoo", "replicated_kv_heads": True}
    assert [d.axis for d in differences(family(row(**{field: other[field]}), ROWS[1]), table())] == [field]


def test_a_row_that_is_there_twice_is_a_difference() -> None:
    twice = family().model_copy(update={"rows": (*ROWS, ROWS[0])})
    assert [found.axis for found in differences(twice, table())] == ["rows"]
    assert [found.message.partition(" (")[0] for found in differences(family(), table(LINE, LINE))] == [
        "7b: two lines of the table offer the same"
    ] * len(boxes(table().statement.cells))


def test_denials_are_compared_with_their_source() -> None:
    other = (*DENIALS[:2], DENIALS[2].model_copy(update={"source": "zoo"}))
    found = differences(family(denials=other), table())
    assert [(difference.axis, difference.message) for difference in found] == [
        (
            "denials",
            "7b: the matrix quotes a no of zoo to serving tgi on atlas_300i_duo, atlas_800i_a2, which the table does "
            "not have",
        ),
        (
            "denials",
            f"7b: the table has a no of {README} to serving tgi on atlas_300i_duo, atlas_800i_a2, which the matrix "
            "does not quote",
        ),
    ]


def test_of_a_denied_product_nothing_else_is_compared() -> None:
    denied = table({**LINE, "hardware": {"atlas_800i_a2": "tp 1, 2", "atlas_300i_duo": "no"}})
    product = Denial(sizes=("7b",), hardware=(), axis="hardware", values=("atlas_300i_duo",), source=README)
    assert differences(family(ROWS[0], denials=(*DENIALS, product)), denied) == []
    found = differences(family(ROWS[0]), denied)
    assert [difference.axis for difference in found] == ["denials"] * len(found)
    assert any("the table has a no of README of a vendor to hardware atlas_300i_duo" in d.message for d in found)


def test_what_excludes_each_other_is_not_offered() -> None:
    conflict = Conflict(first=("dtype", "bfloat16"), second=("serving", "mindie_service"), reason="they clash")
    (found,) = differences(family(conflicts=(conflict,)), table())
    assert found.message.startswith("7b: the table offers serving mindie_service and the matrix does not")
    assert "bfloat16" in found.message


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_plugin_with_tables"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "truth.json").write_text('{"about": "", "tables": [{"lines": []}]}', encoding="utf-8")
    (package / "latin.json").write_bytes(b"\xe9")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"a_plugin_with_tables:truth\.json\.tables\.0\.source: field required"):
        read_truth("a_plugin_with_tables:truth.json")
    for name in ("a_plugin_with_tables:latin.json", "a_plugin_with_tables:other.json", "no_such_plugin:truth.json"):
        with pytest.raises(PluginError, match=f"cannot read the truth table {name}"):
            read_truth(name)


VALUES = st.tuples(*(st.integers(0, 2) for _ in range(4)))


@given(st.sets(VALUES, max_size=40))
def test_boxes_hold_the_same_combinations_once(combinations: set[tuple[int, ...]]) -> None:
    held = [cell for box in boxes(combinations) for cell in itertools.product(*box)]
    assert sorted(held) == sorted(combinations)


def test_a_row_multiplies_out_to_its_combinations() -> None:
    cells = row_cells(row(parallelism=("tp", "pp"), serving=("offline",), dtype=("float16",)))
    plain = ("paged", "none", "auto", False, "offline")
    assert cells == tuple(
        Cell("7b", "atlas_800i_a2", "float16", s, *plain) for s in [(1,) * 4, (2, 1, 1, 1), (1, 2, 1, 1)]
    )
