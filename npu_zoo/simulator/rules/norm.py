"""Rows: normalisations and gated activations."""

from __future__ import annotations

from npu_zoo.simulator.rules.detect import (
    FLOAT16,
    FLOAT32,
    FLOATS,
    HALVES,
    INT32,
    LAST,
    dtype_differs,
    dtype_outside,
    elements_decrease,
    empty,
    equals,
    first,
    has_dtype,
    missing,
    not_contiguous,
    rank_outside,
    shape,
    shape_differs,
    size_differs,
    size_not_multiple,
    size_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import UNDOCUMENTED, Call, Rule, on

_RMS = ("npu::npu_rms_norm",)
_RMS_PAGE = "op-plugin, （beta）torch_npu-npu_rms_norm.md"
_ADD = ("npu::npu_add_rms_norm",)
_ADD_PAGE = "op-plugin, torch_npu-npu_add_rms_norm.md"
_ADD_QUANT = ("npu::npu_add_rms_norm_quant",)
_ADD_QUANT_PAGE = "op-plugin, torch_npu-npu_add_rms_norm_quant.md"
_ADD_DYNAMIC = ("npu::npu_add_rms_norm_dynamic_quant",)
_ADD_DYNAMIC_PAGE = "op-plugin, torch_npu-npu_add_rms_norm_dynamic_quant.md"
_SWIGLU = ("npu::npu_swiglu",)
_SWIGLU_PAGE = "op-plugin, （beta）torch_npu-npu_swiglu.md"
_SWIGLU_QUANT = ("npu::npu_swiglu_quant",)
_SWIGLU_QUANT_PAGE = "op-plugin, torch_npu-npu_swiglu_quant.md"
_DEQUANT_SWIGLU = ("npu::npu_dequant_swiglu_quant",)
_DEQUANT_SWIGLU_PAGE = "op-plugin, torch_npu-npu_dequant_swiglu_quant.md"


def _not_trailing(name: str, call: Call) -> str | None:
    x, gamma = call[name], call["gamma"]
    if gamma.dim() and tuple(gamma.shape) == tuple(x.shape[x.dim() - gamma.dim() :]):
        return None
    return f"gamma is {shape(gamma)}, not the last dimensions of {name} {shape(x)}"


def _short_tail(call: Call) -> str | None:
    for name in ("input", "gamma"):
        tensor = call[name]
        size = tensor.shape[-1] * tensor.element_size() if tensor.dim() else 0
        if size < 32:
            return f"the last dimension of {name} has {size} bytes, less than 32"
    return None


def _odd_half(call: Call) -> str | None:
    x, dim = call["input"], call["dim"]
    if not -x.dim() <= dim < x.dim():
        return f"dim is {dim} for an input of {x.dim()} dimensions"
    return f"input.size({dim}) is {x.shape[dim]}, which is odd" if x.shape[dim] % 2 else None


def _scales_of_other_length(call: Call) -> str | None:
    scales, x = call["smooth_scales"], call["x"]
    if scales is None or (scales.dim() == 2 and scales.shape[1] == x.shape[-1] // 2) or scales.dim() == 1:
        return None
    return f"smooth_scales is {shape(scales)}, neither [G, {x.shape[-1] // 2}] nor [G]"


def _groups_beyond_rows(call: Call) -> str | None:
    groups, x = call["group_index"], call["x"]
    if groups is None or not groups.numel():
        return None
    total = int(groups.max() if call.get("group_list_type") == 0 else groups.sum())
    rows = x.numel() // x.shape[-1]
    return f"group_index covers {total} rows, x has {rows}" if total > rows else None


RULES: list[Rule] = [
    Rule(
        "npu_rms_norm.dtype", _RMS, "an input that is no float", on(), f"{_RMS_PAGE}, table of dtypes",
        dtype_outside(("input",), FLOATS),
    ),
    Rule(
        "npu_rms_norm.gamma_dtype", _RMS, "a gamma of another dtype than the input, float32 apart",
        on("ascend910b"), f"{_RMS_PAGE}, table of dtypes",
        where(lambda call: call["gamma"].dtype != FLOAT32, dtype_differs("input", "gamma")),
    ),
    Rule(
        "npu_rms_norm.gamma_dtype_310p", _RMS, "a gamma of another dtype than the input", on("ascend310p"),
        f"{_RMS_PAGE}, table of dtypes", dtype_differs("input", "gamma"),
    ),
    Rule(
        "npu_rms_norm.gamma_shape", _RMS, "a gamma that is not shaped as the input's last dimensions", on(),
        f"{_RMS_PAGE}, gamma", lambda call: _not_trailing("input", call),
    ),
    Rule(
        "npu_rms_norm.short_tail", _RMS, "a last dimension of less than 32 bytes", on("ascend310p"),
        f"{_RMS_PAGE}, constraints", _short_tail,
    ),
    Rule(
        "npu_add_rms_norm.dtype", _ADD, "inputs that are no floats", on(), f"{_ADD_PAGE}, parameters",
        dtype_outside(("x1", "x2", "gamma"), FLOATS),
    ),
    Rule(
        "npu_add_rms_norm.dtypes", _ADD, "a gamma or second addend of another dtype than x1", on(),
        f"{_ADD_PAGE}, gamma", dtype_differs("x1", "x2", "gamma"),
    ),
    Rule(
        "npu_add_rms_norm.shape", _ADD, "addends of different shapes", on(), f"{_ADD_PAGE}, parameters x1, x2",
        shape_differs("x1", "x2"),
    ),
    Rule(
        "npu_add_rms_norm.gamma_shape", _ADD, "a gamma that is not shaped as the last dimensions", on(),
        f"{_ADD_PAGE}, gamma", lambda call: _not_trailing("x1", call),
    ),
    Rule(
        "npu_add_rms_norm.empty", _ADD, "an empty tensor", on(), f"{_ADD_PAGE}, parameters",
        empty("x1", "x2", "gamma"),
    ),
    Rule(
        "npu_add_rms_norm_quant.dtype", _ADD_QUANT, "inputs that are neither float16 nor bfloat16", on("ascend910b"),
        f"{_ADD_QUANT_PAGE}, table of dtypes", dtype_outside(("x1", "x2", "gamma", "beta"), HALVES),
    ),
    Rule(
        "npu_add_rms_norm_quant.dtype_310p", _ADD_QUANT, "inputs that are not float16", on("ascend310p"),
        f"{_ADD_QUANT_PAGE}, table of dtypes", dtype_outside(("x1", "x2", "gamma", "beta"), (FLOAT16,)),
    ),
    Rule(
        "npu_add_rms_norm_quant.dtypes", _ADD_QUANT, "x2, gamma or beta of another dtype than x1", on(),
        f"{_ADD_QUANT_PAGE}, table of dtypes", dtype_differs("x1", "x2", "gamma", "beta"),
    ),
    Rule(
        "npu_add_rms_norm_quant.shape", _ADD_QUANT, "addends of different shapes", on(), f"{_ADD_QUANT_PAGE}, x2",
        shape_differs("x1", "x2"),
    ),
    Rule(
        "npu_add_rms_norm_quant.gamma_shape", _ADD_QUANT, "a gamma that is not shaped as the last dimensions", on(),
        f"{_ADD_QUANT_PAGE}, gamma", lambda call: _not_trailing("x1", call),
    ),
    Rule(
        "npu_add_rms_norm_quant.scale_dtype", _ADD_QUANT, "scales that are not float32 where the input is float16",
        on(), f"{_ADD_QUANT_PAGE}, table of dtypes",
        where(has_dtype("x1", FLOAT16), first(
            dtype_outside(("scales1", "scales2"), (FLOAT32,)), dtype_outside(("zero_points1", "zero_points2"), (INT32,))
        )),
    ),
    Rule(
        "npu_add_rms_norm_quant.scale_shape", _ADD_QUANT, "scales or offsets of another shape than gamma", on(),
        f"{_ADD_QUANT_PAGE}, scales1",
        shape_differs("gamma", "scales1", "zero_points1", "beta", "scales2", "zero_points2"),
    ),
    Rule(
        "npu_add_rms_norm_quant.short_tail", _ADD_QUANT, "a last dimension of less than 32 elements",
        on("ascend310p"), f"{_ADD_QUANT_PAGE}, constraints", size_not_within("x1", LAST, 32),
    ),
    Rule(
        "npu_add_rms_norm_dynamic_quant.dtype", _ADD_DYNAMIC, "inputs that are neither float16 nor bfloat16", on(),
        f"{_ADD_DYNAMIC_PAGE}, parameters", dtype_outside(("x1", "x2", "gamma"), HALVES),
    ),
    Rule(
        "npu_add_rms_norm_dynamic_quant.dtypes", _ADD_DYNAMIC, "another dtype than that of x1", on(),
        f"{_ADD_DYNAMIC_PAGE}, parameters",
        dtype_differs("x1", "x2", "gamma", "smooth_scale1", "smooth_scale2", "beta"),
    ),
    Rule(
        "npu_add_rms_norm_dynamic_quant.shape", _ADD_DYNAMIC, "addends of different shapes", on(),
        f"{_ADD_DYNAMIC_PAGE}, x2", shape_differs("x1", "x2"),
    ),
    Rule(
        "npu_add_rms_norm_dynamic_quant.gamma_shape", _ADD_DYNAMIC, "a gamma that is not the length of the rows",
        on(), f"{_ADD_DYNAMIC_PAGE}, gamma", first(rank_outside("gamma", 1), size_differs("gamma", 0, "x1", LAST)),
    ),
    Rule(
        "npu_swiglu.dtype", _SWIGLU, "an input that is no float", on(), f"{_SWIGLU_PAGE}, input",
        dtype_outside(("input",), FLOATS),
    ),
    Rule(
        "npu_swiglu.odd", _SWIGLU, "a dimension that cannot be halved", on(), f"{_SWIGLU_PAGE}, input", _odd_half,
    ),
    Rule(
        "npu_swiglu.contiguous", _SWIGLU, "an input that is not contiguous", on(), f"{_SWIGLU_PAGE}, input",
        not_contiguous("input"),
    ),
    Rule("npu_swiglu.empty", _SWIGLU, "an empty input", on(), f"{_SWIGLU_PAGE}, input", empty("input")),
    Rule(
        "npu_swiglu.narrow_310p", _SWIGLU, "rows whose length is no multiple of 32",
        on("ascend310p", value=UNDOCUMENTED),
        "vllm-ascend, vllm_ascend/_310p/ops/activation.py (falls back to silu and mul)",
        size_not_multiple("input", LAST, 32),
    ),
    Rule(
        "npu_swiglu_quant.dtype", _SWIGLU_QUANT, "an input that is no float", on(), f"{_SWIGLU_QUANT_PAGE}, x",
        dtype_outside(("x",), FLOATS),
    ),
    Rule(
        "npu_swiglu_quant.last_dim", _SWIGLU_QUANT, "rows that are odd, or longer than 8192", on(),
        f"{_SWIGLU_QUANT_PAGE}, x", first(size_not_multiple("x", LAST, 2), size_not_within("x", LAST, 2, 8192)),
    ),
    Rule(
        "npu_swiglu_quant.rank", _SWIGLU_QUANT, "an input of one dimension", on(), f"{_SWIGLU_QUANT_PAGE}, x",
        rank_outside("x", 2, 3, 4, 5, 6, 7, 8),
    ),
    Rule(
        "npu_swiglu_quant.scales", _SWIGLU_QUANT, "scales that are not float32, or of another shape", on(),
        f"{_SWIGLU_QUANT_PAGE}, smooth_scales",
        first(dtype_outside(("smooth_scales", "offsets"), (FLOAT32,)), _scales_of_other_length),
    ),
    Rule(
        "npu_swiglu_quant.group_index", _SWIGLU_QUANT, "group indices that are not int32", on(),
        f"{_SWIGLU_QUANT_PAGE}, group_index",
        first(dtype_outside(("group_index",), (INT32,)), rank_outside("group_index", 1)),
    ),
    Rule(
        "npu_swiglu_quant.group_values", _SWIGLU_QUANT, "group indices that decrease, or go beyond the rows", on(),
        f"{_SWIGLU_QUANT_PAGE}, group_index",
        first(where(equals("group_list_type", 0), elements_decrease("group_index")), _groups_beyond_rows),
        of_values=True,
    ),
    Rule(
        "npu_swiglu_quant.modes", _SWIGLU_QUANT, "a mode outside the documented ones", on(),
        f"{_SWIGLU_QUANT_PAGE}, quant_mode, group_list_type",
        first(value_outside("quant_mode", 0, 1), value_outside("group_list_type", 0, 1)),
    ),
    Rule(
        "npu_dequant_swiglu_quant.dtype", _DEQUANT_SWIGLU, "an input that is not int32, float16 or bfloat16", on(),
        f"{_DEQUANT_SWIGLU_PAGE}, x", dtype_outside(("x",), (INT32, *HALVES)),
    ),
    Rule(
        "npu_dequant_swiglu_quant.odd", _DEQUANT_SWIGLU, "rows of odd length", on(),
        f"{_DEQUANT_SWIGLU_PAGE}, constraints", size_not_multiple("x", LAST, 2),
    ),
    Rule(
        "npu_dequant_swiglu_quant.activation_scale", _DEQUANT_SWIGLU, "int32 without a scale per token", on(),
        f"{_DEQUANT_SWIGLU_PAGE}, activation_scale",
        where(has_dtype("x", INT32), missing("activation_scale")),
    ),
    Rule(
        "npu_dequant_swiglu_quant.scale_dtype", _DEQUANT_SWIGLU, "dequantisation scales that are not float32", on(),
        f"{_DEQUANT_SWIGLU_PAGE}, weight_scale, activation_scale",
        dtype_outside(("weight_scale", "activation_scale"), (FLOAT32,)),
    ),
    Rule(
        "npu_dequant_swiglu_quant.group_values", _DEQUANT_SWIGLU, "groups of more rows than there are", on(),
        f"{_DEQUANT_SWIGLU_PAGE}, constraints", _groups_beyond_rows, of_values=True,
    ),
]  # fmt: skip
