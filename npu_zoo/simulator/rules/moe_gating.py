"""Rows: the experts of a token."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    FLOAT16,
    FLOATS,
    LAST,
    dtype_differs,
    dtype_outside,
    first,
    fractal_nz,
    rank_outside,
    shape,
    size_differs,
    size_not_within,
    value_outside,
)  # fmt: skip
from npu_zoo.simulator.rules.table import Call, Rule, on

_TOP = ("npu::npu_moe_gating_top_k",)
_TOP_PAGE = "op-plugin, torch_npu-npu_moe_gating_top_k.md"
_SOFTMAX = ("npu::npu_moe_gating_top_k_softmax",)
_SOFTMAX_PAGE = "op-plugin, torch_npu-npu_moe_gating_top_k_softmax.md"
_SOFTMAX_FIELD = "vllm-ascend, vllm_ascend/_310p/fused_moe/grouped_topk_router.py"
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


RULES: list[Rule] = [
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
