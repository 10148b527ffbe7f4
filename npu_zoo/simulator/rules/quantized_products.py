"""Rows: matrix products of quantised activations and weights."""

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
    empty,
    first,
    given,
    rank_outside,
    shape,
    size_not_within,
)  # fmt: skip
from npu_zoo.simulator.rules.table import FRACTAL_NZ, UNDOCUMENTED, Call, Rule, format_of, on

_MATMUL = ("npu::npu_quant_matmul",)
_MATMUL_PAGE = "op-plugin, torch_npu-npu_quant_matmul.md"
_FIELD = "vllm-ascend, vllm_ascend/_310p/quantization/methods/"
_LIMIT = 65535
_BOTH = on()


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


RULES: list[Rule] = [
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
]  # fmt: skip
