"""Rows: rotary position embeddings."""

from __future__ import annotations

from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOATS,
    HALVES,
    INT32,
    INT64,
    LAST,
    dtype_differs,
    dtype_outside,
    elements_outside,
    empty,
    first,
    not_contiguous,
    rank_outside,
    shape,
    size_not_multiple,
    size_outside,
    value_outside,
)  # fmt: skip
from npu_zoo.simulator.rules.table import Call, Rule, on

_APPLY = ("npu::npu_apply_rotary_pos_emb",)
_APPLY_PAGE = "op-plugin, torch_npu-apply_rotary_pos_emb.md"
_MUL = ("npu::npu_rotary_mul",)
_MUL_PAGE = "op-plugin, torch_npu-npu_rotary_mul.md"
_INTERLEAVE = ("npu::npu_interleave_rope",)
_INTERLEAVE_PAGE = "op-plugin, torch_npu-npu_interleave_rope.md"
_MROPE = ("npu::npu_mrope",)
_MROPE_PAGE = "op-plugin, torch_npu-npu_mrope.md"
_ATB = ("atb::_npu_rotary_embedding",)
_ATB_SOURCE = "op-plugin, op_plugin/ops/atb/RopeAtb.cpp"


def _apply_rank(call: Call) -> str | None:
    wanted = 3 if call["layout"] == "TND" else 4
    for name in ("query", "key", "cos", "sin"):
        if call[name].dim() != wanted:
            return f"{name} is {shape(call[name])} in layout {call['layout']}"
    return None


def _apply_shapes(call: Call) -> str | None:
    query = call["query"]
    tokens = query.shape[:-2]
    for name in ("key", "cos", "sin"):
        if call[name].shape[:-2] != tokens:
            return f"{name} is {shape(call[name])} where query is {shape(query)}"
    for name in ("cos", "sin"):
        if call[name].shape[-2] != 1:
            return f"{name} is {shape(call[name])}, its heads are not 1"
    if call["key"].shape[-1] != query.shape[-1] or call["cos"].shape[-1] != call["sin"].shape[-1]:
        return (
            f"query is {shape(query)}, key {shape(call['key'])}, cos {shape(call['cos'])} and sin {shape(call['sin'])}"
        )
    return None


def _mul_shapes(call: Call) -> str | None:
    x = call["input"]
    for name in ("r1", "r2"):
        factor = call[name]
        if factor.dim() != x.dim() or any(
            size not in (1, whole) for size, whole in zip(factor.shape, x.shape, strict=False)
        ):
            return f"{name} is {shape(factor)} for input {shape(x)}"
    return None if call["r1"].shape == call["r2"].shape else f"r1 is {shape(call['r1'])} and r2 {shape(call['r2'])}"


def _interleave_shapes(call: Call) -> str | None:
    x, cos, sin = call["x"], call["cos"], call["sin"]
    if cos.dim() != 4 or cos.shape[0] != x.shape[0] or cos.shape[1] != 1 or cos.shape[2] not in (1, x.shape[2]):
        return f"cos is {shape(cos)} for x {shape(x)}"
    return None if cos.shape == sin.shape else f"cos is {shape(cos)} and sin {shape(sin)}"


def _mrope_shapes(call: Call) -> str | None:
    query, key, size = call["query"], call["key"], call["head_size"]
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 2 or tensor.shape[1] % size:
            return f"{name} is {shape(tensor)} for a head_size of {size}"
    tokens = call["positions"].shape[-1]
    return (
        None
        if query.shape[0] == key.shape[0] == tokens
        else f"query {shape(query)}, key {shape(key)}, {tokens} positions"
    )


def _mrope_multiples(call: Call) -> str | None:
    multiple = 16 if call["query"].dtype == FLOAT32 else 32
    size, rotary = call["head_size"], call["cos_sin_cache"].shape[-1]
    for name, value in (("head_size", size), ("rotary_dim", rotary)):
        if value % multiple:
            return f"{name} is {value}, no multiple of {multiple} in {call['query'].dtype}"
    return f"rotary_dim is {rotary}, more than head_size {size}" if rotary > size else None


def _mrope_section(call: Call) -> str | None:
    section, rotary = list(call["mrope_section"] or ()), call["cos_sin_cache"].shape[-1]
    if not any(section):
        return None
    if sum(section) != rotary // 2:
        return f"mrope_section {section} sums to {sum(section)}, not {rotary // 2}"
    positions = call["positions"]
    return None if positions.dim() == 2 and positions.shape[0] == len(section) else f"positions is {shape(positions)}"


def _atb_shapes(call: Call) -> str | None:
    tokens, size = call["positions"].numel(), call["head_size"]
    for name in ("query", "key"):
        tensor = call[name]
        if tensor.shape[0] != tokens or tensor[0].numel() % size:
            return f"{name} is {shape(tensor)} for {tokens} positions and a head_size of {size}"
    return None


def _cached(call: Call) -> int:
    return int(call["cos_sin_cache"].shape[0])


_BOTH = on()

RULES: list[Rule] = [
    Rule(
        "apply_rotary_pos_emb.dtype", _APPLY, "tensors that are no floats", _BOTH,
        f"{_APPLY_PAGE}, query, key, cos, sin", dtype_outside(("query", "key", "cos", "sin"), FLOATS),
    ),
    Rule(
        "apply_rotary_pos_emb.dtypes", _APPLY, "tensors of different dtypes", _BOTH, f"{_APPLY_PAGE}, constraints",
        dtype_differs("query", "key", "cos", "sin"),
    ),
    Rule(
        "apply_rotary_pos_emb.layout", _APPLY, "a layout other than BSND and TND", _BOTH, f"{_APPLY_PAGE}, layout",
        value_outside("layout", "BSND", "TND"),
    ),
    Rule(
        "apply_rotary_pos_emb.rotary_mode", _APPLY, "a rotary_mode other than half", _BOTH,
        f"{_APPLY_PAGE}, rotary_mode", value_outside("rotary_mode", "half"),
    ),
    Rule(
        "apply_rotary_pos_emb.rank", _APPLY, "tensors that do not fit the layout", _BOTH, f"{_APPLY_PAGE}, layout",
        _apply_rank,
    ),
    Rule(
        "apply_rotary_pos_emb.head_dim", _APPLY, "a head dimension other than 64 and 128", _BOTH,
        f"{_APPLY_PAGE}, query",
        first(*(size_outside(name, LAST, 64, 128) for name in ("query", "key", "cos", "sin"))),
    ),
    Rule(
        "apply_rotary_pos_emb.shape", _APPLY, "tensors that do not fit together", _BOTH,
        f"{_APPLY_PAGE}, constraints", _apply_shapes,
    ),
    Rule(
        "apply_rotary_pos_emb.empty", _APPLY, "empty tensors", _BOTH, f"{_APPLY_PAGE}, query",
        empty("query", "key", "cos", "sin"),
    ),
    Rule(
        "npu_rotary_mul.dtype", _MUL, "tensors that are no floats", _BOTH, f"{_MUL_PAGE}, input, r1, r2",
        dtype_outside(("input", "r1", "r2"), FLOATS),
    ),
    Rule(
        "npu_rotary_mul.rank", _MUL, "tensors outside 3 and 4 dimensions", _BOTH, f"{_MUL_PAGE}, input, r1, r2",
        first(*(rank_outside(name, 3, 4) for name in ("input", "r1", "r2"))),
    ),
    Rule(
        "npu_rotary_mul.rotary_mode", _MUL, "another rotary_mode", _BOTH, f"{_MUL_PAGE}, rotary_mode",
        value_outside("rotary_mode", "half", "interleave"),
    ),
    Rule(
        "npu_rotary_mul.shape", _MUL, "factors that cannot be broadcast to the input", _BOTH,
        f"{_MUL_PAGE}, formula", _mul_shapes,
    ),
    Rule(
        "npu_rotary_mul.odd", _MUL, "an odd head dimension", _BOTH, f"{_MUL_PAGE}, formula",
        size_not_multiple("input", LAST, 2),
    ),
    Rule(
        "npu_interleave_rope.dtype", _INTERLEAVE, "tensors that are neither float16 nor bfloat16", _BOTH,
        f"{_INTERLEAVE_PAGE}, x", dtype_outside(("x", "cos", "sin"), HALVES),
    ),
    Rule(
        "npu_interleave_rope.dtypes", _INTERLEAVE, "tensors of different dtypes", _BOTH,
        f"{_INTERLEAVE_PAGE}, cos, sin", dtype_differs("x", "cos", "sin"),
    ),
    Rule(
        "npu_interleave_rope.rank", _INTERLEAVE, "an x of other dimensions", _BOTH, f"{_INTERLEAVE_PAGE}, x",
        rank_outside("x", 4),
    ),
    Rule(
        "npu_interleave_rope.head_dim", _INTERLEAVE, "a head dimension other than 64", _BOTH,
        f"{_INTERLEAVE_PAGE}, constraints", first(*(size_outside(name, LAST, 64) for name in ("x", "cos", "sin"))),
    ),
    Rule(
        "npu_interleave_rope.shape", _INTERLEAVE, "factors that do not fit", _BOTH,
        f"{_INTERLEAVE_PAGE}, cos, sin, constraints", _interleave_shapes,
    ),
    Rule(
        "npu_interleave_rope.contiguous", _INTERLEAVE, "tensors that are not contiguous", _BOTH,
        f"{_INTERLEAVE_PAGE}, x, cos, sin", not_contiguous("x", "cos", "sin"),
    ),
    Rule(
        "npu_mrope.dtype", _MROPE, "tensors that are no floats", _BOTH, f"{_MROPE_PAGE}, query",
        dtype_outside(("query", "key", "cos_sin_cache"), FLOATS),
    ),
    Rule(
        "npu_mrope.dtypes", _MROPE, "tensors of different dtypes", _BOTH, f"{_MROPE_PAGE}, cos_sin_cache",
        dtype_differs("query", "key", "cos_sin_cache"),
    ),
    Rule(
        "npu_mrope.position_dtype", _MROPE, "positions that are neither int32 nor int64", _BOTH,
        f"{_MROPE_PAGE}, positions", dtype_outside(("positions",), (INT32, INT64)),
    ),
    Rule("npu_mrope.shape", _MROPE, "tensors that do not fit", _BOTH, f"{_MROPE_PAGE}, query, key", _mrope_shapes),
    Rule(
        "npu_mrope.multiples", _MROPE, "head sizes that are no multiples", _BOTH, f"{_MROPE_PAGE}, constraints",
        _mrope_multiples,
    ),
    Rule(
        "npu_mrope.section", _MROPE, "sections that do not fit", _BOTH, f"{_MROPE_PAGE}, constraints",
        _mrope_section,
    ),
    Rule(
        "npu_mrope.rotary_mode", _MROPE, "another rotary_mode", _BOTH,
        f"{_MROPE_PAGE}, rotary_mode; torch_npu, _op_plugin_docs.py",
        value_outside("rotary_mode", "half", "interleaved", "interleave", None),
    ),
    Rule(
        "npu_mrope.positions", _MROPE, "positions beyond the cache", _BOTH, f"{_MROPE_PAGE}, positions",
        elements_outside("positions", 0, _cached), of_values=True,
    ),
    Rule(
        "_npu_rotary_embedding.position_dtype", _ATB, "positions that are neither int32 nor int64", _BOTH,
        _ATB_SOURCE, dtype_outside(("positions",), (INT32, INT64)),
    ),
    Rule(
        "_npu_rotary_embedding.shape", _ATB, "tensors that do not fit the positions", _BOTH, _ATB_SOURCE,
        _atb_shapes,
    ),
    Rule(
        "_npu_rotary_embedding.dtype", _ATB, "tensors that are neither float16 nor bfloat16", _BOTH,
        "op-plugin, test/test_custom_ops/test_atb_rope.py", dtype_outside(("query", "key"), (FLOAT16, BFLOAT16)),
    ),
    Rule(
        "_npu_rotary_embedding.positions", _ATB, "positions beyond the cache", _BOTH, _ATB_SOURCE,
        elements_outside("positions", 0, _cached), of_values=True,
    ),
]  # fmt: skip
