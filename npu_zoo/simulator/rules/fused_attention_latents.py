"""Rows: fused attention over latents (MLA), whose rotated parts come apart."""

from __future__ import annotations

from npu_zoo.simulator.rules.attention_calls import FUSED, ONLY_910B, PAGE, PAGE_V2, argument, is_latent, sizes_of
from npu_zoo.simulator.rules.detect import only_one_of, value_outside, where
from npu_zoo.simulator.rules.table import Call, Rule

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def _rope_dims(call: Call) -> str | None:
    sizes, rope, key_rope = sizes_of(call), call.get("query_rope"), call.get("key_rope")
    if rope is None or key_rope is None:
        return None
    if sizes.dim not in (128, 512):
        return f"query_rope is given and the head dimension is {sizes.dim}, not 128 or 512"
    width = rope.shape[-1] // sizes.heads if sizes.layout.startswith("BSH") else rope.shape[-1]
    if width != 64:
        return f"query_rope has {width} dimensions in a head, not 64"
    return None if rope.dtype == call["query"].dtype else f"query_rope is {rope.dtype}, query is {call['query'].dtype}"


def _latent_heads(call: Call) -> str | None:
    sizes = sizes_of(call)
    if sizes.kv_heads != 1:
        return f"{sizes.kv_heads} key heads where the head dimension is 512 with rope, not 1"
    return (
        None
        if sizes.heads in _POWERS
        else f"{sizes.heads} heads where the head dimension is 512, no power of two up to 128"
    )


def _latent_without_rope(call: Call) -> str | None:
    sizes = sizes_of(call)
    return (
        "the head dimension is 512 without query_rope and key_rope"
        if sizes.packed and sizes.dim == 512 and not sizes.rope
        else None
    )


def _lse_asked(call: Call) -> str | None:
    return (
        "softmax_lse is asked for where the head dimension is 512"
        if argument(call, "softmax_lse_flag", "return_softmax_lse")
        else None
    )


RULES: list[Rule] = [
    Rule(
        "fused_infer_attention.ropes", FUSED, "one of query_rope and key_rope", ONLY_910B,
        f"{PAGE}, MLA constraints", only_one_of("query_rope", "key_rope"),
    ),
    Rule(
        "fused_infer_attention.rope_dim", FUSED, "rope parts with other dimensions", ONLY_910B,
        f"{PAGE}, MLA constraints", _rope_dims,
    ),
    Rule(
        "fused_infer_attention.latent_heads", FUSED, "latent attention with other numbers of heads", ONLY_910B,
        f"{PAGE}, MLA constraints, D = 512", where(is_latent, _latent_heads),
    ),
    Rule(
        "fused_infer_attention.latent_rope", FUSED, "a packed layout with 512 dimensions and no rope", ONLY_910B,
        f"{PAGE}, TND constraints, D = 512", _latent_without_rope,
    ),
    Rule(
        "fused_infer_attention.latent_lse", FUSED, "the log-sum-exp of latent attention", ONLY_910B,
        f"{PAGE}, MLA constraints, D = 512", where(is_latent, _lse_asked),
    ),
    Rule(
        "fused_infer_attention.latent_sparse", FUSED, "latent attention in another sparse_mode", ONLY_910B,
        f"{PAGE}, {PAGE_V2}, MLA constraints, D = 512", where(is_latent, value_outside("sparse_mode", 0, 3, 4, 9)),
    ),
]  # fmt: skip
