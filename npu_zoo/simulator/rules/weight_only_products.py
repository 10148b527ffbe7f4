"""Rows: matrix products with weights that alone are quantised."""

from __future__ import annotations

from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HALVES,
    INT8,
    INT32,
    INT64,
    dtype_differs,
    dtype_outside,
    empty,
    first,
    fractal_nz,
    given,
    has_dtype,
    is_given,
    not_contiguous,
    rank_outside,
    shape,
    shape_differs,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import UNDOCUMENTED, Call, Rule, on

_WEIGHT = ("npu::npu_weight_quant_batchmatmul",)
_WEIGHT_PAGE = "op-plugin, torch_npu-npu_weight_quant_batchmatmul.md"
_BOTH = on()


def _weight_reduction(call: Call) -> str | None:
    x, weight = call["x"], call["weight"]
    if x.dim() != 2 or weight.dim() != 2:
        return None
    factor = 8 if weight.dtype == INT32 and not weight.is_contiguous() else 1
    if x.shape[1] == weight.shape[0] * factor:
        return None
    return f"x {shape(x)} and weight {shape(weight)} cannot be multiplied"


def _weight_columns(call: Call) -> int:
    weight = call["weight"]
    return int(weight.shape[-1] * (8 if weight.dtype == INT32 and weight.is_contiguous() else 1))


def _group_size(call: Call) -> str | None:
    size, rows = call["antiquant_group_size"], call["x"].shape[-1]
    if size == 0 or (32 <= size <= rows - 1 and size % 32 == 0):
        return None
    return f"antiquant_group_size is {size}, no multiple of 32 in [32, {rows - 1}]"


def _antiquant_shape(call: Call) -> str | None:
    scale, size, columns = call["antiquant_scale"], call["antiquant_group_size"], _weight_columns(call)
    by_channel: list[tuple[int, ...]] = [(1,), (1, 1), (1, columns), (columns,)]
    wanted = [(-(-call["x"].shape[-1] // size), columns)] if size else by_channel
    return (
        None
        if tuple(scale.shape) in wanted
        else f"antiquant_scale is {shape(scale)}, not {' or '.join(map(str, wanted))}"
    )


def _weight_bias(call: Call) -> str | None:
    bias, x = call["bias"], call["x"]
    if bias is None:
        return None
    wanted = FLOAT32 if x.dtype == BFLOAT16 else FLOAT16
    return None if bias.dtype == wanted else f"bias is {bias.dtype} where x is {x.dtype}, not {wanted}"


RULES: list[Rule] = [
    Rule(
        "npu_weight_quant_batchmatmul.dtype", _WEIGHT, "an x that is neither float16 nor bfloat16", on("ascend910b"),
        f"{_WEIGHT_PAGE}, x", dtype_outside(("x",), HALVES),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.dtype_310p", _WEIGHT, "an x that is not float16", on("ascend310p"),
        f"{_WEIGHT_PAGE}, x", dtype_outside(("x",), (FLOAT16,)),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.weight_dtype", _WEIGHT, "a weight that is neither int8 nor packed int4",
        on("ascend910b"), f"{_WEIGHT_PAGE}, weight", dtype_outside(("weight",), (INT8, INT32)),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.weight_dtype_310p", _WEIGHT, "a weight that is not int8", on("ascend310p"),
        f"{_WEIGHT_PAGE}, weight", dtype_outside(("weight",), (INT8,)),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.nz", _WEIGHT, "an NZ weight outside a compiled graph", on("ascend310p"),
        f"{_WEIGHT_PAGE}, weight, constraints", fractal_nz("weight"),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.nz_910b", _WEIGHT, "an NZ weight outside a compiled graph",
        on("ascend910b", value=UNDOCUMENTED),
        f"{_WEIGHT_PAGE}, constraints (graph mode alone); vllm-ascend, vllm_ascend/utils.py, maybe_trans_nz",
        fractal_nz("weight"),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.rank", _WEIGHT, "matrices of other dimensions", _BOTH,
        f"{_WEIGHT_PAGE}, x, weight", first(rank_outside("x", 2), rank_outside("weight", 2)),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.reduction", _WEIGHT, "matrices that cannot be multiplied", _BOTH,
        f"{_WEIGHT_PAGE}, constraints", _weight_reduction,
    ),
    Rule(
        "npu_weight_quant_batchmatmul.empty", _WEIGHT, "empty tensors", _BOTH, f"{_WEIGHT_PAGE}, constraints",
        empty("x", "weight", "antiquant_scale"),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.scale_dtype", _WEIGHT, "a scale of the weight of another dtype than x", _BOTH,
        f"{_WEIGHT_PAGE}, antiquant_scale",
        where(lambda call: call["antiquant_scale"].dtype != INT64, dtype_differs("x", "antiquant_scale")),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.packed_scale", _WEIGHT, "an int64 scale with bfloat16 or packed int4",
        on("ascend910b"), f"{_WEIGHT_PAGE}, antiquant_scale",
        where(
            has_dtype("antiquant_scale", INT64),
            first(
                dtype_outside(("x",), (FLOAT16,)), dtype_outside(("weight",), (INT8,)),
                given("quant_scale", "quant_offset"),
            ),
        ),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.packed_scale_310p", _WEIGHT, "an int64 scale", on("ascend310p"),
        f"{_WEIGHT_PAGE}, antiquant_scale", dtype_outside(("antiquant_scale",), (FLOAT16,)),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.scale_shape", _WEIGHT, "a scale of another shape", _BOTH,
        f"{_WEIGHT_PAGE}, antiquant_scale", _antiquant_shape,
    ),
    Rule(
        "npu_weight_quant_batchmatmul.offset_shape", _WEIGHT, "an offset of another shape than the scale", _BOTH,
        f"{_WEIGHT_PAGE}, constraints", shape_differs("antiquant_scale", "antiquant_offset"),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.offset_dtype", _WEIGHT, "an offset of another dtype than the scale", _BOTH,
        f"{_WEIGHT_PAGE}, antiquant_offset",
        where(has_dtype("antiquant_scale", *HALVES), dtype_differs("antiquant_scale", "antiquant_offset")),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.group_size", _WEIGHT, "a group that is no multiple of 32 within K - 1", _BOTH,
        f"{_WEIGHT_PAGE}, antiquant_group_size", _group_size,
    ),
    Rule(
        "npu_weight_quant_batchmatmul.bias_dtype", _WEIGHT, "a bias of another dtype", _BOTH,
        f"{_WEIGHT_PAGE}, bias", _weight_bias,
    ),
    Rule(
        "npu_weight_quant_batchmatmul.bias_contiguous", _WEIGHT, "a bias that is not contiguous", _BOTH,
        f"{_WEIGHT_PAGE}, bias", not_contiguous("bias"),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.quant_310p", _WEIGHT, "quantised results", on("ascend310p"),
        f"{_WEIGHT_PAGE}, quant_scale, quant_offset", given("quant_scale", "quant_offset"),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.quant_offset", _WEIGHT, "an offset of the results without a scale", _BOTH,
        f"{_WEIGHT_PAGE}, constraints",
        where(is_given("quant_offset"), lambda call: "quant_scale is None" if call["quant_scale"] is None else None),
    ),
    Rule(
        "npu_weight_quant_batchmatmul.inner_precise", _WEIGHT, "an inner_precise outside 0 and 1", _BOTH,
        f"{_WEIGHT_PAGE}, inner_precise", value_outside("inner_precise", 0, 1),
    ),
]  # fmt: skip
