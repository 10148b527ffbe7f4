"""Rows: matrix products and routing that are fused with communication."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    FLOAT32,
    HALVES,
    INT8,
    INT32,
    dtype_differs,
    dtype_outside,
    equals,
    first,
    given,
    has_dtype,
    not_contiguous,
    rank_outside,
    shape,
    size_differs,
    size_not_multiple,
    size_not_within,
    value_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import Call, Rule, on

_REDUCE = ("npu::npu_mm_all_reduce_base",)
_REDUCE_PAGE = "op-plugin, torch_npu-npu_mm_all_reduce_base.md"
_GATHER = ("npu::npu_all_gather_base_mm",)
_GATHER_PAGE = "op-plugin, torch_npu-npu_all_gather_base_mm.md"
_SCATTER = ("npu::npu_mm_reduce_scatter_base",)
_SCATTER_PAGE = "op-plugin, torch_npu-npu_mm_reduce_scatter_base.md"
_DISPATCH = ("npu::npu_moe_distribute_dispatch_v2",)
_DISPATCH_PAGE = "op-plugin, torch_npu-npu_moe_distribute_dispatch_v2.md"
_COMBINE = ("npu::npu_moe_distribute_combine_v2",)
_COMBINE_PAGE = "op-plugin, torch_npu-npu_moe_distribute_combine_v2.md"

_WORLDS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)


def _reduction(left: str) -> tuple[str, int, str, int]:
    return left, -1, "x2", 0


def _transposed(name: str, call: Call) -> str | None:
    x = call[name]
    if x.dim() < 2 or x.is_contiguous() or x.stride(-2) != 1 or x.shape[-1] == 1:
        return None
    return f"{name} is transposed: shape {shape(x)}, strides {x.stride()}"


def _reduce_dtypes(call: Call) -> str | None:
    x1, x2 = call["x1"].dtype, call["x2"].dtype
    if x1 == x2 or (x1 in HALVES and x2 == INT8):
        return None
    return f"x1 is {x1} and x2 is {x2}"


def _reduce_scales(call: Call) -> str | None:
    if call["x2"].dtype != INT8:
        return None
    wanted = "dequant_scale" if call["x1"].dtype == INT8 else "antiquant_scale"
    return f"x1 is {call['x1'].dtype} and x2 is torch.int8 without {wanted}" if call[wanted] is None else None


def _bias_of_columns(call: Call) -> str | None:
    bias, columns = call["bias"], call["x2"].shape[-1]
    if bias is None or (bias.dim() == 1 and bias.shape[0] == columns):
        return None
    return f"bias is {shape(bias)} for {columns} columns"


def _experts_of_ranks(call: Call) -> str | None:
    experts, ranks = call["moe_expert_num"], call["ep_world_size"] - call["shared_expert_rank_num"]
    return f"{experts} experts on {ranks} ranks" if ranks <= 0 or experts % ranks else None


def _rank_of_world(call: Call) -> str | None:
    rank, world = call["ep_rank_id"], call["ep_world_size"]
    return None if 0 <= rank < world else f"ep_rank_id is {rank} of {world}"


def _hidden(call: Call) -> str | None:
    hidden = call["x"].shape[-1]
    if call["x"].dtype == INT32 or (0 < hidden <= 10240 and hidden % 32 == 0):
        return None
    return f"x has rows of {hidden}, no multiple of 32 up to 10240"


def _unscaled_int32(call: Call) -> str | None:
    return "x is torch.int32 without scales" if call["x"].dtype == INT32 and call["scales"] is None else None


def _expert_values(call: Call) -> str | None:
    experts, most = call["expert_ids"], call["moe_expert_num"]
    most += call["zero_expert_num"] + call["copy_expert_num"] + call["const_expert_num"]
    if experts.numel() and not (int(experts.min()) >= 0 and int(experts.max()) < most):
        return f"expert_ids holds {int(experts.min())} to {int(experts.max())}, not in [0, {most})"
    if any(row.unique().numel() != row.numel() for row in experts):
        return "expert_ids names an expert twice in a row"
    return None


_910B = on("ascend910b")

_PRODUCTS = [
    Rule(
        "npu_mm_all_reduce_base.dtype", _REDUCE, "matrices of another dtype", _910B, f"{_REDUCE_PAGE}, x1, x2",
        dtype_outside(("x1", "x2"), (*HALVES, INT8)),
    ),
    Rule(
        "npu_mm_all_reduce_base.dtypes", _REDUCE, "dtypes that do not go together", _910B,
        f"{_REDUCE_PAGE}, tables 1 to 3", _reduce_dtypes,
    ),
    Rule(
        "npu_mm_all_reduce_base.scales", _REDUCE, "int8 without scales", _910B, f"{_REDUCE_PAGE}, tables 2 and 3",
        _reduce_scales,
    ),
    Rule(
        "npu_mm_all_reduce_base.rank", _REDUCE, "matrices of other dimensions", _910B, f"{_REDUCE_PAGE}, constraints",
        first(rank_outside("x1", 2, 3), rank_outside("x2", 2)),
    ),
    Rule(
        "npu_mm_all_reduce_base.reduction", _REDUCE, "matrices that cannot be multiplied", _910B,
        f"{_REDUCE_PAGE}, x2", size_differs(*_reduction("x1")),
    ),
    Rule(
        "npu_mm_all_reduce_base.transposed", _REDUCE, "an x1 that is transposed", _910B,
        f"{_REDUCE_PAGE}, constraints", lambda call: _transposed("x1", call),
    ),
    Rule(
        "npu_mm_all_reduce_base.reduce_op", _REDUCE, "another reduction than a sum", _910B,
        f"{_REDUCE_PAGE}, reduce_op", value_outside("reduce_op", "sum"),
    ),
    Rule(
        "npu_mm_all_reduce_base.comm_turn", _REDUCE, "a comm_turn", _910B, f"{_REDUCE_PAGE}, comm_turn",
        value_outside("comm_turn", 0),
    ),
    Rule(
        "npu_mm_all_reduce_base.bias", _REDUCE, "a bias of another shape", _910B, f"{_REDUCE_PAGE}, bias",
        _bias_of_columns,
    ),
    Rule(
        "npu_all_gather_base_mm.dtype", _GATHER, "matrices of another dtype", _910B, f"{_GATHER_PAGE}, x1",
        dtype_outside(("input", "x2"), (*HALVES, INT8)),
    ),
    Rule(
        "npu_all_gather_base_mm.dtypes", _GATHER, "matrices of different dtypes", _910B, f"{_GATHER_PAGE}, x2",
        dtype_differs("input", "x2"),
    ),
    Rule(
        "npu_all_gather_base_mm.rank", _GATHER, "matrices of other dimensions", _910B, f"{_GATHER_PAGE}, x1, x2",
        first(rank_outside("input", 2), rank_outside("x2", 2)),
    ),
    Rule(
        "npu_all_gather_base_mm.reduction", _GATHER,
        "matrices that cannot be multiplied, or k outside [256, 65535)", _910B, f"{_GATHER_PAGE}, x1, x2",
        first(size_differs(*_reduction("input")), size_not_within("x2", 0, 256, 65534)),
    ),
    Rule(
        "npu_all_gather_base_mm.world_size", _GATHER, "another number of ranks", _910B,
        f"{_GATHER_PAGE}, world_size", value_outside("world_size", 2, 4, 8),
    ),
    Rule(
        "npu_all_gather_base_mm.gather_index", _GATHER, "another gather_index or comm_turn", _910B,
        f"{_GATHER_PAGE}, gather_index, comm_turn",
        first(value_outside("gather_index", 0), value_outside("comm_turn", 0)),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.dtype", _SCATTER, "matrices of another dtype", _910B, f"{_SCATTER_PAGE}, input",
        dtype_outside(("input", "x2"), (*HALVES, INT8)),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.dtypes", _SCATTER, "matrices of different dtypes", _910B, f"{_SCATTER_PAGE}, x2",
        dtype_differs("input", "x2"),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.int8", _SCATTER, "int8 outside comm_mode aiv", _910B,
        f"{_SCATTER_PAGE}, comm_mode", where(has_dtype("input", INT8), value_outside("comm_mode", "aiv")),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.rank", _SCATTER, "matrices of other dimensions", _910B,
        f"{_SCATTER_PAGE}, input, x2", first(rank_outside("input", 2), rank_outside("x2", 2)),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.reduction", _SCATTER,
        "matrices that cannot be multiplied, or k outside [256, 65535)", _910B, f"{_SCATTER_PAGE}, x2",
        first(size_differs(*_reduction("input")), size_not_within("x2", 0, 256, 65534)),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.world_size", _SCATTER, "another number of ranks", _910B,
        f"{_SCATTER_PAGE}, world_size", value_outside("world_size", 2, 4, 8),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.rows", _SCATTER, "rows that cannot be divided among the ranks", _910B,
        f"{_SCATTER_PAGE}, constraints", lambda call: size_not_multiple("input", 0, call["world_size"])(call),
    ),
    Rule(
        "npu_mm_reduce_scatter_base.reduce_op", _SCATTER, "another reduction than a sum", _910B,
        f"{_SCATTER_PAGE}, reduce_op", value_outside("reduce_op", "sum"),
    ),
]  # fmt: skip

_ROUTING = [
    Rule(
        "npu_moe_distribute_dispatch_v2.dtype", _DISPATCH, "tokens of another dtype", _910B, f"{_DISPATCH_PAGE}, x",
        dtype_outside(("x",), (*HALVES, INT32)),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.index_dtype", _DISPATCH, "experts that are not int32", _910B,
        f"{_DISPATCH_PAGE}, expert_ids", dtype_outside(("expert_ids",), (INT32,)),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.rank", _DISPATCH, "tokens or experts of other shapes", _910B,
        f"{_DISPATCH_PAGE}, x, expert_ids",
        first(rank_outside("x", 2), rank_outside("expert_ids", 2), size_differs("expert_ids", 0, "x", 0)),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.hidden", _DISPATCH, "rows of another length", _910B, f"{_DISPATCH_PAGE}, H",
        _hidden,
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.batch", _DISPATCH, "more than 512 tokens", _910B, f"{_DISPATCH_PAGE}, BS",
        size_not_within("x", 0, 1, 512),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.top_k", _DISPATCH, "more than 16 experts a token", _910B,
        f"{_DISPATCH_PAGE}, K", size_not_within("expert_ids", 1, 1, 16),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.quant_mode", _DISPATCH, "another quantisation", _910B,
        f"{_DISPATCH_PAGE}, quant_mode",
        first(
            value_outside("quant_mode", 0, 2), where(has_dtype("x", INT32), value_outside("quant_mode", 0)),
            _unscaled_int32,
        ),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.scales", _DISPATCH, "scales that are not contiguous float32", _910B,
        f"{_DISPATCH_PAGE}, scales",
        first(dtype_outside(("scales", "expert_scales"), (FLOAT32,)), not_contiguous("scales")),
    ),
    Rule(
        "npu_moe_distribute_dispatch_v2.mask", _DISPATCH, "a mask of tokens that is not bool", _910B,
        f"{_DISPATCH_PAGE}, x_active_mask",
        first(
            dtype_outside(("x_active_mask",), (torch.bool,)),
            where(equals("comm_alg", "hierarchy"), given("x_active_mask")),
        ),
    ),
    Rule(
        "npu_moe_distribute_combine_v2.dtype", _COMBINE, "tokens that are neither float16 nor bfloat16", _910B,
        f"{_COMBINE_PAGE}, expand_x", dtype_outside(("expand_x",), HALVES),
    ),
    Rule(
        "npu_moe_distribute_combine_v2.index_dtype", _COMBINE, "indices that are not int32", _910B,
        f"{_COMBINE_PAGE}, expert_ids, assist_info_for_combine, ep_send_counts",
        dtype_outside(("expert_ids", "assist_info_for_combine", "ep_send_counts"), (INT32,)),
    ),
    Rule(
        "npu_moe_distribute_combine_v2.scales", _COMBINE, "weights of experts that are not float32", _910B,
        f"{_COMBINE_PAGE}, expert_scales", dtype_outside(("expert_scales", "expand_scales"), (FLOAT32,)),
    ),
    Rule(
        "npu_moe_distribute.world_size", _DISPATCH + _COMBINE, "another number of ranks", _910B,
        f"{_DISPATCH_PAGE}, ep_world_size", value_outside("ep_world_size", *_WORLDS),
    ),
    Rule(
        "npu_moe_distribute.rank", _DISPATCH + _COMBINE, "a rank beyond the ranks", _910B,
        f"{_DISPATCH_PAGE}, ep_rank_id", _rank_of_world,
    ),
    Rule(
        "npu_moe_distribute.experts", _DISPATCH + _COMBINE, "experts that cannot be divided among the ranks", _910B,
        f"{_DISPATCH_PAGE}, moe_expert_num", first(value_not_within("moe_expert_num", 1, 1024), _experts_of_ranks),
    ),
    Rule(
        "npu_moe_distribute.algorithm", _DISPATCH + _COMBINE, "another algorithm", _910B,
        f"{_DISPATCH_PAGE}, comm_alg", value_outside("comm_alg", "", "fullmesh", "hierarchy"),
    ),
    Rule(
        "npu_moe_distribute.shared", _DISPATCH + _COMBINE, "shared experts on ranks of their own", _910B,
        f"{_DISPATCH_PAGE}, shared_expert_rank_num, elastic_info",
        first(value_outside("shared_expert_rank_num", 0), given("elastic_info")),
    ),
    Rule(
        "npu_moe_distribute.expert_values", _DISPATCH + _COMBINE, "experts beyond their number, or named twice",
        _910B, f"{_COMBINE_PAGE}, expert_ids", _expert_values, of_values=True,
    ),
]  # fmt: skip

RULES: list[Rule] = _PRODUCTS + _ROUTING
