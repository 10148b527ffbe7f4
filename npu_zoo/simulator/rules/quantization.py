"""Rows: quantisation and quantised matrix products."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HALVES,
    INT8,
    INT32,
    INT64,
    LAST,
    dtype_differs,
    dtype_named,
    dtype_outside,
    elements_decrease,
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
    size_not_multiple,
    size_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import FRACTAL_NZ, UNDOCUMENTED, Call, Rule, format_of, on

_DYNAMIC = ("npu::npu_dynamic_quant",)
_DYNAMIC_PAGE = "op-plugin, torch_npu-npu_dynamic_quant.md"
_MATMUL = ("npu::npu_quant_matmul",)
_MATMUL_PAGE = "op-plugin, torch_npu-npu_quant_matmul.md"
_PARAM = ("npu::npu_trans_quant_param",)
_PARAM_PAGE = "op-plugin, torch_npu-npu_trans_quant_param.md"
_WEIGHT = ("npu::npu_weight_quant_batchmatmul",)
_WEIGHT_PAGE = "op-plugin, torch_npu-npu_weight_quant_batchmatmul.md"
_PACK = ("npu::npu_convert_weight_to_int4pack",)
_PACK_PAGE = "op-plugin, torch_npu-npu_convert_weight_to_int4pack.md"
_QUANTIZE = ("npu::npu_quantize",)
_QUANTIZE_PAGE = "op-plugin, torch_npu-npu_quantize.md"
_FIELD = "vllm-ascend, vllm_ascend/_310p/quantization/methods/"

_LIMIT = 65535


def _smooth_scales(call: Call) -> str | None:
    scales, groups, x = call["smooth_scales"], call["group_index"], call["input"]
    if scales is None:
        return "group_index is given without smooth_scales" if groups is not None else None
    wanted = (x.shape[-1],) if groups is None else (groups.shape[0], x.shape[-1])
    return None if tuple(scales.shape) == wanted else f"smooth_scales is {shape(scales)}, not {wanted}"


def _rows_of_groups(call: Call) -> str | None:
    groups, x = call["group_index"], call["input"]
    rows = x.numel() // x.shape[-1]
    if groups is None or not groups.numel() or int(groups[-1]) == rows:
        return None
    return f"group_index ends at {int(groups[-1])}, input has {rows} rows"


def _int4_rows(call: Call) -> str | None:
    if dtype_named(call.get("dst_type")) is not torch.quint4x2:
        return None
    return size_not_multiple("input", LAST, 8)(call)


def _destination(call: Call) -> str | None:
    wanted = dtype_named(call.get("dst_type"))
    return None if wanted in (None, INT8, torch.quint4x2) else f"dst_type is {wanted}, not torch.int8 or torch.quint4x2"


def _output(call: Call) -> torch.dtype:
    value = dtype_named(call["output_dtype"])
    return value if isinstance(value, torch.dtype) else INT8


def _columns(call: Call) -> int:
    x2 = call["x2"]
    packed_columns = x2.dtype == INT32 and x2.is_contiguous()
    return int(x2.shape[-1] * (8 if packed_columns else 1))


def _reduction(call: Call) -> str | None:
    x1, x2 = call["x1"], call["x2"]
    if x1.dim() < 2 or x2.dim() < 2:
        return None
    factor = 8 if x2.dtype == INT32 and x2.is_contiguous() else 1
    if x1.shape[-1] * factor == x2.shape[-2]:
        return None
    return f"x1 {shape(x1)} and x2 {shape(x2)} cannot be multiplied"


def _scale_length(call: Call) -> str | None:
    columns = _columns(call)
    for name in ("scale", "offset"):
        tensor = call[name]
        if tensor is not None and tensor.dim() == 1 and tensor.shape[0] not in (1, columns):
            return f"{name} is {shape(tensor)} for {columns} columns"
    return None


def _pertoken_shape(call: Call) -> str | None:
    scale, x1 = call["pertoken_scale"], call["x1"]
    if scale is None or (scale.dim() == 1 and scale.shape[0] == x1.shape[-2]):
        return None
    return f"pertoken_scale is {shape(scale)} for {x1.shape[-2]} tokens"


def _bias_shape(call: Call) -> str | None:
    bias, columns = call["bias"], _columns(call)
    if bias is None or (bias.dim() in (1, 3) and bias.shape[-1] == columns):
        return None
    return f"bias is {shape(bias)} for {columns} columns"


def _combination(call: Call) -> str | None:
    """Tables 1 and 2 of the page: what scale, bias and offset may be for an output dtype."""
    output, scale, pertoken = _output(call), call["scale"].dtype, call["pertoken_scale"] is not None
    if output is BFLOAT16:
        allowed: tuple[torch.dtype, ...] = (FLOAT32, BFLOAT16)
    elif output is FLOAT16:
        allowed = (FLOAT32,) if pertoken else (FLOAT32, INT64)
    else:
        allowed = (FLOAT32, BFLOAT16) if output is INT32 else (FLOAT32, INT64)
    if scale not in allowed:
        return f"scale is {scale} for results in {output}{' with pertoken_scale' if pertoken else ''}"
    return "pertoken_scale is given for results in torch.int8" if pertoken and output is INT8 else None


def _bias_combination(call: Call) -> str | None:
    output, bias, pertoken = _output(call), call["bias"], call["pertoken_scale"] is not None
    if bias is None:
        return None
    allowed: tuple[torch.dtype, ...] = (INT32,)
    if output is BFLOAT16 or (output is FLOAT16 and pertoken):
        allowed = (INT32, BFLOAT16, FLOAT32, FLOAT16) if pertoken else (INT32, BFLOAT16, FLOAT32)
    return None if bias.dtype in allowed else f"bias is {bias.dtype} for results in {output}"


def _half_bias(call: Call) -> str | None:
    bias = call["bias"]
    return (
        f"bias is {bias.dtype}"
        if bias is not None and call["pertoken_scale"] is not None and bias.dtype == FLOAT16
        else None
    )


def _offset_combination(call: Call) -> str | None:
    offset, output = call["offset"], _output(call)
    if offset is None or output is INT8 or offset.dim() == 2 or call["x1"].dtype == INT32:
        return None
    return f"offset is given for results in {output}"


def _float_bias(call: Call) -> str | None:
    bias = call["bias"]
    return f"bias is {bias.dtype}" if bias is not None and bias.dtype != INT32 else None


def _nz_not_transposed(call: Call) -> str | None:
    x2 = call["x2"]
    if format_of(x2) != FRACTAL_NZ or x2.dim() < 2 or x2.stride(-2) == 1:
        return None
    return f"x2 {shape(x2)} is FRACTAL_NZ and not transposed"


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


def _packable(call: Call) -> str | None:
    weight = call["weight"]
    if not weight.numel() or (int(weight.min()) >= -8 and int(weight.max()) <= 7):
        return None
    return f"weight holds values from {int(weight.min())} to {int(weight.max())}, not in [-8, 7]"


def _quantize_dtype(call: Call) -> str | None:
    wanted = dtype_named(call["dtype"])
    allowed = (torch.qint8, torch.quint8, INT32) if call["div_mode"] else (torch.qint8, torch.quint4x2)
    return None if wanted in allowed else f"dtype is {wanted} in div_mode {call['div_mode']}"


def _quantize_scales(call: Call) -> str | None:
    x, scales, axis = call["input"], call["scales"], call["axis"]
    if not call["div_mode"]:
        axis = -2 if axis == -2 else -1
    if scales.dim() != 1 or not -x.dim() <= axis < x.dim() or scales.shape[0] in (1, x.shape[axis]):
        return None
    return f"scales is {shape(scales)} for {x.shape[axis]} channels"


_BOTH = on()

_DYNAMIC_RULES = [
    Rule(
        "npu_dynamic_quant.dtype", _DYNAMIC, "an input that is neither float16 nor bfloat16", _BOTH,
        f"{_DYNAMIC_PAGE}, x", dtype_outside(("input", "smooth_scales"), HALVES),
    ),
    Rule(
        "npu_dynamic_quant.rank", _DYNAMIC, "an input of one dimension", _BOTH, f"{_DYNAMIC_PAGE}, x",
        rank_outside("input", 2, 3, 4, 5, 6, 7, 8),
    ),
    Rule(
        "npu_dynamic_quant.smooth_scales", _DYNAMIC, "smooth scales of another shape", _BOTH,
        f"{_DYNAMIC_PAGE}, constraints", _smooth_scales,
    ),
    Rule(
        "npu_dynamic_quant.group_index", _DYNAMIC, "group indices that are not int32", _BOTH,
        f"{_DYNAMIC_PAGE}, group_index",
        first(dtype_outside(("group_index",), (INT32,)), rank_outside("group_index", 1)),
    ),
    Rule(
        "npu_dynamic_quant.group_values", _DYNAMIC, "group indices that decrease, or do not cover the rows", _BOTH,
        f"{_DYNAMIC_PAGE}, constraints", first(elements_decrease("group_index"), _rows_of_groups), of_values=True,
    ),
    Rule(
        "npu_dynamic_quant.dst_type", _DYNAMIC, "another dst_type", _BOTH, f"{_DYNAMIC_PAGE}, dst_type",
        _destination,
    ),
    Rule(
        "npu_dynamic_quant.int4_rows", _DYNAMIC, "int4 rows that are no multiple of 8", _BOTH,
        f"{_DYNAMIC_PAGE}, x", _int4_rows,
    ),
]  # fmt: skip

_MATMUL_RULES = [
    Rule(
        "npu_quant_matmul.dtype", _MATMUL, "matrices that are neither int8 nor packed int4", on("ascend910b"),
        f"{_MATMUL_PAGE}, x1, x2", dtype_outside(("x1", "x2"), (INT8, INT32)),
    ),
    Rule(
        "npu_quant_matmul.dtype_310p", _MATMUL, "matrices that are not int8", on("ascend310p"),
        f"{_MATMUL_PAGE}, x1, x2", dtype_outside(("x1", "x2"), (INT8,)),
    ),
    Rule(
        "npu_quant_matmul.dtypes", _MATMUL, "matrices of different dtypes", _BOTH, f"{_MATMUL_PAGE}, x2",
        dtype_differs("x1", "x2"),
    ),
    Rule(
        "npu_quant_matmul.rank", _MATMUL, "matrices outside 2 to 6 dimensions", _BOTH, f"{_MATMUL_PAGE}, x1, x2",
        first(rank_outside("x1", 2, 3, 4, 5, 6), rank_outside("x2", 2, 3, 4, 5, 6)),
    ),
    Rule(
        "npu_quant_matmul.reduction", _MATMUL, "matrices that cannot be multiplied", _BOTH,
        f"{_MATMUL_PAGE}, formula", _reduction,
    ),
    Rule(
        "npu_quant_matmul.empty", _MATMUL, "empty tensors", _BOTH, f"{_MATMUL_PAGE}, constraints",
        empty("x1", "x2", "scale"),
    ),
    Rule(
        "npu_quant_matmul.last_dim", _MATMUL, "a last dimension above 65535", _BOTH, f"{_MATMUL_PAGE}, constraints",
        first(size_not_within("x1", LAST, 1, _LIMIT), size_not_within("x2", LAST, 1, _LIMIT)),
    ),
    Rule(
        "npu_quant_matmul.scale_dtype", _MATMUL, "a scale of another dtype", on("ascend910b"),
        f"{_MATMUL_PAGE}, scale", dtype_outside(("scale",), (FLOAT32, INT64, BFLOAT16)),
    ),
    Rule(
        "npu_quant_matmul.scale_dtype_310p", _MATMUL, "a scale that is neither float32 nor int64", on("ascend310p"),
        f"{_MATMUL_PAGE}, scale", dtype_outside(("scale",), (FLOAT32, INT64)),
    ),
    Rule(
        "npu_quant_matmul.scale_length", _MATMUL, "a scale of another length", _BOTH, f"{_MATMUL_PAGE}, scale",
        _scale_length,
    ),
    Rule(
        "npu_quant_matmul.output_dtype", _MATMUL, "results in another dtype", on("ascend910b"),
        f"{_MATMUL_PAGE}, output_dtype",
        lambda call: None if _output(call) in (INT8, *HALVES, INT32) else f"output_dtype is {_output(call)}",
    ),
    Rule(
        "npu_quant_matmul.output_dtype_310p", _MATMUL, "results that are neither int8 nor float16",
        on("ascend310p"), f"{_MATMUL_PAGE}, output_dtype",
        lambda call: None if _output(call) in (INT8, FLOAT16) else f"output_dtype is {_output(call)}",
    ),
    Rule(
        "npu_quant_matmul.pertoken_dtype", _MATMUL, "scales of tokens that are not float32", _BOTH,
        f"{_MATMUL_PAGE}, pertoken_scale", dtype_outside(("pertoken_scale",), (FLOAT32,)),
    ),
    Rule(
        "npu_quant_matmul.pertoken_shape", _MATMUL, "scales of tokens of another length", _BOTH,
        f"{_MATMUL_PAGE}, pertoken_scale", _pertoken_shape,
    ),
    Rule(
        "npu_quant_matmul.pertoken_310p", _MATMUL, "scales of tokens", on("ascend310p", value=UNDOCUMENTED),
        f"{_MATMUL_PAGE}, pertoken_scale (not supported); used in {_FIELD}w8a8_dynamic.py", given("pertoken_scale"),
    ),
    Rule(
        "npu_quant_matmul.combination", _MATMUL, "a scale that does not go with the results", on("ascend910b"),
        f"{_MATMUL_PAGE}, table 2", _combination,
    ),
    Rule(
        "npu_quant_matmul.bias", _MATMUL, "a bias that does not go with the results", on("ascend910b"),
        f"{_MATMUL_PAGE}, table 2", _bias_combination,
    ),
    Rule(
        "npu_quant_matmul.half_bias", _MATMUL, "a bias of float16 beside scales of tokens",
        on("ascend910b", value=UNDOCUMENTED), f"{_MATMUL_PAGE}, table 2 does not list it, its parameter bias does",
        _half_bias,
    ),
    Rule(
        "npu_quant_matmul.bias_310p", _MATMUL, "a bias that is not int32", on("ascend310p"),
        f"{_MATMUL_PAGE}, table 1", _float_bias,
    ),
    Rule(
        "npu_quant_matmul.bias_shape", _MATMUL, "a bias of another shape", _BOTH, f"{_MATMUL_PAGE}, bias",
        _bias_shape,
    ),
    Rule(
        "npu_quant_matmul.offset", _MATMUL, "an offset for results that are not int8", _BOTH,
        f"{_MATMUL_PAGE}, tables 1 and 2", _offset_combination,
    ),
    Rule(
        "npu_quant_matmul.nz_310p", _MATMUL, "an NZ weight that is not transposed", on("ascend310p"),
        f"{_MATMUL_PAGE}, constraints", _nz_not_transposed,
    ),
    Rule(
        "npu_trans_quant_param.dtype", _PARAM, "scales that are not float32", _BOTH, f"{_PARAM_PAGE}, scale, offset",
        dtype_outside(("scale", "offset"), (FLOAT32,)),
    ),
    Rule(
        "npu_trans_quant_param.contiguous", _PARAM, "scales that are not contiguous", _BOTH,
        f"{_PARAM_PAGE}, scale, offset", not_contiguous("scale", "offset"),
    ),
    Rule(
        "npu_trans_quant_param.empty", _PARAM, "empty scales", _BOTH, f"{_PARAM_PAGE}, scale, offset",
        empty("scale", "offset"),
    ),
    Rule(
        "npu_trans_quant_param.rank", _PARAM, "scales of other dimensions", _BOTH, f"{_PARAM_PAGE}, scale, offset",
        first(rank_outside("scale", 1, 2), rank_outside("offset", 1, 2)),
    ),
    Rule(
        "npu_trans_quant_param.round_mode", _PARAM, "a round_mode outside 0 and 1", _BOTH,
        f"{_PARAM_PAGE}, round_mode", value_outside("round_mode", 0, 1, None),
    ),
]  # fmt: skip

_WEIGHT_RULES = [
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
    Rule(
        "npu_convert_weight_to_int4pack.dtype", _PACK, "a weight that is not int32", _BOTH, f"{_PACK_PAGE}, weight",
        dtype_outside(("weight",), (INT32,)),
    ),
    Rule(
        "npu_convert_weight_to_int4pack.contiguous", _PACK, "a weight that is not contiguous", _BOTH,
        f"{_PACK_PAGE}, weight", not_contiguous("weight"),
    ),
    Rule(
        "npu_convert_weight_to_int4pack.last_dim", _PACK, "rows that are no multiple of 8", _BOTH,
        f"{_PACK_PAGE}, weight", size_not_multiple("weight", LAST, 8),
    ),
    Rule(
        "npu_convert_weight_to_int4pack.values", _PACK, "values that int4 does not hold", _BOTH,
        f"{_PACK_PAGE}, weight", _packable, of_values=True,
    ),
    Rule(
        "npu_quantize.dtype", _QUANTIZE, "an input that is no float", on("ascend910b"), f"{_QUANTIZE_PAGE}, input",
        dtype_outside(("input",), (FLOAT32, *HALVES)),
    ),
    Rule(
        "npu_quantize.dtype_310p", _QUANTIZE, "an input that is neither float32 nor float16", on("ascend310p"),
        f"{_QUANTIZE_PAGE}, input", dtype_outside(("input",), (FLOAT32, FLOAT16)),
    ),
    Rule(
        "npu_quantize.scale_dtype", _QUANTIZE, "scales of another dtype", _BOTH, f"{_QUANTIZE_PAGE}, scales",
        lambda call: dtype_outside(("scales",), (FLOAT32, BFLOAT16))(call)
        if call["div_mode"]
        else dtype_differs("input", "scales", "zero_points")(call),
    ),
    Rule(
        "npu_quantize.target", _QUANTIZE, "another dtype of results", _BOTH, f"{_QUANTIZE_PAGE}, dtype",
        _quantize_dtype,
    ),
    Rule(
        "npu_quantize.scale_length", _QUANTIZE, "scales of another length", _BOTH, f"{_QUANTIZE_PAGE}, scales",
        _quantize_scales,
    ),
    Rule(
        "npu_quantize.zero_points", _QUANTIZE, "offsets of another shape than the scales", _BOTH,
        f"{_QUANTIZE_PAGE}, zero_points",
        where(lambda call: not call["div_mode"], shape_differs("scales", "zero_points")),
    ),
    Rule(
        "npu_quantize.int4_rows", _QUANTIZE, "int4 rows that are no multiple of 8", _BOTH, f"{_QUANTIZE_PAGE}, input",
        where(lambda call: dtype_named(call["dtype"]) is torch.quint4x2, size_not_multiple("input", LAST, 8)),
    ),
    Rule(
        "npu_quantize.int4_310p", _QUANTIZE, "int4, or the axis -2", on("ascend310p"),
        f"{_QUANTIZE_PAGE}, constraints",
        where(
            lambda call: not call["div_mode"],
            lambda call: "int4 or axis -2 is asked for"
            if dtype_named(call["dtype"]) is torch.quint4x2 or call["axis"] == -2
            else None,
        ),
    ),
]  # fmt: skip

RULES: list[Rule] = _DYNAMIC_RULES + _MATMUL_RULES + _WEIGHT_RULES
