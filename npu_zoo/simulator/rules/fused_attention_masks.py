"""Rows: fused attention, its masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npu_zoo.simulator.rules.attention_calls import (
    FUSED,
    FUSED_V1,
    FUSED_V2,
    ONLY_910B,
    PAGE,
    PAGE_V2,
    compressed_mask,
    ignores_sparse,
    sizes_of,
)  # fmt: skip
from npu_zoo.simulator.rules.detect import INT8, dtype_outside, shape, value_outside
from npu_zoo.simulator.rules.table import Call, Detect, Rule


def _full_mask(call: Call) -> str | None:
    sizes, mask = sizes_of(call), call["atten_mask"]
    if call["sparse_mode"] not in (0, 1) or sizes.packed:
        return None
    if mask is None:
        return "sparse_mode 1 without atten_mask" if call["sparse_mode"] == 1 and not ignores_sparse(call) else None
    if sizes.length is None or sizes.paged:
        return None
    inner = sizes.layout.partition("_")[0]
    keys = call["key"].shape[inner.index("S")] if call["key"].dim() == len(inner) else None
    batch, length = sizes.batch, sizes.length
    wanted: list[tuple[int | None, ...]] = [(batch, keys) if sizes.decode else (length, keys)]
    wanted += [(1, length, keys), (batch, 1, length, keys), (1, 1, length, keys)]
    return (
        None
        if tuple(mask.shape) in wanted
        else f"atten_mask is {shape(mask)} for {sizes.length} queries and {keys} keys"
    )


def _sparse_mode(modes: Sequence[int]) -> Detect:
    outside = value_outside("sparse_mode", *modes)
    return lambda call: None if ignores_sparse(call) else outside(call)


RULES: list[Rule] = [
    Rule(
        "fused_infer_attention.sparse_mode", FUSED_V1, "a sparse_mode outside 0 to 4", ONLY_910B,
        f"{PAGE}, sparse_mode", _sparse_mode((0, 1, 2, 3, 4)),
    ),
    Rule(
        "fused_infer_attention.sparse_mode_v2", FUSED_V2, "a sparse_mode outside 0 to 4, and 9", ONLY_910B,
        f"{PAGE_V2}, sparse_mode", _sparse_mode((0, 1, 2, 3, 4, 9)),
    ),
    Rule(
        "fused_infer_attention.mask_dtype", FUSED, "a mask that is not bool, int8 or uint8", ONLY_910B,
        f"{PAGE}, atten_mask", dtype_outside(("atten_mask",), (torch.bool, INT8, torch.uint8)),
    ),
    Rule(
        "fused_infer_attention.compressed_mask", FUSED, "sparse_mode 2 to 4 without a mask of 2048 x 2048", ONLY_910B,
        f"{PAGE}, sparse_mode", compressed_mask,
    ),
    Rule(
        "fused_infer_attention.full_mask", FUSED, "sparse_mode 0 or 1 with a mask of another shape", ONLY_910B,
        f"{PAGE}, atten_mask", _full_mask,
    ),
]  # fmt: skip
