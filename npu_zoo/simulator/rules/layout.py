"""Rows: storage formats, and matrix products outside quantisation."""

from __future__ import annotations

from npu_zoo.simulator.rules.detect import (
    FLOAT32,
    FLOATS,
    INT64,
    LAST,
    dtype_differs,
    dtype_outside,
    equals,
    first,
    fractal_nz,
    given,
    is_given,
    rank_outside,
    shape,
    size_not_multiple,
    size_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import FRACTAL_NZ, UNDOCUMENTED, Call, Rule, format_of, on

_CAST = ("npu::npu_format_cast", "npu::_npu_format_cast", "npu::npu_format_cast_")
_CAST_PAGE = "op-plugin, （beta）torch_npu-npu_format_cast.md"
_PRODUCTS = ("aten::mm", "aten::matmul", "aten::addmm", "aten::linear", "aten::bmm", "aten::baddbmm")
_NZ_FIELD = "vllm-ascend, vllm_ascend/utils.py, maybe_trans_nz"
_VECTOR_FIELD = "vllm-ascend, vllm_ascend/ops/linear.py, _should_keep_nd_for_310p_weight (310P rejects n=1 or k=1)"
_BATCH = ("npu::npu_transpose_batchmatmul",)
_BATCH_PAGE = "op-plugin, torch_npu-npu_transpose_batchmatmul.md"

_FORMATS = (-1, 0, 1, 2, 3, 4, 12, 16, 27, FRACTAL_NZ, 30, 32, 33, 35, 47)
_WEIGHTS = ("mat2", "other", "weight", "batch2")


def _float32(call: Call) -> str | None:
    names = [name for name, tensor in call.tensors().items() if tensor.dtype == FLOAT32]
    return f"{names[0]} is torch.float32" if names else None


def _nz_vector(call: Call) -> str | None:
    for name, weight in call.tensors(*(name for name in _WEIGHTS if name in call.arguments)).items():
        if weight.dim() >= 2 and 1 in weight.shape[-2:] and format_of(weight) == FRACTAL_NZ:
            return f"{name} is FRACTAL_NZ of shape {shape(weight)}"
    return None


def _permutation(name: str, *allowed: tuple[int, ...]) -> Rule:
    def detect(call: Call) -> str | None:
        given_order = call[name]
        if given_order is None or tuple(given_order) in allowed:
            return None
        return f"{name} is {list(given_order)}, not {' or '.join(str(list(order)) for order in allowed)}"

    return Rule(
        f"npu_transpose_batchmatmul.{name}",
        _BATCH,
        f"another {name}",
        on("ascend910b"),
        f"{_BATCH_PAGE}, {name}",
        detect,
    )


def _batch_shapes(call: Call) -> str | None:
    x, weight = call["input"], call["weight"]
    order = tuple(call["perm_x1"] or (0, 1, 2))
    if x.dim() != 3 or weight.dim() != 3 or sorted(order) != [0, 1, 2]:
        return None
    batch, rows = x.shape[order[0]], x.shape[order[2]]
    if (batch, rows) == tuple(weight.shape[:2]):
        return None
    return f"input {shape(x)} with perm_x1 {list(order)} and weight {shape(weight)} cannot be multiplied"


def _split(call: Call) -> str | None:
    factor, columns = call["batch_split_factor"], call["weight"].shape[-1]
    if factor is None or (1 <= factor <= columns and columns % factor == 0):
        return None
    return f"batch_split_factor is {factor} for {columns} columns"


_910B = on("ascend910b")

RULES: list[Rule] = [
    Rule(
        "npu_format_cast.format", _CAST, "a format that does not exist", on(), f"{_CAST_PAGE}, acl_format",
        where(lambda call: isinstance(call.get("acl_format"), int), value_outside("acl_format", *_FORMATS)),
    ),
    Rule(
        "npu_format_cast.float32_nz", _CAST, "float32 in FRACTAL_NZ", on(),
        "vllm-ascend, vllm_ascend/utils.py, _should_trans_nz (FP32 cannot use NZ)",
        where(equals("acl_format", FRACTAL_NZ), _float32),
    ),
    Rule(
        "npu_format_cast.customize_dtype", _CAST, "customize_dtype", on("ascend310p"), f"{_CAST_PAGE}, constraints",
        given("customize_dtype"),
    ),
    Rule(
        "matmul.nz_vector", _PRODUCTS, "a matrix in FRACTAL_NZ with one row or column", on("ascend310p"),
        _VECTOR_FIELD, _nz_vector,
    ),
    Rule(
        "matmul.nz", _PRODUCTS, "a matrix in FRACTAL_NZ", on(value=UNDOCUMENTED), f"no page; used in {_NZ_FIELD}",
        fractal_nz(*_WEIGHTS),
    ),
    Rule(
        "npu_transpose_batchmatmul.dtype", _BATCH, "matrices that are no floats", _910B,
        f"{_BATCH_PAGE}, input, weight", dtype_outside(("input", "weight"), FLOATS),
    ),
    Rule(
        "npu_transpose_batchmatmul.dtypes", _BATCH, "matrices of different dtypes", _910B,
        f"{_BATCH_PAGE}, input, weight", dtype_differs("input", "weight"),
    ),
    Rule(
        "npu_transpose_batchmatmul.rank", _BATCH, "matrices of other dimensions", _910B,
        f"{_BATCH_PAGE}, input, weight", first(rank_outside("input", 3), rank_outside("weight", 3)),
    ),
    _permutation("perm_x1", (0, 1, 2), (1, 0, 2)),
    _permutation("perm_x2", (0, 1, 2)),
    _permutation("perm_y", (1, 0, 2)),
    Rule(
        "npu_transpose_batchmatmul.reduction", _BATCH, "matrices that cannot be multiplied", _910B,
        f"{_BATCH_PAGE}, weight", _batch_shapes,
    ),
    Rule(
        "npu_transpose_batchmatmul.multiples", _BATCH, "K or N that are no multiples of 16", _910B,
        f"{_BATCH_PAGE}, constraints",
        first(size_not_multiple("weight", -2, 16), size_not_multiple("weight", LAST, 16)),
    ),
    Rule(
        "npu_transpose_batchmatmul.last_dim", _BATCH, "a last dimension above 65535", _910B,
        f"{_BATCH_PAGE}, input, weight",
        first(size_not_within("input", LAST, 1, 65535), size_not_within("weight", LAST, 1, 65535)),
    ),
    Rule("npu_transpose_batchmatmul.bias", _BATCH, "a bias", _910B, f"{_BATCH_PAGE}, bias", given("bias")),
    Rule(
        "npu_transpose_batchmatmul.scale", _BATCH, "a scale that is not int64", _910B, f"{_BATCH_PAGE}, scale",
        dtype_outside(("scale",), (INT64,)),
    ),
    Rule(
        "npu_transpose_batchmatmul.split", _BATCH, "a split that does not divide the columns", _910B,
        f"{_BATCH_PAGE}, batch_split_factor",
        first(_split, where(is_given("scale"), value_outside("batch_split_factor", 1, None))),
    ),
]  # fmt: skip
