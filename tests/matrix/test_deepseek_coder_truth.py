"""deepseek_coder's matrix, asked for every combination, against the table that is written by hand from its sources."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from npu_zoo.core.cells import Cell
from npu_zoo.core.features import AXES, Verdict, layout_names
from npu_zoo.core.parallel import Split
from npu_zoo.core.truth import read_truth
from npu_zoo.registry import get_registry

STATED = {
    cell
    for cell, (terms,) in read_truth(get_registry().families["deepseek_coder"].truth).statement.cells.items()
    if terms.status == "supported"
}

SIZES = ("1.3b", "6.7b", "7b", "33b")
HARDWARE = ("atlas_800i_a2", "atlas_300i_duo", "atlas_800t_a2")
WORLD_SIZES = tuple(range(1, 9))
DTYPES = ("float16", "bfloat16")
ATTENTION = ("flash", "paged")
QUANTIZATION = ("none", "w8a8", "w8a16", "w4a16", "sparse")
EXTRAS = tuple(itertools.product(("auto", "int8"), (False, True), ("offline", "mindie_service", "tgi")))
QUOTED = "DeepSeek-Coder README of the MindIE ATB model zoo"


def offered(size: str, hardware: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """World sizes and dtypes that the sources state for a size on a product."""
    stated = [cell for cell in STATED if cell[:2] == (size, hardware)]
    world_sizes = sorted({Split(*cell.split).world_size for cell in stated})
    return tuple(world_sizes), tuple(dtype for dtype in DTYPES if dtype in {cell.dtype for cell in stated})


def truth(size: str, request: dict[str, Any]) -> bool:
    axes = {axis: value for axis, value in request.items() if axis != "world_size"}
    return Cell(size=size, split=(request["world_size"], 1, 1, 1), **axes) in STATED


def cell(hardware: str, dtype: str, world_size: int, **others: Any) -> dict[str, Any]:
    request: dict[str, Any] = {"hardware": hardware, "dtype": dtype, "world_size": world_size, "attention": "paged"}
    request |= {"quantization": "none", "kv_cache_dtype": "auto", "long_sequence": False, "serving": "offline"}
    return request | others


def check(size: str, request: dict[str, Any], *, alternatives: bool = True) -> Verdict:
    family, _ = get_registry().find(f"deepseek_coder:{size}")
    layout = layout_names(Split(request["world_size"]))
    axes = {"parallelism": layout, **request}
    return family.matrix.check(f"deepseek_coder:{size}", size, axes, alternatives=alternatives)


def cells(hardware: str) -> list[dict[str, Any]]:
    product = itertools.product(DTYPES, WORLD_SIZES, ATTENTION, QUANTIZATION)
    return [cell(hardware, d, w, attention=a, quantization=q) for d, w, a, q in product]


SUPPORTED = [(s, r) for s in SIZES for h in HARDWARE for r in cells(h) if truth(s, r)]


def test_truth_table_has_the_cells_of_the_documents() -> None:
    # 1.3b 4, 6.7b and 7b 4 x 2 + 2, 33b 2 + 1; twice for two kinds of attention.
    assert len(SUPPORTED) == 2 * (4 + 2 * (8 + 2) + 3)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("size", SIZES)
def test_every_cell(size: str, hardware: str) -> None:
    product = itertools.product(cells(hardware), EXTRAS)
    requests = [r | {"kv_cache_dtype": kv, "long_sequence": long, "serving": s} for r, (kv, long, s) in product]
    assert [r for r in requests if check(size, r, alternatives=False).supported != truth(size, r)] == []


@pytest.mark.parametrize(("size", "hardware"), [(s, h) for s in SIZES for h in HARDWARE if offered(s, h)[0]])
def test_one_wrong_value_fails_on_its_axis_alone_and_names_what_is_left(size: str, hardware: str) -> None:
    world_sizes, dtypes = offered(size, hardware)
    left: dict[str, tuple[Any, ...]] = {"world_size": world_sizes, "dtype": dtypes, "quantization": ("none",)}
    left |= {"kv_cache_dtype": ("auto",), "long_sequence": (False,), "serving": ("offline",)}
    asked: dict[str, tuple[Any, ...]] = {"world_size": WORLD_SIZES, "dtype": DTYPES, "quantization": QUANTIZATION}
    asked |= {"kv_cache_dtype": ("int8",), "long_sequence": (True,), "serving": ("mindie_service", "tgi")}
    for axis, value in ((axis, v) for axis, values in asked.items() for v in values if v not in left[axis]):
        request = cell(hardware, dtypes[0], world_sizes[0]) | {axis: value}
        (reason,) = check(size, request).reasons
        assert (reason.axis, reason.value, set(reason.supported)) == (axis, value, set(left[axis]))
        assert all(str(v).lower() in reason.message for v in (axis, value, f"deepseek_coder:{size}", *left[axis]))


@pytest.mark.parametrize(("size", "hardware"), [(s, h) for s in SIZES for h in HARDWARE if not offered(s, h)[0]])
def test_a_product_that_no_source_names_fails_on_hardware(size: str, hardware: str) -> None:
    reason = check(size, cell(hardware, "float16", 4)).reasons[0]
    expected = {h for h in HARDWARE if offered(size, h)[0]}
    assert reason.axis == "hardware"
    assert set(reason.supported) & set(HARDWARE) == expected


def test_all_failing_axes_are_named_at_once() -> None:
    asked = {"attention": "flash", "quantization": "w8a8", "kv_cache_dtype": "int8"}
    verdict = check("33b", cell("atlas_800i_a2", "float16", 3, long_sequence=True, serving="tgi", **asked))
    failing = ["dtype", "world_size", "quantization", "kv_cache_dtype", "long_sequence", "serving"]
    assert [reason.axis for reason in verdict.reasons] == failing
    assert verdict.describe().count("is not supported by deepseek_coder:33b") == len(failing)


def test_the_message_of_the_design() -> None:
    message = check("33b", cell("atlas_800i_a2", "bfloat16", 2)).reasons[0].message
    assert message == (
        "world_size=2 is not supported by deepseek_coder:33b on atlas_800i_a2 with bfloat16; supported: 4, 8"
    )


DENIED = [
    ("1.3b", cell("atlas_300i_duo", "float16", 2), "hardware"),
    ("33b", cell("atlas_300i_duo", "float16", 4), "hardware"),
    ("1.3b", cell("atlas_800i_a2", "float16", 1), "dtype"),
    ("33b", cell("atlas_800i_a2", "float16", 8), "dtype"),
    ("6.7b", cell("atlas_300i_duo", "bfloat16", 2), "dtype"),
    ("6.7b", cell("atlas_800i_a2", "float16", 1, quantization="w8a8"), "quantization"),
    ("7b", cell("atlas_800i_a2", "float16", 1, quantization="w8a16"), "quantization"),
    ("7b", cell("atlas_300i_duo", "float16", 2, quantization="sparse"), "quantization"),
    ("33b", cell("atlas_800i_a2", "bfloat16", 4, kv_cache_dtype="int8"), "kv_cache_dtype"),
    ("1.3b", cell("atlas_800i_a2", "bfloat16", 4, long_sequence=True), "long_sequence"),
    ("6.7b", cell("atlas_300i_duo", "float16", 4, serving="mindie_service"), "serving"),
    ("6.7b", cell("atlas_800i_a2", "bfloat16", 4, serving="tgi"), "serving"),
]


@pytest.mark.parametrize(("size", "request_", "axis"), DENIED)
def test_a_cell_that_the_source_denies_is_quoted(size: str, request_: dict[str, Any], axis: str) -> None:
    reason = next(r for r in check(size, request_).reasons if r.axis == axis)
    assert f"the {QUOTED} says no" in reason.message


def test_what_the_source_does_not_speak_of_is_not_put_in_its_mouth() -> None:
    reason = check("6.7b", cell("atlas_800i_a2", "float16", 1, quantization="w4a16")).reasons[0]
    assert "says no" not in reason.message


@pytest.mark.parametrize("size", ["1.3b", "33b"])
def test_float16_is_refused_with_bfloat16_as_the_nearest(size: str) -> None:
    verdict = check(size, cell("atlas_800i_a2", "float16", 4))
    assert verdict.reasons[0].supported == ("bfloat16",)
    assert verdict.alternatives[0] | {"dtype": "float16"} == verdict.request | {"parallelism": "tp"}
    assert verdict.alternatives[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("size", SIZES)
def test_every_alternative_passes_and_there_are_at_most_three(size: str, hardware: str) -> None:
    for request in (r for r in cells(hardware) if not truth(size, r)):
        alternatives = check(size, request).alternatives
        assert 1 <= len(alternatives) <= 3
        assert all(check(size, dict(alternative)).supported for alternative in alternatives)


@pytest.mark.parametrize(("size", "request_"), SUPPORTED)
def test_a_wrong_world_size_alone_is_answered_with_the_nearest_ones_first(size: str, request_: dict[str, Any]) -> None:
    right = offered(size, request_["hardware"])[0]
    for wrong in set(WORLD_SIZES) - set(right):
        alternatives = check(size, request_ | {"world_size": wrong}).alternatives
        changed = [{axis for axis in AXES[4:] + AXES[:2] if a[axis] != request_[axis]} for a in alternatives]
        by_distance = sorted(right, key=lambda w: (abs(w - wrong), w))
        kept = [a["world_size"] for a, axes in zip(alternatives, changed, strict=True) if not axes]
        assert kept == by_distance[: len(alternatives)][: len(kept)]
        assert len(kept) == min(3, len(right))
        assert changed == sorted(changed, key=len)
