"""Rows: matrix products in groups, of tokens and their experts."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOATS,
    HALVES,
    INT8,
    INT32,
    INT64,
    LAST,
    Condition,
    dtype_differs,
    dtype_named,
    dtype_outside,
    elements_decrease,
    equals,
    first,
    given,
    is_given,
    missing,
    shape,
    size_not_multiple,
    size_not_within,
    tensors_of,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import Call, Detect, Rule, on

_MATMUL = ("npu::npu_grouped_matmul",)
_MATMUL_PAGE = "op-plugin, torch_npu-npu_grouped_matmul.md"
_DEQUANT = ("npu::npu_quant_grouped_matmul_dequant",)
_DEQUANT_TEST = "op-plugin, test/test_base_ops/test_quant_grouped_matmul_dequant.py"
_DEQUANT_FIELD = "vllm-ascend, vllm_ascend/_310p/fused_moe/moe_mlp.py"
_GIVEN_TYPE: Condition = is_given("group_type")


def _pairs(call: Call) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, weight = tensors_of(call, "x"), tensors_of(call, "weight")
    return [
        (x[0] if len(x) == 1 else one, other)
        for one, other in zip(x * (len(weight) if len(x) == 1 else 1), weight, strict=False)
    ]


def _packed(weight: torch.Tensor) -> bool:
    return weight.dtype == INT32


def _reduction(call: Call) -> str | None:
    for x, weight in _pairs(call):
        if weight.dim() < 2 or call.get("group_type") == 2 or x.dtype == INT32:
            continue
        rows = weight.shape[-2] * (8 if _packed(weight) and weight.stride(-2) == 1 else 1)
        if x.shape[-1] != rows:
            return f"x {shape(x)} has {x.shape[-1]} columns and weight {shape(weight)} has {rows} rows"
    return None


def _matmul_dtypes(call: Call) -> str | None:
    """X and weight of one float dtype, int8 with int8, packed int4 with itself, or a float with int8 or packed int4."""
    for x, weight in _pairs(call):
        if x.dtype == weight.dtype or (x.dtype in HALVES and weight.dtype in (INT8, INT32)):
            continue
        return f"x is {x.dtype} and weight is {weight.dtype}"
    return None


def _matmul_bias(call: Call) -> str | None:
    x = tensors_of(call, "x")
    wanted = {FLOAT16: FLOAT16, BFLOAT16: FLOAT32, FLOAT32: FLOAT32, INT8: INT32}.get(x[0].dtype) if x else None
    for bias in tensors_of(call, "bias"):
        if wanted is not None and bias.dtype != wanted:
            return f"bias is {bias.dtype} where x is {x[0].dtype}, not {wanted}"
    return None


def _weight_only(call: Call) -> bool:
    x, weight = tensors_of(call, "x"), tensors_of(call, "weight")
    return bool(x and weight) and x[0].dtype in HALVES and weight[0].dtype in (INT8, INT32)


def _scales_by_group(call: Call) -> str | None:
    """A scale per channel has a dimension less than its weight: [E, N] for [E, K, N], [N] for [K, N]."""
    for weight, scale in zip(tensors_of(call, "weight"), tensors_of(call, "antiquant_scale"), strict=False):
        if weight.dtype == INT8 and scale.dim() >= weight.dim():
            return f"antiquant_scale is {shape(scale)} for an int8 weight {shape(weight)}, not one per channel"
    return None


def _fully_quantised(call: Call) -> bool:
    x = tensors_of(call, "x")
    return bool(x) and x[0].dtype == INT8


def _scale_dtype(call: Call) -> str | None:
    """float16 results have float32 scales, bfloat16 results bfloat16 ones, int8 results int64 ones."""
    output, scale = _output_dtype(call), tensors_of(call, "scale")
    wanted = {FLOAT16: (FLOAT32,), BFLOAT16: (BFLOAT16, FLOAT32), INT8: (INT64,)}.get(output)
    if not scale or wanted is None or scale[0].dtype in wanted:
        return None
    return f"scale is {scale[0].dtype} for results in {output}, not {' or '.join(map(str, wanted))}"


def _output_dtype(call: Call) -> torch.dtype:
    value = dtype_named(call.get("output_dtype"))
    return value if isinstance(value, torch.dtype) else INT8


def _one_output(call: Call) -> bool:
    return call.get("split_item") in (2, 3)


def _group_length(call: Call) -> str | None:
    groups, weight = call["group_list"], tensors_of(call, "weight")
    if not isinstance(groups, torch.Tensor) or not weight or groups.dim() == 0:
        return None
    experts = weight[0].shape[0] if len(weight) == 1 and weight[0].dim() == 3 else len(weight)
    if call.get("group_type") == 2:
        return None
    return None if groups.shape[0] == experts else f"group_list has {groups.shape[0]} entries for {experts} experts"


def _group_rank(call: Call) -> str | None:
    groups, kind = call["group_list"], call.get("group_list_type") or 0
    if not isinstance(groups, torch.Tensor):
        return None
    good = groups.dim() == 2 and groups.shape[1] == 2 if kind == 2 else groups.dim() == 1
    return None if good else f"group_list is {shape(groups)} in group_list_type {kind}"


def _group_sum(call: Call) -> str | None:
    groups, x = call["group_list"], tensors_of(call, "x")
    if not isinstance(groups, torch.Tensor) or len(x) != 1 or not groups.numel() or call.get("group_type") != 0:
        return None
    kind = call.get("group_list_type") or 0
    if kind != 0 and int(groups.min()) < 0:
        return f"group_list holds {int(groups.min())}, which is negative"
    total = int(groups[-1]) if kind == 0 else int((groups[:, 1] if kind == 2 else groups).sum())
    return f"group_list covers {total} rows, x has {x[0].shape[0]}" if total > x[0].shape[0] else None


def _is_single(call: Call) -> bool:
    return len(tensors_of(call, "x")) == 1 and len(tensors_of(call, "weight")) == 1


def _counts_in(name: str, least: int, most: int) -> Detect:
    def detect(call: Call) -> str | None:
        count = len(call[name])
        return None if least <= count <= most else f"{name} has {count} tensors, not {least} to {most}"

    return detect


def _weight_ranks(call: Call) -> str | None:
    weight, x = tensors_of(call, "weight"), tensors_of(call, "x")
    wanted = 3 if len(weight) == 1 and call.get("group_type") == 0 else 2
    if call.get("group_type") not in (0, -1) or not weight or not x:
        return None
    if any(item.dim() != wanted for item in weight):
        return f"weight is {shape(weight[0])}, not of {wanted} dimensions"
    return f"x is {shape(x[0])}, not of 2 dimensions" if _one_output(call) and x[0].dim() != 2 else None


def _transposed_x(call: Call) -> str | None:
    for x in tensors_of(call, "x"):
        if x.dim() == 2 and not x.is_contiguous() and x.stride(0) == 1 and x.shape[1] > 1:
            return f"x is transposed: shape {shape(x)}, strides {x.stride()}"
    return None


def _dequant_shapes(call: Call) -> str | None:
    x, weight, scale = call["x"], call["quantized_weight"], call["weight_scale"]
    if weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        return f"quantized_weight is {shape(weight)}, not [experts, N, {x.shape[1]}]"
    wanted = tuple(weight.shape[:2])
    return None if tuple(scale.shape) == wanted else f"weight_scale is {shape(scale)}, not {wanted}"


def _dequant_sum(call: Call) -> str | None:
    groups, rows = call["group_list"], call["x"].shape[0]
    return (
        f"group_list ends at {int(groups[-1])}, x has {rows} rows"
        if groups.numel() and int(groups[-1]) > rows
        else None
    )


RULES: list[Rule] = [
    Rule(
        "npu_grouped_matmul.dtype", _MATMUL, "tensors of other dtypes", on("ascend910b"),
        f"{_MATMUL_PAGE}, x, weight", dtype_outside(("x", "weight"), (*FLOATS, INT8, INT32)),
    ),
    Rule(
        "npu_grouped_matmul.dtype_310p", _MATMUL, "tensors that are not float16", on("ascend310p"),
        f"{_MATMUL_PAGE}, x, weight, bias", dtype_outside(("x", "weight", "bias"), (FLOAT16,)),
    ),
    Rule(
        "npu_grouped_matmul.dtypes", _MATMUL, "x and weight of dtypes that do not go together", on("ascend910b"),
        f"{_MATMUL_PAGE}, tables 1 and 2", _matmul_dtypes,
    ),
    Rule(
        "npu_grouped_matmul.bias_dtype", _MATMUL, "a bias of another dtype", on("ascend910b"),
        f"{_MATMUL_PAGE}, tables 1 and 2", _matmul_bias,
    ),
    Rule(
        "npu_grouped_matmul.lists", _MATMUL, "lists of more than 128 tensors", on(), f"{_MATMUL_PAGE}, x, weight",
        first(_counts_in("x", 1, 128), _counts_in("weight", 1, 128)),
    ),
    Rule(
        "npu_grouped_matmul.reduction", _MATMUL, "x and weight that cannot be multiplied", on(),
        f"{_MATMUL_PAGE}, formula", _reduction,
    ),
    Rule(
        "npu_grouped_matmul.ranks", _MATMUL, "tensors with other dimensions", on(),
        f"{_MATMUL_PAGE}, tables of scenarios", _weight_ranks,
    ),
    Rule(
        "npu_grouped_matmul.transposed", _MATMUL, "an x that is transposed", on(),
        f"{_MATMUL_PAGE}, tables of scenarios", where(equals("group_type", 0, -1), _transposed_x),
    ),
    Rule(
        "npu_grouped_matmul.split_item", _MATMUL, "a split_item outside 0 to 3", on(), f"{_MATMUL_PAGE}, split_item",
        value_outside("split_item", 0, 1, 2, 3, None),
    ),
    Rule(
        "npu_grouped_matmul.one_output", _MATMUL, "groups of rows of a single x and weight with several outputs",
        on(), f"{_MATMUL_PAGE}, tables of scenarios (single, single, single)",
        where(lambda call: call.get("group_type") == 0 and _is_single(call), value_outside("split_item", 2, 3)),
    ),
    Rule(
        "npu_grouped_matmul.group_type", _MATMUL, "a group_type outside -1, 0 and 2", on("ascend910b"),
        f"{_MATMUL_PAGE}, group_type", value_outside("group_type", None, -1, 0, 2),
    ),
    Rule(
        "npu_grouped_matmul.group_list_missing", _MATMUL, "groups of rows without group_list", on(),
        f"{_MATMUL_PAGE}, tables of scenarios",
        where(lambda call: call.get("group_type") == 0 and len(tensors_of(call, "x")) == 1, missing("group_list")),
    ),
    Rule(
        "npu_grouped_matmul.group_list_dtype", _MATMUL, "a group_list that is not int64", on(),
        f"{_MATMUL_PAGE}, group_list", dtype_outside(("group_list",), (INT64,)),
    ),
    Rule(
        "npu_grouped_matmul.group_list_type", _MATMUL, "a group_list_type outside 0 to 2", on(),
        f"{_MATMUL_PAGE}, group_list_type", value_outside("group_list_type", 0, 1, 2, None),
    ),
    Rule(
        "npu_grouped_matmul.group_list_pairs", _MATMUL, "group_list_type 2 without int8", on("ascend910b"),
        f"{_MATMUL_PAGE}, group_list_type",
        where(equals("group_list_type", 2), dtype_outside(("x", "weight"), (INT8,))),
    ),
    Rule(
        "npu_grouped_matmul.group_list_rank", _MATMUL, "a group_list of another shape", on(),
        f"{_MATMUL_PAGE}, group_list", _group_rank,
    ),
    Rule(
        "npu_grouped_matmul.group_list_length", _MATMUL, "a group_list of another length than the experts", on(),
        f"{_MATMUL_PAGE}, group_list", where(_GIVEN_TYPE, _group_length),
    ),
    Rule(
        "npu_grouped_matmul.groups", _MATMUL, "more than 1024 groups", on(), f"{_MATMUL_PAGE}, tables of scenarios",
        where(lambda call: isinstance(call["group_list"], torch.Tensor), size_not_within("group_list", 0, 1, 1024)),
    ),
    Rule(
        "npu_grouped_matmul.cumulative", _MATMUL, "a group_list of type 0 that decreases", on(),
        f"{_MATMUL_PAGE}, group_list",
        where(lambda call: not call.get("group_list_type"), elements_decrease("group_list")), of_values=True,
    ),
    Rule(
        "npu_grouped_matmul.rows", _MATMUL, "a group_list that goes beyond the rows, or is negative", on(),
        f"{_MATMUL_PAGE}, group_list, tables of scenarios", _group_sum, of_values=True,
    ),
    Rule(
        "npu_grouped_matmul.unused", _MATMUL, "arguments that are reserved", on(),
        f"{_MATMUL_PAGE}, offset, activation_input, activation_quant_scale, activation_quant_offset",
        given("offset", "activation_input", "activation_quant_scale", "activation_quant_offset"),
    ),
    Rule(
        "npu_grouped_matmul.antiquant", _MATMUL, "a quantised weight without its scale", on("ascend910b"),
        f"{_MATMUL_PAGE}, table 2", where(_weight_only, missing("antiquant_scale")),
    ),
    Rule(
        "npu_grouped_matmul.antiquant_dtype", _MATMUL, "a scale of the weight of another dtype than x",
        on("ascend910b"), f"{_MATMUL_PAGE}, table 2", dtype_differs("x", "antiquant_scale", "antiquant_offset"),
    ),
    Rule(
        "npu_grouped_matmul.antiquant_groups", _MATMUL, "an int8 weight with scales by group of inputs",
        on("ascend910b"), f"{_MATMUL_PAGE}, table 2, note", where(_weight_only, _scales_by_group),
    ),
    Rule(
        "npu_grouped_matmul.scale", _MATMUL, "int8 without a scale", on("ascend910b"), f"{_MATMUL_PAGE}, table 2",
        where(lambda call: _fully_quantised(call) and _output_dtype(call) != INT32, missing("scale")),
    ),
    Rule(
        "npu_grouped_matmul.scale_dtype", _MATMUL, "a scale of another dtype", on("ascend910b"),
        f"{_MATMUL_PAGE}, table 2",
        where(_fully_quantised, first(dtype_outside(("scale",), (FLOAT32, BFLOAT16, INT64)), _scale_dtype)),
    ),
    Rule(
        "npu_grouped_matmul.per_token_scale", _MATMUL, "scales of tokens that are not float32", on(),
        f"{_MATMUL_PAGE}, per_token_scale", dtype_outside(("per_token_scale",), (FLOAT32,)),
    ),
    Rule(
        "npu_grouped_matmul.act_type", _MATMUL, "an activation outside the documented ones", on("ascend910b"),
        f"{_MATMUL_PAGE}, act_type", value_outside("act_type", 0, 1, 2, 4, 5, None),
    ),
    Rule(
        "npu_grouped_matmul.single_310p", _MATMUL, "several tensors", on("ascend310p"),
        f"{_MATMUL_PAGE}, scenarios of Atlas inference products",
        first(_counts_in("x", 1, 1), _counts_in("weight", 1, 1)),
    ),
    Rule(
        "npu_grouped_matmul.group_type_310p", _MATMUL, "another group_type than 0", on("ascend310p"),
        f"{_MATMUL_PAGE}, group_type", value_outside("group_type", 0),
    ),
    Rule(
        "npu_grouped_matmul.group_list_type_310p", _MATMUL, "group_list_type 2", on("ascend310p"),
        f"{_MATMUL_PAGE}, group_list_type", value_outside("group_list_type", 0, 1, None),
    ),
    Rule(
        "npu_grouped_matmul.columns_310p", _MATMUL, "results whose rows are no multiple of 16", on("ascend310p"),
        f"{_MATMUL_PAGE}, scenarios of Atlas inference products", size_not_multiple("weight", LAST, 16),
    ),
    Rule(
        "npu_grouped_matmul.quantised_310p", _MATMUL, "quantisation, activation or tuning", on("ascend310p"),
        f"{_MATMUL_PAGE}, scale, antiquant_scale, antiquant_offset, act_type, tuning_config",
        first(
            given("scale", "antiquant_scale", "antiquant_offset", "tuning_config"), value_outside("act_type", 0, None),
        ),
    ),
    Rule(
        "npu_quant_grouped_matmul_dequant.dtype", _DEQUANT, "tensors of other dtypes", on(), _DEQUANT_TEST,
        first(
            dtype_outside(("x",), (FLOAT16,)), dtype_outside(("quantized_weight",), (INT8,)),
            dtype_outside(("weight_scale",), (FLOAT32,)),
        ),
    ),
    Rule(
        "npu_quant_grouped_matmul_dequant.shape", _DEQUANT, "tensors that do not fit", on(), _DEQUANT_TEST,
        _dequant_shapes,
    ),
    Rule(
        "npu_quant_grouped_matmul_dequant.group_list_dtype", _DEQUANT, "a group_list that is not int64", on(),
        _DEQUANT_TEST, dtype_outside(("group_list",), (INT64,)),
    ),
    Rule(
        "npu_quant_grouped_matmul_dequant.cumulative", _DEQUANT, "a group_list that is not cumulative", on(),
        _DEQUANT_FIELD, first(elements_decrease("group_list"), _dequant_sum), of_values=True,
    ),
    Rule(
        "npu_quant_grouped_matmul_dequant.quant_mode", _DEQUANT, "another quant_mode", on(), _DEQUANT_TEST,
        value_outside("quant_mode", "pertoken", "pertensor"),
    ),
]  # fmt: skip
