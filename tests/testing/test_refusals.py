"""Combinations beside a row: the built-in matrices answer as their tables say, and one that does not is found out."""

from __future__ import annotations

from typing import Any

import pytest

from npu_zoo.core.cells import matrix_statement
from npu_zoo.core.features import AXES, Conflict, FeatureMatrix, Verdict
from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import get_registry
from npu_zoo.testing.validation import refusals
from npu_zoo.testing.validation.refusals import check_row, known_values, refusal_faults, row_refusals

FAMILIES = get_registry().families
CODER = FAMILIES["deepseek_coder"]
DUO = next(number for number, row in enumerate(CODER.rows) if row.hardware == ("atlas_300i_duo",))
CUSTOM = next(n for n, row in enumerate(CODER.rows) if row.sizes == ("custom",) and "atlas_300i_duo" in row.hardware)


def changed(number: int, family: FamilySpec = CODER, **changes: Any) -> FamilySpec:
    rows = list(family.rows)
    rows[number] = rows[number].model_copy(update=changes)
    return family.model_copy(update={"rows": tuple(rows)})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_answered_as_the_table_says(name: str) -> None:
    assert refusal_faults(FAMILIES[name]) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_table_the_rows_are_multiplied_out(name: str) -> None:
    alone = FAMILIES[name].model_copy(update={"truth": ""})
    for number in range(0, len(alone.rows), 4):
        asked, faults = row_refusals(alone, number)
        assert faults == []
        assert asked > 300


def test_every_axis_is_changed_to_every_value_for_every_size_and_product() -> None:
    asked = {(v.model, *v.request.items()) for v in _verdicts_of(DUO)}
    for size in CODER.rows[DUO].sizes:
        of_size = [dict(values) for model, *values in asked if model == f"deepseek_coder:{size}"]
        for axis, values in known_values(CODER, get_registry()).items():
            if axis in AXES:
                assert {request[axis] for request in of_size} == set(values)
        assert {request["world_size"] for request in of_size} >= {*range(1, 9), 16, 32, 64}
    assert {model for model, *_ in asked} == {f"deepseek_coder:{variant.size}" for variant in CODER.variants}


def _verdicts_of(number: int) -> list[Verdict]:
    found: list[Verdict] = []
    check = FeatureMatrix.check

    def kept(self: FeatureMatrix, *args: Any, **options: Any) -> Verdict:
        found.append(check(self, *args, **options))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureMatrix, "check", kept)
        asked, faults = row_refusals(CODER, number)
    assert (len(found), faults) == (asked, [])
    return found


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"dtype": ("float16", "bfloat16")},
            "deepseek_coder:6.7b: atlas_300i_duo; bfloat16; tp4; paged: is accepted, and its truth table does not",
        ),
        (
            {"world_size": (2,)},
            "deepseek_coder:6.7b: atlas_300i_duo; float16; tp4; flash: is refused, and its truth table offers it",
        ),
        (
            {"status": "experimental"},
            "deepseek_coder:6.7b: atlas_300i_duo; float16; tp2; flash: is refused, and its truth table offers it",
        ),
        (
            {"sizes": ("6.7b",)},
            "deepseek_coder:7b: atlas_300i_duo; float16; tp2; paged: is refused, and its truth table offers it",
        ),
    ],
)
def test_a_wrong_row_is_found_out(changes: dict[str, Any], fault: str) -> None:
    asked, faults = row_refusals(changed(DUO, **changes), DUO)
    assert any(line.startswith(fault) for line in faults), faults
    assert len(faults) < asked / 20


def test_a_cell_that_should_be_experimental_is_found_out() -> None:
    _, faults = row_refusals(changed(CUSTOM, status="supported"), CUSTOM)
    assert any("is accepted, and its truth table does not offer it" in line for line in faults)


def test_a_matrix_of_independent_columns_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bfloat16 is offered of the size, and its product too; together they are not."""
    check = FeatureMatrix.check

    def by_column(self: FeatureMatrix, model: str, size: str, request: dict[str, Any], **options: Any) -> Verdict:
        verdict = check(self, model, size, request, **options)
        kept = tuple(reason for reason in verdict.reasons if reason.axis != "dtype")
        return verdict.model_copy(update={"supported": not kept, "reasons": kept})

    monkeypatch.setattr(FeatureMatrix, "check", by_column)
    faults = [fault for fault in check_row(CODER, DUO) if fault]
    assert {(fault.row, fault.axis, fault.kind) for fault in faults} == {
        (DUO, "dtype", "is accepted, and its truth table does not offer it"),
        (DUO, "dtype", "is accepted with --allow-experimental, and its truth table does not offer it"),
    }


def test_a_refusal_for_another_axis_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check = FeatureMatrix.check

    def for_serving(self: FeatureMatrix, *args: Any, **options: Any) -> Verdict:
        verdict = check(self, *args, **options)
        changed = tuple(r.model_copy(update={"axis": "serving"}) for r in verdict.reasons if r.axis == "dtype")
        return verdict.model_copy(update={"reasons": changed or verdict.reasons})

    monkeypatch.setattr(FeatureMatrix, "check", for_serving)
    _, faults = row_refusals(CODER, DUO, axes=["dtype"])
    assert faults
    assert all("is refused for serving, and to blame is dtype alone" in line for line in faults)
    assert row_refusals(CODER, DUO, axes=["attention", "quantization"])[1] == []


def test_a_refusal_that_names_a_further_axis_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check = FeatureMatrix.check

    def for_more(self: FeatureMatrix, *args: Any, **options: Any) -> Verdict:
        verdict = check(self, *args, **options)
        more = tuple(reason.model_copy(update={"axis": "hardware"}) for reason in verdict.reasons[:1])
        return verdict.model_copy(update={"reasons": verdict.reasons + more})

    monkeypatch.setattr(FeatureMatrix, "check", for_more)
    _, faults = row_refusals(CODER, DUO, axes=["split", "kv_cache_dtype"])
    assert any("is refused for hardware, split, and to blame is its split" in line for line in faults)
    assert any("is refused for hardware, kv_cache_dtype, and to blame is kv_cache_dtype alone" in f for f in faults)


def test_a_refusal_that_is_silent_about_the_flag_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureMatrix, "_with_experimental", lambda self, model, size, request, reasons: reasons)
    _, faults = row_refusals(CODER, CUSTOM, axes=[])
    (fault,) = faults
    assert "is experimental, and the refusal of hardware does not name --allow-experimental" in fault


def test_a_value_of_another_row_moves_the_blame_behind_it() -> None:
    """With int8 in the cache a demo runs on one device, so a request for several is refused for their number."""
    number = next(n for n, row in enumerate(CODER.rows) if row.hardware == ("cuda",))
    rows = (CODER.rows[number], CODER.rows[number].model_copy(update={"dtype": ("float16",), "serving": ("tgi",)}))
    rows = (rows[0].model_copy(update={"dtype": ("float32",)}), rows[1])
    alone = CODER.model_copy(update={"rows": rows, "truth": ""})
    assert row_refusals(alone, 0)[1] == row_refusals(alone, 1)[1] == []
    request = next(iter(matrix_statement(alone).cells)).request | {"dtype": "float16"}
    verdict = alone.matrix.check("m", "1.3b", request, allow_experimental=True)
    assert [reason.axis for reason in verdict.reasons] == ["serving"]


def test_what_excludes_each_other_is_refused() -> None:
    conflict = Conflict(first=("attention", "flash"), second=("dtype", "float16"), reason="they clash")
    clashing = CODER.model_copy(update={"conflicts": (conflict,), "truth": ""})
    assert row_refusals(clashing, DUO)[1] == []
    faults = row_refusals(clashing.model_copy(update={"truth": CODER.truth}), DUO)[1]
    assert any("flash: is refused, and its truth table offers it" in line for line in faults)


def test_faults_of_one_kind_are_told_once() -> None:
    _, faults = row_refusals(changed(DUO, quantization=("none", "w8a8")), DUO, axes=[])
    assert len(faults) == 2
    assert all("more like it)" in line for line in faults)
    assert sum(fault is not None for fault in check_row(changed(DUO, quantization=("w8a8",)), DUO, axes=[])) > 2


def test_an_axis_of_every_cell_is_asked() -> None:
    assert set(refusals.NEIGHBOURS) == set(known_values(CODER, get_registry()))
