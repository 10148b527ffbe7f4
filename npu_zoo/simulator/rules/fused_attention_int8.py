"""Rows: fused attention over int8 keys and values, and their scales."""

from __future__ import annotations

from npu_zoo.simulator.rules.attention_calls import FUSED, FUSED_V1, ONLY_910B, PAGE, PAGE_V2, argument, sizes_of
from npu_zoo.simulator.rules.detect import FLOAT32, INT8, missing, only_one_of, shape, where
from npu_zoo.simulator.rules.table import Call, Rule


def _scale_modes(call: Call) -> tuple[int, int]:
    keys = argument(call, "key_antiquant_mode", "key_quant_mode")
    return keys, argument(call, "value_antiquant_mode", "value_quant_mode")


def _int8(call: Call) -> bool:
    return bool(call["key"].dtype == INT8 and call["query"].dtype != INT8)


def _int8_dim(call: Call) -> str | None:
    dim = sizes_of(call).dim
    return f"the head dimension is {dim} with int8 keys, no multiple of 32" if dim and dim % 32 else None


def _int8_layout(call: Call) -> str | None:
    sizes = sizes_of(call)
    if sizes.packed:
        return f"int8 keys in layout {sizes.layout}"
    in_rows = sizes.paged and call["key"].dim() != 5
    return f"int8 keys in pages for {sizes.length} queries" if in_rows and not sizes.decode else None


def _scale_mode_range(call: Call) -> str | None:
    allowed = (0, 1, 2, 3, 4, 5) if sizes_of(call).decode else (0, 1)
    modes = _scale_modes(call)
    return None if all(mode in allowed for mode in modes) else f"modes {modes[0]} and {modes[1]}, not in {allowed}"


def _scales_in_pages(call: Call) -> str | None:
    mode = _scale_modes(call)[0]
    if mode not in (4, 5):
        return None
    sizes, key, size = sizes_of(call), call["key"], call["block_size"]
    if not sizes.paged:
        return f"mode {mode} without block_table"
    wanted = (key.shape[0], size) if mode == 4 else (key.shape[0], sizes.kv_heads, size)
    for name in ("key", "value"):
        scale = argument(call, f"{name}_antiquant_scale", f"dequant_scale_{name}")
        if scale is not None and (tuple(scale.shape) != wanted or scale.dtype != FLOAT32):
            return f"the scales of {name} are {shape(scale)} {scale.dtype} in mode {mode}, not {wanted} torch.float32"
    return None


RULES: list[Rule] = [
    Rule(
        "fused_infer_attention.antiquant_pair", FUSED_V1, "one of the scales of keys and values", ONLY_910B,
        f"{PAGE}, key_antiquant_scale", only_one_of("key_antiquant_scale", "value_antiquant_scale"),
    ),
    Rule(
        "fused_infer_attention.antiquant_missing", FUSED_V1, "int8 keys without scales", ONLY_910B,
        f"{PAGE}, table of scenarios",
        where(
            lambda call: call["key"].dtype == INT8 and call.get("antiquant_scale") is None,
            missing("key_antiquant_scale"),
        ),
    ),
    Rule(
        "fused_infer_attention.antiquant_modes", FUSED_V1, "different modes for keys and values", ONLY_910B,
        f"{PAGE}, key_antiquant_mode",
        lambda call: None
        if (call["key_antiquant_mode"], call["value_antiquant_mode"]) == (0, 1)
        or call["key_antiquant_mode"] == call["value_antiquant_mode"]
        else f"modes {call['key_antiquant_mode']} and {call['value_antiquant_mode']}",
    ),
    Rule(
        "fused_infer_attention.int8_head_dim", FUSED, "int8 keys with a head dimension that is not of 32 bytes",
        ONLY_910B, f"{PAGE}, ranges of axes", where(_int8, _int8_dim),
    ),
    Rule(
        "fused_infer_attention.int8_layout", FUSED, "int8 keys in a packed layout, or in pages for several queries",
        ONLY_910B, f"{PAGE}, TND constraints, page attention constraints", where(_int8, _int8_layout),
    ),
    Rule(
        "fused_infer_attention.scale_modes", FUSED, "a mode of scales outside 0 to 5, or 0 and 1 for several queries",
        ONLY_910B, f"{PAGE}, key_antiquant_mode", where(_int8, _scale_mode_range),
    ),
    Rule(
        "fused_infer_attention.scales_in_pages", FUSED, "scales in pages (modes 4 and 5) of another shape or dtype",
        ONLY_910B, f"{PAGE_V2}, constraints of Q_S = 1, table of modes", where(_int8, _scales_in_pages),
    ),
]  # fmt: skip
