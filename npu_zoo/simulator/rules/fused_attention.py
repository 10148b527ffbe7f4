"""Rows: fused attention, its dtypes, layouts, heads and lengths."""

from __future__ import annotations

import itertools

from npu_zoo.simulator.rules.attention_calls import (
    FUSED,
    FUSED_V1,
    FUSED_V2,
    ONLY_910B,
    PAGE,
    PAGE_V2,
    key_lengths,
    query_lengths,
    sizes_of,
    uneven_groups,
)  # fmt: skip
from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    HALVES,
    INT8,
    INT32,
    dtype_outside,
    not_contiguous,
    shape,
    value_outside,
)  # fmt: skip
from npu_zoo.simulator.rules.table import UNDOCUMENTED, Call, Rule, on

_LAYOUTS = (
    "BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND", "TND_NTD", "NTD_TND",
    "NTD", "BSH_BNSD", "BSND_BNSD",
)  # fmt: skip


def _mixed_dtypes(call: Call) -> str | None:
    query, key, value = call["query"], call["key"], call["value"]
    if key.dtype != value.dtype:
        return f"key is {key.dtype} and value is {value.dtype}"
    quantised = key.dtype in (INT8, INT32)
    return None if quantised or key.dtype == query.dtype else f"query is {query.dtype} and key is {key.dtype}"


def _rank(call: Call) -> str | None:
    sizes = sizes_of(call)
    return None if sizes.fits else f"query is {shape(call['query'])} in layout {sizes.layout}"


def _query_heads(call: Call) -> str | None:
    sizes = sizes_of(call)
    if sizes.query_heads is not None and sizes.query_heads != sizes.heads:
        return (
            f"{sizes.heads} heads are given and query {shape(call['query'])} in {sizes.layout} has {sizes.query_heads}"
        )
    hidden = call["query"].shape[-1]
    if sizes.layout.startswith("BSH") and sizes.heads and hidden % sizes.heads:
        return f"query has {hidden} elements in a row, not divisible by {sizes.heads} heads"
    return None


def _kv_head_axis(call: Call) -> int | None:
    """The number of heads that the shape of key shows."""
    sizes, key = sizes_of(call), call["key"]
    if sizes.dim is None:
        return None
    if sizes.paged:
        if key.dim() == 3:
            return int(key.shape[2] // sizes.dim) if key.shape[2] % sizes.dim == 0 else 0
        return int(key.shape[1]) if key.dim() in (4, 5) else None
    inner = sizes.layout.partition("_")[0]
    if key.dim() != len(inner):
        return None
    if "N" in inner:
        return int(key.shape[inner.index("N")])
    return int(key.shape[-1] // sizes.dim) if key.shape[-1] % sizes.dim == 0 else 0


def _kv_heads(call: Call) -> str | None:
    sizes, shown = sizes_of(call), _kv_head_axis(call)
    if call["key"].dtype == INT32 or shown is None or shown == sizes.kv_heads:
        return None
    return f"{sizes.kv_heads} key heads are given and key {shape(call['key'])} in {sizes.layout} has {shown}"


def _head_count(call: Call) -> str | None:
    heads = sizes_of(call).heads
    return None if 1 <= heads <= 256 else f"{heads} heads, not in [1, 256]"


def _head_dim(call: Call) -> str | None:
    dim = sizes_of(call).dim
    if dim is None:
        return None
    if dim > 512:
        return f"the head dimension is {dim}, more than 512"
    return f"the head dimension is {dim}: {2 * dim} bytes, no multiple of 16 bytes" if dim % 8 else None


def _packed_dim(call: Call) -> str | None:
    sizes = sizes_of(call)
    if not sizes.packed or sizes.dim in (64, 512, None):
        return None
    last = int(call["value"].shape[-1]) if not sizes.paged else sizes.dim
    if sizes.dim == 128 or (sizes.dim == 192 and not sizes.rope and last in (128, 192)):
        return None
    return f"the head dimension is {sizes.dim} in layout {sizes.layout}, not 128 (or 192 without rope)"


def _packed_dim_64(call: Call) -> str | None:
    sizes = sizes_of(call)
    return f"the head dimension is 64 in layout {sizes.layout}" if sizes.packed and sizes.dim == 64 else None


def _packed_lengths(call: Call) -> str | None:
    sizes = sizes_of(call)
    if not sizes.packed:
        return None
    query, kv = query_lengths(call), key_lengths(call)
    if query is None or kv is None:
        return f"layout {sizes.layout} without the lengths of {'queries' if query is None else 'keys'}"
    if len(query) > 4096:
        return f"{len(query)} sequences, more than 4096"
    return None if len(query) == len(kv) else f"{len(query)} lengths of queries and {len(kv)} of keys"


def _not_cumulative(call: Call) -> str | None:
    sizes = sizes_of(call)
    checked = [query_lengths(call)] + ([] if sizes.paged else [key_lengths(call)])
    for lengths in checked if sizes.packed else ():
        numbers = [0, *(lengths or ())]
        if any(after < before for before, after in itertools.pairwise(numbers)):
            return f"the lengths {list(lengths or ())} in layout {sizes.layout} are not cumulative"
    return None


def _lengths_not_of_tokens(call: Call) -> str | None:
    sizes, lengths = sizes_of(call), query_lengths(call)
    if not sizes.packed or not lengths:
        return None
    tokens = call["query"].shape[sizes.layout.partition("_")[0].index("T")]
    return (
        f"the cumulative lengths end at {lengths[-1]} and query has {tokens} tokens" if lengths[-1] > tokens else None
    )


def _key_value_shapes(call: Call) -> str | None:
    key, value, sizes = call["key"], call["value"], sizes_of(call)
    if sizes.packed and not sizes.paged and sizes.dim == 192:
        key, value = key[..., 0], value[..., 0]
    return None if key.shape == value.shape else f"key is {shape(call['key'])} and value is {shape(call['value'])}"


def _inner_precise(call: Call) -> str | None:
    value, sizes = call["inner_precise"], sizes_of(call)
    allowed = (0, 1) if sizes.decode else (0, 1, 2, 3)
    return None if value in allowed else f"inner_precise is {value}, not one of {allowed}"


RULES: list[Rule] = [
    Rule(
        "fused_infer_attention.query_dtype", FUSED_V1, "a query that is neither float16 nor bfloat16", ONLY_910B,
        f"{PAGE}, query", dtype_outside(("query",), HALVES),
    ),
    Rule(
        "fused_infer_attention.query_dtype_v2", FUSED_V2, "a query of another dtype", ONLY_910B,
        f"{PAGE_V2}, query, MLA", dtype_outside(("query",), (*HALVES, INT8)),
    ),
    Rule(
        "fused_infer_attention.kv_dtype", FUSED, "keys or values of another dtype", ONLY_910B, f"{PAGE}, key, value",
        dtype_outside(("key", "value"), (*HALVES, INT8, INT32)),
    ),
    Rule(
        "fused_infer_attention.dtypes", FUSED, "query, key and value of different float dtypes", ONLY_910B,
        f"{PAGE}, table of page attention and pseudo-quantisation (dtypes of query and key agree)", _mixed_dtypes,
    ),
    Rule(
        "fused_infer_attention.layout", FUSED, "a layout that is not documented", ONLY_910B, f"{PAGE}, input_layout",
        value_outside("input_layout", *_LAYOUTS),
    ),
    Rule(
        "fused_infer_attention.rank", FUSED, "a query that does not fit the layout", ONLY_910B,
        f"{PAGE}, input_layout", _rank,
    ),
    Rule(
        "fused_infer_attention.contiguous", FUSED, "tensors that are not contiguous", ONLY_910B,
        f"{PAGE}, query, key, value",
        not_contiguous("query", "key", "value", "atten_mask", "query_rope", "key_rope"),
    ),
    Rule(
        "fused_infer_attention.key_value_shape", FUSED, "key and value of different shapes", ONLY_910B,
        f"{PAGE}, general constraints", _key_value_shapes,
    ),
    Rule(
        "fused_infer_attention.head_count", FUSED, "more than 256 heads", ONLY_910B, f"{PAGE}, ranges of axes",
        _head_count,
    ),
    Rule(
        "fused_infer_attention.num_heads", FUSED, "a number of heads that the query does not have", ONLY_910B,
        f"{PAGE}, num_heads", _query_heads,
    ),
    Rule(
        "fused_infer_attention.groups", FUSED, "key heads that do not divide the heads", ONLY_910B,
        f"{PAGE}, num_key_value_heads", uneven_groups,
    ),
    Rule(
        "fused_infer_attention.num_key_value_heads", FUSED, "a number of key heads that the key does not have",
        ONLY_910B, f"{PAGE}, num_key_value_heads", _kv_heads,
    ),
    Rule(
        "fused_infer_attention.head_dim", FUSED, "a head dimension above 512, or not of 16 bytes", ONLY_910B,
        f"{PAGE}, ranges of axes", _head_dim,
    ),
    Rule(
        "fused_infer_attention.packed_head_dim", FUSED,
        "a packed layout with another head dimension than 128, 192 or 512", ONLY_910B, f"{PAGE}, TND constraints",
        _packed_dim,
    ),
    Rule(
        "fused_infer_attention.packed_head_dim_64", FUSED, "a packed layout with a head dimension of 64",
        on("ascend910b", value=UNDOCUMENTED),
        f"{PAGE}, TND constraints; used in vllm-ascend, vllm_ascend/attention/attention_v1.py (layout TND) with "
        "tests/e2e/doctests/001-quickstart-test.sh (Qwen2.5-0.5B, 64 dimensions a head)",
        _packed_dim_64,
    ),
    Rule(
        "fused_infer_attention.packed_lengths", FUSED, "a packed layout without lengths", ONLY_910B,
        f"{PAGE}, TND constraints", _packed_lengths,
    ),
    Rule(
        "fused_infer_attention.cumulative", FUSED, "lengths of a packed layout that are not cumulative", ONLY_910B,
        f"{PAGE}, actual_seq_lengths", _not_cumulative,
    ),
    Rule(
        "fused_infer_attention.tokens", FUSED, "cumulative lengths beyond the tokens", ONLY_910B,
        f"{PAGE}, actual_seq_lengths", _lengths_not_of_tokens,
    ),
    Rule(
        "fused_infer_attention.inner_precise", FUSED, "an inner_precise outside the documented ones", ONLY_910B,
        f"{PAGE}, inner_precise", _inner_precise,
    ),
    Rule(
        "fused_infer_attention.sink_dtype", FUSED_V2, "a learnable sink that is not bfloat16", ONLY_910B,
        f"{PAGE_V2}, learnable_sink", dtype_outside(("learnable_sink",), (BFLOAT16,)),
    ),
]  # fmt: skip
