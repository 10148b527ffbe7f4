"""Rows: tokens on their way to experts and back."""

from __future__ import annotations

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
    dtype_differs,
    dtype_outside,
    elements_outside,
    first,
    is_given,
    missing,
    rank_outside,
    shape,
    size_differs,
    size_not_multiple,
    size_not_within,
    value_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import UNDOCUMENTED, Call, Rule, on

_ROUTING = ("npu::npu_moe_init_routing_v2",)
_ROUTING_PAGE = "op-plugin, torch_npu-npu_moe_init_routing_v2.md"
_UNPERMUTE = ("npu::npu_moe_token_unpermute", "npu::_npu_moe_token_unpermute")
_UNPERMUTE_DOC = "torch_npu, _op_plugin_docs.py, npu_moe_token_unpermute"
_PERMUTE = ("npu::npu_moe_token_permute",)
_PERMUTE_DOC = "torch_npu, _op_plugin_docs.py, npu_moe_token_permute"
_FINALIZE = ("npu::npu_moe_finalize_routing",)
_FINALIZE_PAGE = "op-plugin, torch_npu-npu_moe_finalize_routing.md"
_RE_ROUTING = ("npu::npu_moe_re_routing",)
_RE_ROUTING_PAGE = "op-plugin, torch_npu-npu_moe_re_routing.md"
_INTEGERS = (INT32, INT64)


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


def _unpermute_rows(call: Call) -> str | None:
    permuted, indices, probs = call["permuted_tokens"], call["sorted_indices"], call["probs"]
    if probs is not None and probs.dim() == 2 and probs.numel() != indices.numel():
        return f"sorted_indices has {indices.numel()} entries and probs is {shape(probs)}"
    if permuted.dim() == 2 and indices.dim() == 1 and permuted.shape[0] > indices.numel():
        return f"sorted_indices has {indices.numel()} entries and permuted_tokens {permuted.shape[0]} rows"
    return None


def _rows_of_permuted(call: Call) -> int:
    return int(call["permuted_tokens"].shape[0])


RULES: list[Rule] = [
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
