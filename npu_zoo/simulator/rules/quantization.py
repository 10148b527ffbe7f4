"""Rows: quantisation of activations and weights."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HALVES,
    INT8,
    INT32,
    LAST,
    dtype_differs,
    dtype_named,
    dtype_outside,
    elements_decrease,
    empty,
    first,
    not_contiguous,
    rank_outside,
    shape,
    shape_differs,
    size_not_multiple,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import Call, Rule, on

_DYNAMIC = ("npu::npu_dynamic_quant",)
_DYNAMIC_PAGE = "op-plugin, torch_npu-npu_dynamic_quant.md"
_PARAM = ("npu::npu_trans_quant_param",)
_PARAM_PAGE = "op-plugin, torch_npu-npu_trans_quant_param.md"
_PACK = ("npu::npu_convert_weight_to_int4pack",)
_PACK_PAGE = "op-plugin, torch_npu-npu_convert_weight_to_int4pack.md"
_QUANTIZE = ("npu::npu_quantize",)
_QUANTIZE_PAGE = "op-plugin, torch_npu-npu_quantize.md"
_BOTH = on()


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


RULES: list[Rule] = [
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
