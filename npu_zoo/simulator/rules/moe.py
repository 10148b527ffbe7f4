"""Rows: mixtures of experts."""

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
    elements_outside,
    equals,
    first,
    fractal_nz,
    given,
    is_given,
    missing,
    rank_outside,
    shape,
    size_differs,
    size_not_multiple,
    size_not_within,
    tensors_of,
    value_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import UNDOCUMENTED, Call, Detect, Rule, on

_TOP = ("npu::npu_moe_gating_top_k",)
_TOP_PAGE = "op-plugin, torch_npu-npu_moe_gating_top_k.md"
_SOFTMAX = ("npu::npu_moe_gating_top_k_softmax",)
_SOFTMAX_PAGE = "op-plugin, torch_npu-npu_moe_gating_top_k_softmax.md"
_SOFTMAX_FIELD = "vllm-ascend, vllm_ascend/_310p/fused_moe/grouped_topk_router.py"
_ROUTING = ("npu::npu_moe_init_routing_v2",)
_ROUTING_PAGE = "op-plugin, torch_npu-npu_moe_init_routing_v2.md"
_MATMUL = ("npu::npu_grouped_matmul",)
_MATMUL_PAGE = "op-plugin, torch_npu-npu_grouped_matmul.md"
_UNPERMUTE = ("npu::npu_moe_token_unpermute", "npu::_npu_moe_token_unpermute")
_UNPERMUTE_DOC = "torch_npu, _op_plugin_docs.py, npu_moe_token_unpermute"
_PERMUTE = ("npu::npu_moe_token_permute",)
_PERMUTE_DOC = "torch_npu, _op_plugin_docs.py, npu_moe_token_permute"
_DEQUANT = ("npu::npu_quant_grouped_matmul_dequant",)
_DEQUANT_TEST = "op-plugin, test/test_base_ops/test_quant_grouped_matmul_dequant.py"
_DEQUANT_FIELD = "vllm-ascend, vllm_ascend/_310p/fused_moe/moe_mlp.py"
_FINALIZE = ("npu::npu_moe_finalize_routing",)
_FINALIZE_PAGE = "op-plugin, torch_npu-npu_moe_finalize_routing.md"
_RE_ROUTING = ("npu::npu_moe_re_routing",)
_RE_ROUTING_PAGE = "op-plugin, torch_npu-npu_moe_re_routing.md"

_LIMIT = 1024


def _groups(call: Call) -> str | None:
    experts, groups = call["x"].shape[-1], call["group_count"]
    if groups <= 0 or experts % groups:
        return f"{experts} experts are not divisible by {groups} groups"
    size = experts // groups
    if groups > 1 and size <= 2:
        return f"{groups} groups of {size} experts, which must be more than 2"
    aligned = -(-size // 32) * 32 * groups
    return (
        f"{groups} groups of {size} experts are {aligned} when aligned to 32, more than 2048"
        if aligned > 2048
        else None
    )


def _chosen_groups(call: Call) -> str | None:
    chosen, groups = call["k_group"], call["group_count"]
    return None if 1 <= chosen <= groups else f"k_group is {chosen}, not in [1, {groups}]"


def _top_k(call: Call) -> str | None:
    k, experts = call["k"], call["x"].shape[-1]
    most = experts // max(call["group_count"], 1) * call["k_group"]
    return None if 1 <= k <= most else f"k is {k}, not in [1, {most}]"


def _softmax_top_k(call: Call) -> str | None:
    k, most = call["k"], min(call["x"].shape[-1], 1024)
    return None if 1 <= k <= most else f"k is {k}, not in [1, {most}]"


def _finished(call: Call) -> str | None:
    finished, x = call["finished"], call["x"]
    if finished is None or tuple(finished.shape) == tuple(x.shape[:-1]):
        return None
    return f"finished is {shape(finished)} for x {shape(x)}"


def _expert_range(call: Call) -> str | None:
    active, experts = list(call["active_expert_range"] or ()), call["expert_num"]
    if not active:
        return None
    if len(active) == 2 and 0 <= active[0] < active[1] and (active[1] <= experts or call.chip == "ascend310p"):
        return None
    return f"active_expert_range is {active} of {experts} experts"


def _expert_count(call: Call) -> int:
    return max(int(call["expert_num"]), *(call["active_expert_range"] or (0,)))


def _routing_scale(call: Call) -> str | None:
    scale, x, mode = call["scale"], call["x"], call["quant_mode"]
    if scale is None:
        return "quant_mode 0 without scale" if mode == 0 else None
    if mode == -1 and tuple(scale.shape) != (x.shape[0],):
        return f"scale is {shape(scale)}, not ({x.shape[0]},) without quantisation"
    return f"scale is {shape(scale)}, not (1,) in quant_mode 0" if mode == 0 and tuple(scale.shape) != (1,) else None


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


def _unpermute_rows(call: Call) -> str | None:
    permuted, indices, probs = call["permuted_tokens"], call["sorted_indices"], call["probs"]
    if probs is not None and probs.dim() == 2 and probs.numel() != indices.numel():
        return f"sorted_indices has {indices.numel()} entries and probs is {shape(probs)}"
    if permuted.dim() == 2 and indices.dim() == 1 and permuted.shape[0] > indices.numel():
        return f"sorted_indices has {indices.numel()} entries and permuted_tokens {permuted.shape[0]} rows"
    return None


def _rows_of_permuted(call: Call) -> int:
    return int(call["permuted_tokens"].shape[0])


_INTEGERS = (INT32, INT64)
_GIVEN_TYPE: Condition = is_given("group_type")

_GATING = [
    Rule(
        "npu_moe_gating_top_k.dtype", _TOP, "logits that are no floats", on(), f"{_TOP_PAGE}, x",
        dtype_outside(("x",), FLOATS),
    ),
    Rule(
        "npu_moe_gating_top_k.rank", _TOP, "logits with other dimensions", on(), f"{_TOP_PAGE}, x",
        rank_outside("x", 2),
    ),
    Rule(
        "npu_moe_gating_top_k.experts", _TOP, "more than 2048 experts", on(), f"{_TOP_PAGE}, x",
        size_not_within("x", LAST, 1, 2048),
    ),
    Rule(
        "npu_moe_gating_top_k.bias_dtype", _TOP, "a bias of another dtype", on(), f"{_TOP_PAGE}, bias",
        dtype_differs("x", "bias"),
    ),
    Rule(
        "npu_moe_gating_top_k.bias_shape", _TOP, "a bias of another length", on(), f"{_TOP_PAGE}, bias",
        first(rank_outside("bias", 1), size_differs("bias", 0, "x", LAST)),
    ),
    Rule("npu_moe_gating_top_k.groups", _TOP, "groups that do not fit", on(), f"{_TOP_PAGE}, group_count", _groups),
    Rule(
        "npu_moe_gating_top_k.k_group", _TOP, "a k_group outside the groups", on(), f"{_TOP_PAGE}, k_group",
        _chosen_groups,
    ),
    Rule("npu_moe_gating_top_k.k", _TOP, "a k outside the chosen groups", on(), f"{_TOP_PAGE}, k", _top_k),
    Rule(
        "npu_moe_gating_top_k.renorm", _TOP, "another renorm than 0", on(), f"{_TOP_PAGE}, renorm",
        value_outside("renorm", 0),
    ),
    Rule(
        "npu_moe_gating_top_k.norm_type", _TOP, "a norm_type outside 0 and 1", on(), f"{_TOP_PAGE}, norm_type",
        value_outside("norm_type", 0, 1),
    ),
    Rule(
        "npu_moe_gating_top_k.group_select_mode", _TOP, "a group_select_mode outside 0 and 1", on(),
        f"{_TOP_PAGE}, group_select_mode", value_outside("group_select_mode", 0, 1),
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.dtype", _SOFTMAX, "logits that are no floats", on(), f"{_SOFTMAX_PAGE}, x",
        dtype_outside(("x",), FLOATS),
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.rank", _SOFTMAX, "logits with other dimensions", on(), f"{_SOFTMAX_PAGE}, x",
        rank_outside("x", 2, 3),
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.k", _SOFTMAX, "a k outside the experts, or above 1024", on(),
        f"{_SOFTMAX_PAGE}, k", _softmax_top_k,
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.finished", _SOFTMAX, "a mask of rows that does not fit", on(),
        f"{_SOFTMAX_PAGE}, finished", first(dtype_outside(("finished",), (torch.bool,)), _finished),
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.dtype_310p", _SOFTMAX, "logits that are not float16", on("ascend310p"),
        _SOFTMAX_FIELD, dtype_outside(("x",), (FLOAT16,)),
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.format_310p", _SOFTMAX, "logits in FRACTAL_NZ", on("ascend310p"),
        _SOFTMAX_FIELD, fractal_nz("x"),
    ),
    Rule(
        "npu_moe_gating_top_k_softmax.tokens_310p", _SOFTMAX, "more than 1024 tokens", on("ascend310p"),
        f"{_SOFTMAX_FIELD}, MAX_TOKENS_PER_GATING_CALL", size_not_within("x", 0, 0, _LIMIT),
    ),
]  # fmt: skip

_ROUTE = [
    Rule(
        "npu_moe_init_routing_v2.dtype", _ROUTING, "tokens of another dtype", on("ascend910b"), f"{_ROUTING_PAGE}, x",
        dtype_outside(("x",), (*FLOATS, INT8)),
    ),
    Rule(
        "npu_moe_init_routing_v2.dtype_310p", _ROUTING, "tokens that are neither float16 nor float32",
        on("ascend310p"), f"{_ROUTING_PAGE}, constraints of Atlas inference products",
        dtype_outside(("x",), (FLOAT16, FLOAT32)),
    ),
    Rule(
        "npu_moe_init_routing_v2.quant_mode_310p", _ROUTING, "quantisation", on("ascend310p"),
        f"{_ROUTING_PAGE}, constraints of Atlas inference products", value_outside("quant_mode", -1),
    ),
    Rule(
        "npu_moe_init_routing_v2.drop_pad_mode_310p", _ROUTING, "drop_pad_mode 1", on("ascend310p"),
        f"{_ROUTING_PAGE}, constraints of Atlas inference products", value_outside("drop_pad_mode", 0),
    ),
    Rule(
        "npu_moe_init_routing_v2.rank", _ROUTING, "tokens or experts with other dimensions", on(),
        f"{_ROUTING_PAGE}, x, expert_idx",
        first(rank_outside("x", 2), rank_outside("expert_idx", 2), size_differs("expert_idx", 0, "x", 0)),
    ),
    Rule(
        "npu_moe_init_routing_v2.index_dtype", _ROUTING, "experts that are not int32", on(),
        f"{_ROUTING_PAGE}, expert_idx", dtype_outside(("expert_idx",), (INT32,)),
    ),
    Rule(
        "npu_moe_init_routing_v2.modes", _ROUTING, "a mode outside the documented ones", on("ascend910b"),
        f"{_ROUTING_PAGE}, drop_pad_mode, expert_tokens_num_type, row_idx_type",
        first(
            value_outside("drop_pad_mode", 0, 1), value_outside("expert_tokens_num_type", 0, 1, 2),
            value_outside("row_idx_type", 0, 1),
        ),
    ),
    Rule(
        "npu_moe_init_routing_v2.quant_mode", _ROUTING, "a quantisation that is none of int8 or int4",
        on("ascend910b"), f"{_ROUTING_PAGE}, quant_mode", value_outside("quant_mode", -1, 0, 1, 13),
    ),
    Rule(
        "npu_moe_init_routing_v2.expert_range", _ROUTING, "a range of experts that does not fit", on(),
        f"{_ROUTING_PAGE}, active_expert_range", _expert_range,
    ),
    Rule(
        "npu_moe_init_routing_v2.scale", _ROUTING, "a scale that does not fit the quantisation", on("ascend910b"),
        f"{_ROUTING_PAGE}, scale", first(dtype_outside(("scale", "offset"), (FLOAT32,)), _routing_scale),
    ),
    Rule(
        "npu_moe_init_routing_v2.experts", _ROUTING, "experts beyond the number of experts", on("ascend910b"),
        f"{_ROUTING_PAGE}, expert_idx",
        where(lambda call: call["expert_num"] > 0, elements_outside("expert_idx", 0, _expert_count)),
        of_values=True,
    ),
    Rule(
        "npu_moe_init_routing_v2.row_310p", _ROUTING, "rows whose length is no multiple of 16", on("ascend310p"),
        "vllm-ascend, vllm_ascend/_310p/fused_moe/token_dispatcher.py", size_not_multiple("x", LAST, 16),
    ),
    Rule(
        "npu_moe_token_permute.dtype", _PERMUTE, "tokens that are not bfloat16", on("ascend910b", value=UNDOCUMENTED),
        _PERMUTE_DOC, dtype_outside(("tokens",), (BFLOAT16,)),
    ),
    Rule(
        "npu_moe_token_permute.index_dtype", _PERMUTE, "indices that are not integers", on(), _PERMUTE_DOC,
        dtype_outside(("indices",), _INTEGERS),
    ),
    Rule(
        "npu_moe_token_permute.rank", _PERMUTE, "tokens of other dimensions", on(), _PERMUTE_DOC,
        rank_outside("tokens", 2),
    ),
    Rule(
        "npu_moe_token_permute.padded", _PERMUTE, "padded_mode", on(), _PERMUTE_DOC,
        value_outside("padded_mode", False),
    ),
    Rule(
        "npu_moe_token_permute.top_k", _PERMUTE, "more than 512 experts a token", on(), _PERMUTE_DOC,
        where(lambda call: call["indices"].dim() == 2, size_not_within("indices", 1, 1, 512)),
    ),
    Rule(
        "npu_moe_token_unpermute.dtype", _UNPERMUTE, "tokens that are not bfloat16", on(value=UNDOCUMENTED),
        f"{_UNPERMUTE_DOC}; used in vllm-ascend, vllm_ascend/device/device_op.py with the model's dtype",
        dtype_outside(("permuted_tokens",), (BFLOAT16,)),
    ),
    Rule(
        "npu_moe_token_unpermute.index_dtype", _UNPERMUTE, "indices that are not integers", on(), _UNPERMUTE_DOC,
        dtype_outside(("sorted_indices",), _INTEGERS),
    ),
    Rule(
        "npu_moe_token_unpermute.rank", _UNPERMUTE, "tensors with other dimensions", on(), _UNPERMUTE_DOC,
        first(rank_outside("permuted_tokens", 2), rank_outside("sorted_indices", 1), rank_outside("probs", 2)),
    ),
    Rule(
        "npu_moe_token_unpermute.rows", _UNPERMUTE, "indices that do not fit", on(), _UNPERMUTE_DOC,
        _unpermute_rows,
    ),
    Rule(
        "npu_moe_token_unpermute.padded", _UNPERMUTE, "padded_mode", on(), _UNPERMUTE_DOC,
        value_outside("padded_mode", False),
    ),
    Rule(
        "npu_moe_token_unpermute.indices", _UNPERMUTE, "indices beyond the rows", on(), _UNPERMUTE_DOC,
        elements_outside("sorted_indices", 0, _rows_of_permuted), of_values=True,
    ),
    Rule(
        "npu_moe_finalize_routing.dtypes", _FINALIZE, "tensors of different dtypes", on(),
        f"{_FINALIZE_PAGE}, parameters",
        dtype_differs("expanded_permuted_rows", "skip1", "skip2", "bias", "scales"),
    ),
    Rule(
        "npu_moe_finalize_routing.index_dtype", _FINALIZE, "indices that are not int32", on(),
        f"{_FINALIZE_PAGE}, expanded_src_to_dst_row",
        dtype_outside(("expanded_src_to_dst_row", "export_for_source_row"), (INT32,)),
    ),
    Rule(
        "npu_moe_finalize_routing.skips", _FINALIZE, "skip2 without skip1", on(), f"{_FINALIZE_PAGE}, skip2",
        where(is_given("skip2"), missing("skip1")),
    ),
    Rule(
        "npu_moe_finalize_routing.mode", _FINALIZE, "a drop_pad_mode outside 0 to 3", on(),
        f"{_FINALIZE_PAGE}, drop_pad_mode", value_not_within("drop_pad_mode", 0, 3),
    ),
    Rule(
        "npu_moe_re_routing.dtype", _RE_ROUTING, "tokens of another dtype", on(), f"{_RE_ROUTING_PAGE}, tokens",
        dtype_outside(("tokens",), (*HALVES, INT8)),
    ),
    Rule(
        "npu_moe_re_routing.types", _RE_ROUTING, "a type that is not supported", on(),
        f"{_RE_ROUTING_PAGE}, expert_token_num_type, idx_type",
        first(value_outside("expert_token_num_type", 1), value_outside("idx_type", 0)),
    ),
]  # fmt: skip

_GROUPED = [
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

RULES: list[Rule] = _GATING + _ROUTE + _GROUPED
