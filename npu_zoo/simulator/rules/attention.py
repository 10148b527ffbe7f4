"""Rows: attention, fused and through ATB."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from npu_zoo.simulator.rules.detect import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    HALVES,
    INT8,
    INT32,
    LAST,
    dtype_differs,
    dtype_outside,
    first,
    given,
    is_given,
    missing,
    not_contiguous,
    not_fractal_nz,
    only_one_of,
    rank_outside,
    shape,
    shape_differs,
    size_not_multiple,
    size_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import FRACTAL_NZ, UNDOCUMENTED, Call, Detect, Rule, format_of, on

_V1 = ("npu::npu_fused_infer_attention_score",)
_V2 = ("npu::npu_fused_infer_attention_score_v2",)
_FIA = _V1 + _V2
_PAGE = "op-plugin, torch_npu-npu_fused_infer_attention_score.md"
_PAGE_V2 = "op-plugin, torch_npu-npu_fused_infer_attention_score_v2.md"
_PFA = ("npu::npu_prompt_flash_attention",)
_PFA_PAGE = "op-plugin, torch_npu-npu_prompt_flash_attention.md"
_IFA = ("npu::npu_incre_flash_attention",)
_IFA_PAGE = "op-plugin, torch_npu-npu_incre_flash_attention.md"
_UPDATE = ("npu::npu_attention_update",)
_UPDATE_PAGE = "op-plugin, torch_npu-npu_attention_update.md"

_LAYOUTS = (
    "BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND", "TND_NTD", "NTD_TND",
    "NTD", "BSH_BNSD", "BSND_BNSD",
)  # fmt: skip
_PACKED = ("TND", "TND_NTD", "NTD_TND", "NTD")
_COMPRESSED = ((2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048))
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)

_ATB = "op-plugin, op_plugin/ops/atb/"
_ATB_TESTS = "op-plugin, test/test_custom_ops/"
_FIELD = "vllm-ascend, vllm_ascend/_310p/"
_PAGED = (
    "atb::_npu_paged_attention", "atb::_npu_paged_attention_splitfuse", "atb::_npu_paged_attention_splitfuse_v2",
    "atb::_npu_paged_attention_get_workspace",
)  # fmt: skip
_FLASH = (
    "atb::_npu_flash_attention", "atb::_npu_flash_attention_v3", "atb::_npu_flash_attention_unpad",
    "atb::_npu_flash_attention_unpad_v2",
)  # fmt: skip
_SPLITFUSE_V2 = ("atb::_npu_paged_attention_splitfuse_v2",)
_FLASH_V3 = ("atb::_npu_flash_attention_v3",)


class _Shapes:
    """The sizes of a call of fused attention, read by its layout; None where a size is not in the shapes."""

    def __init__(self, call: Call) -> None:
        query = call["query"]
        self.layout: str = call["input_layout"]
        self.heads: int = _named(call, "num_heads", "num_query_heads")
        self.kv_heads: int = call["num_key_value_heads"] or self.heads
        inner = self.layout.partition("_")[0]
        axes: dict[str, int] = dict(zip(inner, query.shape, strict=True)) if query.dim() == len(inner) else {}
        self.fits = query.dim() == len(inner)
        self.batch: int | None = axes.get("B")
        self.length: int | None = axes.get("S")
        self.query_heads: int | None = axes.get("N")
        hidden = axes.get("H")
        self.dim: int | None = axes["D"] if "D" in axes else hidden // self.heads if hidden and self.heads else None
        self.packed = self.layout in _PACKED
        self.paged = call.get("block_table") is not None
        self.rope = call.get("query_rope") is not None
        self.decode = self.length == 1


def _shapes(call: Call) -> _Shapes:
    if "attention" not in call.notes:
        call.notes["attention"] = _Shapes(call)
    sizes: _Shapes = call.notes["attention"]
    return sizes


def _named(call: Call, *names: str) -> Any:
    return next((call[name] for name in names if name in call.arguments), None)


def _query_lengths(call: Call) -> Sequence[int] | None:
    lengths: Sequence[int] | None = _named(call, "actual_seq_lengths", "actual_seq_qlen")
    return lengths


def _kv_lengths(call: Call) -> Sequence[int] | None:
    lengths: Sequence[int] | None = _named(call, "actual_seq_lengths_kv", "actual_seq_kvlen")
    return lengths


def _mixed_dtypes(call: Call) -> str | None:
    query, key, value = call["query"], call["key"], call["value"]
    if key.dtype != value.dtype:
        return f"key is {key.dtype} and value is {value.dtype}"
    quantised = key.dtype in (INT8, INT32)
    return None if quantised or key.dtype == query.dtype else f"query is {query.dtype} and key is {key.dtype}"


def _rank(call: Call) -> str | None:
    sizes = _shapes(call)
    return None if sizes.fits else f"query is {shape(call['query'])} in layout {sizes.layout}"


def _query_heads(call: Call) -> str | None:
    sizes = _shapes(call)
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
    sizes, key = _shapes(call), call["key"]
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
    sizes, shown = _shapes(call), _kv_head_axis(call)
    if call["key"].dtype == INT32 or shown is None or shown == sizes.kv_heads:
        return None
    return f"{sizes.kv_heads} key heads are given and key {shape(call['key'])} in {sizes.layout} has {shown}"


def _groups(call: Call) -> str | None:
    sizes = _shapes(call)
    if sizes.heads % sizes.kv_heads:
        return f"{sizes.heads} heads are not divisible by {sizes.kv_heads} key heads"
    if sizes.heads // sizes.kv_heads > 64 and not _is_latent(call):
        return f"{sizes.heads} heads are {sizes.heads // sizes.kv_heads} times {sizes.kv_heads} key heads, more than 64"
    return None


def _head_count(call: Call) -> str | None:
    heads = _shapes(call).heads
    return None if 1 <= heads <= 256 else f"{heads} heads, not in [1, 256]"


def _head_dim(call: Call) -> str | None:
    dim = _shapes(call).dim
    if dim is None:
        return None
    if dim > 512:
        return f"the head dimension is {dim}, more than 512"
    return f"the head dimension is {dim}: {2 * dim} bytes, no multiple of 16 bytes" if dim % 8 else None


def _packed_dim(call: Call) -> str | None:
    sizes = _shapes(call)
    if not sizes.packed or sizes.dim in (64, 512, None):
        return None
    last = int(call["value"].shape[-1]) if not sizes.paged else sizes.dim
    if sizes.dim == 128 or (sizes.dim == 192 and not sizes.rope and last in (128, 192)):
        return None
    return f"the head dimension is {sizes.dim} in layout {sizes.layout}, not 128 (or 192 without rope)"


def _packed_dim_64(call: Call) -> str | None:
    sizes = _shapes(call)
    return f"the head dimension is 64 in layout {sizes.layout}" if sizes.packed and sizes.dim == 64 else None


def _packed_lengths(call: Call) -> str | None:
    sizes = _shapes(call)
    if not sizes.packed:
        return None
    query, kv = _query_lengths(call), _kv_lengths(call)
    if query is None or kv is None:
        return f"layout {sizes.layout} without the lengths of {'queries' if query is None else 'keys'}"
    if len(query) > 4096:
        return f"{len(query)} sequences, more than 4096"
    return None if len(query) == len(kv) else f"{len(query)} lengths of queries and {len(kv)} of keys"


def _not_cumulative(call: Call) -> str | None:
    sizes = _shapes(call)
    checked = [_query_lengths(call)] + ([] if sizes.paged else [_kv_lengths(call)])
    for lengths in checked if sizes.packed else ():
        numbers = [0, *(lengths or ())]
        if any(after < before for before, after in itertools.pairwise(numbers)):
            return f"the lengths {list(lengths or ())} in layout {sizes.layout} are not cumulative"
    return None


def _lengths_not_of_tokens(call: Call) -> str | None:
    sizes, lengths = _shapes(call), _query_lengths(call)
    if not sizes.packed or not lengths:
        return None
    tokens = call["query"].shape[sizes.layout.partition("_")[0].index("T")]
    return (
        f"the cumulative lengths end at {lengths[-1]} and query has {tokens} tokens" if lengths[-1] > tokens else None
    )


def _block_size(call: Call) -> str | None:
    sizes, size = _shapes(call), call["block_size"]
    if not sizes.paged:
        return None
    if sizes.packed or sizes.dim == 512:
        return None if 0 < size <= 1024 and size % 16 == 0 else f"block_size is {size}, no multiple of 16 up to 1024"
    if sizes.decode:
        least = 32 if call["key"].dtype == INT8 else 16
        return (
            None if 0 < size <= 512 and size % least == 0 else f"block_size is {size}, no multiple of {least} up to 512"
        )
    return None if size in (128, 256, 384, 512) else f"block_size is {size}, no multiple of 128 from 128 to 512"


def _block_axis(call: Call) -> str | None:
    if call.get("block_table") is None:
        return None
    key, size = call["key"], call["block_size"]
    axis = {3: 1, 4: 2, 5: 3}.get(key.dim())
    if axis is None:
        return f"key is {shape(key)}, no cache of blocks"
    return (
        None
        if key.shape[axis] == size
        else f"block_size is {size} and key {shape(key)} has blocks of {key.shape[axis]}"
    )


def _cache_rank(call: Call) -> str | None:
    sizes = _shapes(call)
    if sizes.paged and sizes.layout.startswith("BS") and call["key"].dim() == 4 and sizes.dim != 512:
        return f"key is {shape(call['key'])} in layout {sizes.layout}, which allows [blocks, block_size, H] alone"
    return None


def _block_table(call: Call) -> str | None:
    table, sizes = call.get("block_table"), _shapes(call)
    if table is None:
        return None
    if table.dtype != INT32:
        return f"block_table is {table.dtype}, not torch.int32"
    if table.dim() != 2:
        return f"block_table has {table.dim()} dimensions, not 2"
    lengths = _kv_lengths(call)
    batch = len(lengths or ()) if sizes.packed else sizes.batch
    return f"block_table is {shape(table)} for {batch} sequences" if batch and table.shape[0] < batch else None


def _short_block_table(call: Call) -> str | None:
    table, lengths, size = call.get("block_table"), _kv_lengths(call), call["block_size"]
    if table is None or table.dim() != 2 or not lengths or not size:
        return None
    needed = -(-max(lengths) // size)
    return (
        f"block_table has {table.shape[1]} columns, {max(lengths)} keys need {needed}"
        if table.shape[1] < needed
        else None
    )


def _kv_lengths_missing(call: Call) -> str | None:
    return (
        "block_table is given without the lengths of keys"
        if call.get("block_table") is not None and not _kv_lengths(call)
        else None
    )


def _length_beyond(call: Call) -> str | None:
    sizes, lengths = _shapes(call), _kv_lengths(call)
    inner = sizes.layout.partition("_")[0]
    if sizes.paged or sizes.packed or not lengths or call["key"].dim() != len(inner):
        return None
    rows = call["key"].shape[inner.index("S")]
    return f"{max(lengths)} keys are asked for and key has {rows}" if max(lengths) > rows else None


def _lengths_count(call: Call) -> str | None:
    sizes, lengths = _shapes(call), _kv_lengths(call)
    if sizes.packed or not lengths or sizes.batch is None or len(lengths) == 1 or len(lengths) >= sizes.batch:
        return None
    return f"{len(lengths)} lengths of keys for {sizes.batch} sequences"


def _ignores_sparse(call: Call) -> bool:
    sizes = _shapes(call)
    return sizes.decode and not sizes.rope


def _compressed_mask(call: Call) -> str | None:
    if call["sparse_mode"] not in (2, 3, 4) or _ignores_sparse(call):
        return None
    mask = call["atten_mask"]
    if mask is None:
        return f"sparse_mode {call['sparse_mode']} without atten_mask"
    return (
        None
        if tuple(mask.shape) in _COMPRESSED
        else f"atten_mask is {shape(mask)} in sparse_mode {call['sparse_mode']}"
    )


def _full_mask(call: Call) -> str | None:
    sizes, mask = _shapes(call), call["atten_mask"]
    if call["sparse_mode"] not in (0, 1) or sizes.packed:
        return None
    if mask is None:
        return "sparse_mode 1 without atten_mask" if call["sparse_mode"] == 1 and not _ignores_sparse(call) else None
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
    return lambda call: None if _ignores_sparse(call) else outside(call)


def _rope_dims(call: Call) -> str | None:
    sizes, rope, key_rope = _shapes(call), call.get("query_rope"), call.get("key_rope")
    if rope is None or key_rope is None:
        return None
    if sizes.dim not in (128, 512):
        return f"query_rope is given and the head dimension is {sizes.dim}, not 128 or 512"
    width = rope.shape[-1] // sizes.heads if sizes.layout.startswith("BSH") else rope.shape[-1]
    if width != 64:
        return f"query_rope has {width} dimensions in a head, not 64"
    return None if rope.dtype == call["query"].dtype else f"query_rope is {rope.dtype}, query is {call['query'].dtype}"


def _is_latent(call: Call) -> bool:
    sizes = _shapes(call)
    return sizes.rope and sizes.dim == 512


def _latent_heads(call: Call) -> str | None:
    sizes = _shapes(call)
    if sizes.kv_heads != 1:
        return f"{sizes.kv_heads} key heads where the head dimension is 512 with rope, not 1"
    return (
        None
        if sizes.heads in _POWERS
        else f"{sizes.heads} heads where the head dimension is 512, no power of two up to 128"
    )


def _latent_without_rope(call: Call) -> str | None:
    sizes = _shapes(call)
    return (
        "the head dimension is 512 without query_rope and key_rope"
        if sizes.packed and sizes.dim == 512 and not sizes.rope
        else None
    )


def _lse_asked(call: Call) -> str | None:
    return (
        "softmax_lse is asked for where the head dimension is 512"
        if _named(call, "softmax_lse_flag", "return_softmax_lse")
        else None
    )


def _inner_precise(call: Call) -> str | None:
    value, sizes = call["inner_precise"], _shapes(call)
    allowed = (0, 1) if sizes.decode else (0, 1, 2, 3)
    return None if value in allowed else f"inner_precise is {value}, not one of {allowed}"


def _key_value_shapes(call: Call) -> str | None:
    key, value, sizes = call["key"], call["value"], _shapes(call)
    if sizes.packed and not sizes.paged and sizes.dim == 192:
        key, value = key[..., 0], value[..., 0]
    return None if key.shape == value.shape else f"key is {shape(call['key'])} and value is {shape(call['value'])}"


def _scale_modes(call: Call) -> tuple[int, int]:
    keys = _named(call, "key_antiquant_mode", "key_quant_mode")
    return keys, _named(call, "value_antiquant_mode", "value_quant_mode")


def _int8(call: Call) -> bool:
    return bool(call["key"].dtype == INT8 and call["query"].dtype != INT8)


def _int8_dim(call: Call) -> str | None:
    dim = _shapes(call).dim
    return f"the head dimension is {dim} with int8 keys, no multiple of 32" if dim and dim % 32 else None


def _int8_layout(call: Call) -> str | None:
    sizes = _shapes(call)
    if sizes.packed:
        return f"int8 keys in layout {sizes.layout}"
    in_rows = sizes.paged and call["key"].dim() != 5
    return f"int8 keys in pages for {sizes.length} queries" if in_rows and not sizes.decode else None


def _scale_mode_range(call: Call) -> str | None:
    allowed = (0, 1, 2, 3, 4, 5) if _shapes(call).decode else (0, 1)
    modes = _scale_modes(call)
    return None if all(mode in allowed for mode in modes) else f"modes {modes[0]} and {modes[1]}, not in {allowed}"


def _scales_in_pages(call: Call) -> str | None:
    mode = _scale_modes(call)[0]
    if mode not in (4, 5):
        return None
    sizes, key, size = _shapes(call), call["key"], call["block_size"]
    if not sizes.paged:
        return f"mode {mode} without block_table"
    wanted = (key.shape[0], size) if mode == 4 else (key.shape[0], sizes.kv_heads, size)
    for name in ("key", "value"):
        scale = _named(call, f"{name}_antiquant_scale", f"dequant_scale_{name}")
        if scale is not None and (tuple(scale.shape) != wanted or scale.dtype != FLOAT32):
            return f"the scales of {name} are {shape(scale)} {scale.dtype} in mode {mode}, not {wanted} torch.float32"
    return None


_ONLY_910B = on("ascend910b")

_FUSED = [
    Rule(
        "fused_infer_attention.query_dtype", _V1, "a query that is neither float16 nor bfloat16", _ONLY_910B,
        f"{_PAGE}, query", dtype_outside(("query",), HALVES),
    ),
    Rule(
        "fused_infer_attention.query_dtype_v2", _V2, "a query of another dtype", _ONLY_910B,
        f"{_PAGE_V2}, query, MLA", dtype_outside(("query",), (*HALVES, INT8)),
    ),
    Rule(
        "fused_infer_attention.kv_dtype", _FIA, "keys or values of another dtype", _ONLY_910B, f"{_PAGE}, key, value",
        dtype_outside(("key", "value"), (*HALVES, INT8, INT32)),
    ),
    Rule(
        "fused_infer_attention.dtypes", _FIA, "query, key and value of different float dtypes", _ONLY_910B,
        f"{_PAGE}, table of page attention and pseudo-quantisation (dtypes of query and key agree)", _mixed_dtypes,
    ),
    Rule(
        "fused_infer_attention.layout", _FIA, "a layout that is not documented", _ONLY_910B, f"{_PAGE}, input_layout",
        value_outside("input_layout", *_LAYOUTS),
    ),
    Rule(
        "fused_infer_attention.rank", _FIA, "a query that does not fit the layout", _ONLY_910B,
        f"{_PAGE}, input_layout", _rank,
    ),
    Rule(
        "fused_infer_attention.contiguous", _FIA, "tensors that are not contiguous", _ONLY_910B,
        f"{_PAGE}, query, key, value",
        not_contiguous("query", "key", "value", "atten_mask", "query_rope", "key_rope"),
    ),
    Rule(
        "fused_infer_attention.key_value_shape", _FIA, "key and value of different shapes", _ONLY_910B,
        f"{_PAGE}, general constraints", _key_value_shapes,
    ),
    Rule(
        "fused_infer_attention.head_count", _FIA, "more than 256 heads", _ONLY_910B, f"{_PAGE}, ranges of axes",
        _head_count,
    ),
    Rule(
        "fused_infer_attention.num_heads", _FIA, "a number of heads that the query does not have", _ONLY_910B,
        f"{_PAGE}, num_heads", _query_heads,
    ),
    Rule(
        "fused_infer_attention.groups", _FIA, "key heads that do not divide the heads", _ONLY_910B,
        f"{_PAGE}, num_key_value_heads", _groups,
    ),
    Rule(
        "fused_infer_attention.num_key_value_heads", _FIA, "a number of key heads that the key does not have",
        _ONLY_910B, f"{_PAGE}, num_key_value_heads", _kv_heads,
    ),
    Rule(
        "fused_infer_attention.head_dim", _FIA, "a head dimension above 512, or not of 16 bytes", _ONLY_910B,
        f"{_PAGE}, ranges of axes", _head_dim,
    ),
    Rule(
        "fused_infer_attention.packed_head_dim", _FIA,
        "a packed layout with another head dimension than 128, 192 or 512", _ONLY_910B, f"{_PAGE}, TND constraints",
        _packed_dim,
    ),
    Rule(
        "fused_infer_attention.packed_head_dim_64", _FIA, "a packed layout with a head dimension of 64",
        on("ascend910b", value=UNDOCUMENTED),
        f"{_PAGE}, TND constraints; used in vllm-ascend, vllm_ascend/attention/attention_v1.py (layout TND) with "
        "tests/e2e/doctests/001-quickstart-test.sh (Qwen2.5-0.5B, 64 dimensions a head)",
        _packed_dim_64,
    ),
    Rule(
        "fused_infer_attention.packed_lengths", _FIA, "a packed layout without lengths", _ONLY_910B,
        f"{_PAGE}, TND constraints", _packed_lengths,
    ),
    Rule(
        "fused_infer_attention.cumulative", _FIA, "lengths of a packed layout that are not cumulative", _ONLY_910B,
        f"{_PAGE}, actual_seq_lengths", _not_cumulative,
    ),
    Rule(
        "fused_infer_attention.tokens", _FIA, "cumulative lengths beyond the tokens", _ONLY_910B,
        f"{_PAGE}, actual_seq_lengths", _lengths_not_of_tokens,
    ),
    Rule(
        "fused_infer_attention.kv_lengths", _FIA, "a block table without the lengths of keys", _ONLY_910B,
        f"{_PAGE}, page attention constraints", _kv_lengths_missing,
    ),
    Rule(
        "fused_infer_attention.block_table", _FIA, "a block table that is not int32 [batch, blocks]", _ONLY_910B,
        f"{_PAGE}, block_table", _block_table,
    ),
    Rule(
        "fused_infer_attention.block_size", _FIA, "a block size outside the documented ones", _ONLY_910B,
        f"{_PAGE}, block_size", _block_size,
    ),
    Rule(
        "fused_infer_attention.cache_rank", _FIA, "a cache of four dimensions with BSH or BSND", _ONLY_910B,
        f"{_PAGE}, page attention constraints", _cache_rank,
    ),
    Rule(
        "fused_infer_attention.block_axis", _FIA, "a block size that the cache does not have", _ONLY_910B,
        f"{_PAGE}, page attention constraints", _block_axis,
    ),
    Rule(
        "fused_infer_attention.block_columns", _FIA, "a block table with too few columns", _ONLY_910B,
        f"{_PAGE}, block_table", _short_block_table,
    ),
    Rule(
        "fused_infer_attention.block_values", _FIA, "entries of the block table beyond the cache", _ONLY_910B,
        f"{_PAGE}, block_table (the caller vouches for block numbers)",
        where(is_given("block_table"), lambda call: _used_blocks(call)), of_values=True,
    ),
    Rule(
        "fused_infer_attention.length_count", _FIA, "fewer lengths of keys than sequences", _ONLY_910B,
        f"{_PAGE}, actual_seq_lengths_kv", _lengths_count,
    ),
    Rule(
        "fused_infer_attention.length", _FIA, "a length beyond the keys", _ONLY_910B,
        f"{_PAGE}, actual_seq_lengths_kv", _length_beyond,
    ),
    Rule(
        "fused_infer_attention.sparse_mode", _V1, "a sparse_mode outside 0 to 4", _ONLY_910B, f"{_PAGE}, sparse_mode",
        _sparse_mode((0, 1, 2, 3, 4)),
    ),
    Rule(
        "fused_infer_attention.sparse_mode_v2", _V2, "a sparse_mode outside 0 to 4, and 9", _ONLY_910B,
        f"{_PAGE_V2}, sparse_mode", _sparse_mode((0, 1, 2, 3, 4, 9)),
    ),
    Rule(
        "fused_infer_attention.mask_dtype", _FIA, "a mask that is not bool, int8 or uint8", _ONLY_910B,
        f"{_PAGE}, atten_mask", dtype_outside(("atten_mask",), (torch.bool, INT8, torch.uint8)),
    ),
    Rule(
        "fused_infer_attention.compressed_mask", _FIA, "sparse_mode 2 to 4 without a mask of 2048 x 2048", _ONLY_910B,
        f"{_PAGE}, sparse_mode", _compressed_mask,
    ),
    Rule(
        "fused_infer_attention.full_mask", _FIA, "sparse_mode 0 or 1 with a mask of another shape", _ONLY_910B,
        f"{_PAGE}, atten_mask", _full_mask,
    ),
    Rule(
        "fused_infer_attention.inner_precise", _FIA, "an inner_precise outside the documented ones", _ONLY_910B,
        f"{_PAGE}, inner_precise", _inner_precise,
    ),
    Rule(
        "fused_infer_attention.ropes", _FIA, "one of query_rope and key_rope", _ONLY_910B,
        f"{_PAGE}, MLA constraints", only_one_of("query_rope", "key_rope"),
    ),
    Rule(
        "fused_infer_attention.rope_dim", _FIA, "rope parts with other dimensions", _ONLY_910B,
        f"{_PAGE}, MLA constraints", _rope_dims,
    ),
    Rule(
        "fused_infer_attention.latent_heads", _FIA, "latent attention with other numbers of heads", _ONLY_910B,
        f"{_PAGE}, MLA constraints, D = 512", where(_is_latent, _latent_heads),
    ),
    Rule(
        "fused_infer_attention.latent_rope", _FIA, "a packed layout with 512 dimensions and no rope", _ONLY_910B,
        f"{_PAGE}, TND constraints, D = 512", _latent_without_rope,
    ),
    Rule(
        "fused_infer_attention.latent_lse", _FIA, "the log-sum-exp of latent attention", _ONLY_910B,
        f"{_PAGE}, MLA constraints, D = 512", where(_is_latent, _lse_asked),
    ),
    Rule(
        "fused_infer_attention.latent_sparse", _FIA, "latent attention in another sparse_mode", _ONLY_910B,
        f"{_PAGE}, {_PAGE_V2}, MLA constraints, D = 512", where(_is_latent, value_outside("sparse_mode", 0, 3, 4, 9)),
    ),
    Rule(
        "fused_infer_attention.antiquant_pair", _V1, "one of the scales of keys and values", _ONLY_910B,
        f"{_PAGE}, key_antiquant_scale", only_one_of("key_antiquant_scale", "value_antiquant_scale"),
    ),
    Rule(
        "fused_infer_attention.antiquant_missing", _V1, "int8 keys without scales", _ONLY_910B,
        f"{_PAGE}, table of scenarios",
        where(
            lambda call: call["key"].dtype == INT8 and call.get("antiquant_scale") is None,
            missing("key_antiquant_scale"),
        ),
    ),
    Rule(
        "fused_infer_attention.antiquant_modes", _V1, "different modes for keys and values", _ONLY_910B,
        f"{_PAGE}, key_antiquant_mode",
        lambda call: None
        if (call["key_antiquant_mode"], call["value_antiquant_mode"]) == (0, 1)
        or call["key_antiquant_mode"] == call["value_antiquant_mode"]
        else f"modes {call['key_antiquant_mode']} and {call['value_antiquant_mode']}",
    ),
    Rule(
        "fused_infer_attention.int8_head_dim", _FIA, "int8 keys with a head dimension that is not of 32 bytes",
        _ONLY_910B, f"{_PAGE}, ranges of axes", where(_int8, _int8_dim),
    ),
    Rule(
        "fused_infer_attention.int8_layout", _FIA, "int8 keys in a packed layout, or in pages for several queries",
        _ONLY_910B, f"{_PAGE}, TND constraints, page attention constraints", where(_int8, _int8_layout),
    ),
    Rule(
        "fused_infer_attention.scale_modes", _FIA, "a mode of scales outside 0 to 5, or 0 and 1 for several queries",
        _ONLY_910B, f"{_PAGE}, key_antiquant_mode", where(_int8, _scale_mode_range),
    ),
    Rule(
        "fused_infer_attention.scales_in_pages", _FIA, "scales in pages (modes 4 and 5) of another shape or dtype",
        _ONLY_910B, f"{_PAGE_V2}, constraints of Q_S = 1, table of modes", where(_int8, _scales_in_pages),
    ),
    Rule(
        "fused_infer_attention.prefix", _V1, "a shared prefix in a block table", _ONLY_910B,
        f"{_PAGE}, prefix constraints",
        where(is_given("block_table"), given("key_shared_prefix", "value_shared_prefix")),
    ),
    Rule(
        "fused_infer_attention.sink_dtype", _V2, "a learnable sink that is not bfloat16", _ONLY_910B,
        f"{_PAGE_V2}, learnable_sink", dtype_outside(("learnable_sink",), (BFLOAT16,)),
    ),
]  # fmt: skip


def _used_blocks(call: Call) -> str | None:
    table, lengths, size = call["block_table"], _kv_lengths(call) or (), call["block_size"]
    blocks = call["key"].shape[0]
    for row, length in zip(table.tolist(), lengths, strict=False):
        used = row[: -(-length // size)]
        if any(not 0 <= block < blocks for block in used):
            return f"block_table holds {max(used)}, the cache has {blocks} blocks"
    return None


def _atb_heads(call: Call) -> str | None:
    query, heads, kv_heads = call["query"], call["num_heads"], call["num_kv_heads"]
    if query.dim() == 3 and query.shape[1] != heads:
        return f"{heads} heads are given and query is {shape(query)}"
    return f"{heads} heads are not divisible by {kv_heads} key heads" if kv_heads and heads % kv_heads else None


def _cache_tokens(cache: torch.Tensor) -> int:
    return int(cache.shape[2] if format_of(cache) == FRACTAL_NZ else cache.shape[1])


def _block_times_head(call: Call) -> str | None:
    size, head = _cache_tokens(call["key_cache"]), call["query"].shape[-1]
    return (
        f"block_size {size} times head_size {head} is {size * head}, more than {128 * 128}"
        if size * head > 128 * 128
        else None
    )


def _kernel_block(call: Call) -> str | None:
    size = _cache_tokens(call["key_cache"])
    return None if size in (64, 128) else f"the cache has blocks of {size} tokens, not 64 or 128"


def _nz_cache_shape(call: Call) -> str | None:
    cache = call["key_cache"]
    wanted = call["num_kv_heads"] * call["query"].shape[-1] // 16
    if cache.dim() == 4 and cache.shape[3] == 16 and cache.shape[1] == wanted:
        return None
    return f"key_cache is {shape(cache)}, not [blocks, {wanted}, block_size, 16]"


_ATB_RULES = [
    Rule(
        "_npu_paged_attention.dtype", (*_PAGED, *_FLASH), "a query of another dtype", on(),
        f"{_ATB_TESTS}test_atb_paged_attention.py, test_atb_flash_attention.py", dtype_outside(("query",), HALVES),
    ),
    Rule(
        "_npu_paged_attention.heads", (*_PAGED, *_FLASH), "numbers of heads that do not fit", on(),
        f"{_ATB}PagedAttentionAtb.cpp (headNum, kvHeadNum)", _atb_heads,
    ),
    Rule(
        "_npu_paged_attention.block_table", _PAGED, "a block table that is not int32", on(),
        f"{_ATB_TESTS}test_atb_paged_attention.py",
        first(dtype_outside(("block_table",), (INT32,)), rank_outside("block_table", 2)),
    ),
    Rule(
        "_npu_paged_attention.context_lens", _PAGED, "lengths that are not int32", on(),
        f"{_ATB_TESTS}test_atb_paged_attention.py", dtype_outside(("context_lens", "seq_len"), (INT32,)),
    ),
    Rule(
        "_npu_paged_attention.out", (*_PAGED, *_FLASH), "an output that is not like the query", on(),
        f"{_ATB_TESTS}test_atb_paged_attention.py",
        first(dtype_differs("query", "out"), shape_differs("query", "out")),
    ),
    Rule(
        "_npu_paged_attention.cache_format", _PAGED, "a cache that is not FRACTAL_NZ", on("ascend310p"),
        f"{_FIELD}attention/attention_v1.py (get_kv_cache_shape), model_runner_310p.py (the cache is FRACTAL_NZ)",
        not_fractal_nz("key_cache", "value_cache"),
    ),
    Rule(
        "_npu_paged_attention.cache_shape", _PAGED, "an NZ cache of another shape", on("ascend310p"),
        f"{_FIELD}attention/attention_v1.py, get_kv_cache_shape", _nz_cache_shape,
    ),
    Rule(
        "_npu_paged_attention.block_limit", _PAGED, "block_size * head_size above 128 * 128", on("ascend310p"),
        f"{_FIELD}model_runner_310p.py, _ATTENTION_BLOCK_SIZE_LIMIT", _block_times_head,
    ),
    Rule(
        "_npu_paged_attention.block_size", _PAGED, "a block size other than 64 or 128", on("ascend310p"),
        f"{_FIELD}attention/attention_v1.py, get_supported_kernel_block_sizes", _kernel_block,
    ),
    Rule(
        "_npu_paged_attention.mask_dtype",
        ("atb::_npu_paged_attention_splitfuse", *_SPLITFUSE_V2, "atb::_npu_flash_attention", *_FLASH_V3),
        "a mask that is not float16", on("ascend310p"), f"{_FIELD}attention/attention_mask.py",
        dtype_outside(("mask",), (FLOAT16,)),
    ),
    Rule(
        "_npu_paged_attention_splitfuse_v2.mask", _SPLITFUSE_V2, "a mask that is not ND of 2048 x 2048",
        on("ascend310p"), f"{_FIELD}attention/attention_mask.py, get_compressed_splitfuse_mask",
        lambda call: None
        if tuple(call["mask"].shape) == (2048, 2048) and format_of(call["mask"]) != FRACTAL_NZ
        else f"mask is {shape(call['mask'])} in format {format_of(call['mask'])}, not (2048, 2048) ND",
    ),
    Rule(
        "_npu_paged_attention_splitfuse_v2.mask_type", _SPLITFUSE_V2, "a mask_type other than 5", on(),
        f"{_ATB}PagedAttentionSplitfuseV2.cpp", value_outside("mask_type", 5, None),
    ),
    Rule(
        "_npu_flash_attention_v3.mask_type", _FLASH_V3, "a mask_type other than 3", on(),
        f"{_ATB}SelfAttentionAtbV3.cpp", value_outside("mask_type", 3, None),
    ),
    Rule(
        "_npu_flash_attention.mask_format", ("atb::_npu_flash_attention", *_FLASH_V3),
        "a mask that is not FRACTAL_NZ", on("ascend310p"), f"{_FIELD}attention/attention_mask.py, _get_causal_mask",
        not_fractal_nz("mask"),
    ),
    Rule(
        "_npu_flash_attention.seq_len", _FLASH, "lengths that are not int32", on(),
        f"{_ATB_TESTS}test_atb_flash_attention.py", dtype_outside(("seq_len",), (INT32,)),
    ),
]  # fmt: skip

_310P = on("ascend310p")

_OLDER = [
    Rule(
        "npu_prompt_flash_attention.dtype", _PFA, "another dtype", on("ascend910b"), f"{_PFA_PAGE}, query",
        dtype_outside(("query", "key", "value"), (*HALVES, INT8)),
    ),
    Rule(
        "npu_prompt_flash_attention.dtype_310p", _PFA, "anything but float16", _310P, f"{_PFA_PAGE}, query",
        dtype_outside(("query", "key", "value"), (FLOAT16,)),
    ),
    Rule(
        "npu_prompt_flash_attention.contiguous", _PFA, "tensors that are not contiguous", on(), f"{_PFA_PAGE}, query",
        not_contiguous("query", "key", "value", "atten_mask"),
    ),
    Rule(
        "npu_prompt_flash_attention.lengths_310p", _PFA, "lengths", _310P, f"{_PFA_PAGE}, actual_seq_lengths",
        given("actual_seq_lengths", "actual_seq_lengths_kv", "pse_shift", "quant_scale2"),
    ),
    Rule(
        "npu_prompt_flash_attention.groups_310p", _PFA, "grouped queries", _310P, f"{_PFA_PAGE}, num_key_value_heads",
        value_outside("num_key_value_heads", 0),
    ),
    Rule(
        "npu_prompt_flash_attention.sparse_310p", _PFA, "a sparse_mode", _310P, f"{_PFA_PAGE}, sparse_mode",
        value_outside("sparse_mode", 0),
    ),
    Rule(
        "npu_prompt_flash_attention.tokens_310p", _PFA, "a window of tokens", _310P,
        f"{_PFA_PAGE}, pre_tokens, next_tokens",
        first(value_outside("pre_tokens", 2147483647), value_outside("next_tokens", 0, 2147483647)),
    ),
    Rule(
        "npu_prompt_flash_attention.mask_dtype", _PFA, "a mask that is not bool, int8 or uint8", on(),
        f"{_PFA_PAGE}, atten_mask", dtype_outside(("atten_mask",), (torch.bool, INT8, torch.uint8)),
    ),
    Rule(
        "npu_prompt_flash_attention.sparse_mode", _PFA, "a sparse_mode outside 0 to 4", on(),
        f"{_PFA_PAGE}, constraints", value_outside("sparse_mode", 0, 1, 2, 3, 4),
    ),
    Rule(
        "npu_prompt_flash_attention.compressed_mask", _PFA, "sparse_mode 2 to 4 without a mask of 2048 x 2048", on(),
        f"{_PFA_PAGE}, constraints", _compressed_mask,
    ),
    Rule(
        "npu_incre_flash_attention.dtype", _IFA, "a query that is neither float16 nor bfloat16", on("ascend910b"),
        f"{_IFA_PAGE}, query", dtype_outside(("query",), HALVES),
    ),
    Rule(
        "npu_incre_flash_attention.dtype_310p", _IFA, "a query that is not float16", _310P, f"{_IFA_PAGE}, query",
        dtype_outside(("query",), (FLOAT16,)),
    ),
    Rule(
        "npu_incre_flash_attention.layout", _IFA, "another layout", on(), f"{_IFA_PAGE}, input_layout",
        value_outside("input_layout", "BSH", "BNSD", "BSND"),
    ),
    Rule(
        "npu_incre_flash_attention.groups", _IFA, "key heads that do not divide the heads", on(),
        f"{_IFA_PAGE}, num_key_value_heads", _groups,
    ),
    Rule(
        "npu_incre_flash_attention.block_table", _IFA, "a block table that is not int32 of two dimensions", on(),
        f"{_IFA_PAGE}, page attention",
        first(dtype_outside(("block_table",), (INT32,)), rank_outside("block_table", 2)),
    ),
    Rule(
        "npu_incre_flash_attention.lengths", _IFA, "a block table without lengths", on(),
        f"{_IFA_PAGE}, page attention", where(is_given("block_table"), missing("actual_seq_lengths")),
    ),
    Rule(
        "npu_incre_flash_attention.block_size", _IFA, "a block size that is no multiple of 16", on(),
        f"{_IFA_PAGE}, page attention",
        where(
            is_given("block_table"),
            lambda call: None
            if call["block_size"] > 0 and call["block_size"] % (32 if call["key"].dtype == INT8 else 16) == 0
            else f"block_size is {call['block_size']}",
        ),
    ),
    Rule(
        "npu_attention_update.lse_dtype", _UPDATE, "log-sum-exps that are not float32", on(), f"{_UPDATE_PAGE}, lse",
        dtype_outside(("lse",), (FLOAT32,)),
    ),
    Rule(
        "npu_attention_update.dtype", _UPDATE, "outputs that are no floats", on(), f"{_UPDATE_PAGE}, local_out",
        dtype_outside(("local_out",), (*HALVES, FLOAT32)),
    ),
    Rule(
        "npu_attention_update.count", _UPDATE, "lists of different lengths, or of more than 16", on(),
        f"{_UPDATE_PAGE}, constraints",
        lambda call: None
        if len(call["lse"]) == len(call["local_out"]) and 1 <= len(call["lse"]) <= 16
        else f"{len(call['lse'])} log-sum-exps and {len(call['local_out'])} outputs",
    ),
    Rule(
        "npu_attention_update.head_dim", _UPDATE, "a head dimension outside 8 to 512 in steps of 8", on(),
        f"{_UPDATE_PAGE}, constraints",
        first(size_not_multiple("local_out", LAST, 8), size_not_within("local_out", LAST, 8, 512)),
    ),
    Rule(
        "npu_attention_update.shape", _UPDATE, "tensors with other dimensions", on(), f"{_UPDATE_PAGE}, parameters",
        first(rank_outside("lse", 1), rank_outside("local_out", 2)),
    ),
    Rule(
        "npu_attention_update.type", _UPDATE, "an update_type outside 0 and 1", on(), f"{_UPDATE_PAGE}, update_type",
        value_outside("update_type", 0, 1),
    ),
]  # fmt: skip

RULES: list[Rule] = _FUSED + _ATB_RULES + _OLDER
