"""Rows: fused attention over caches, in pages or by row."""

from __future__ import annotations

from npu_zoo.simulator.rules.attention_calls import FUSED, FUSED_V1, ONLY_910B, PAGE, key_lengths, sizes_of
from npu_zoo.simulator.rules.detect import INT8, INT32, given, is_given, shape, where
from npu_zoo.simulator.rules.table import Call, Rule


def _kv_lengths_missing(call: Call) -> str | None:
    return (
        "block_table is given without the lengths of keys"
        if call.get("block_table") is not None and not key_lengths(call)
        else None
    )


def _block_table(call: Call) -> str | None:
    table, sizes = call.get("block_table"), sizes_of(call)
    if table is None:
        return None
    if table.dtype != INT32:
        return f"block_table is {table.dtype}, not torch.int32"
    if table.dim() != 2:
        return f"block_table has {table.dim()} dimensions, not 2"
    lengths = key_lengths(call)
    batch = len(lengths or ()) if sizes.packed else sizes.batch
    return f"block_table is {shape(table)} for {batch} sequences" if batch and table.shape[0] < batch else None


def _block_size(call: Call) -> str | None:
    sizes, size = sizes_of(call), call["block_size"]
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


def _cache_rank(call: Call) -> str | None:
    sizes = sizes_of(call)
    if sizes.paged and sizes.layout.startswith("BS") and call["key"].dim() == 4 and sizes.dim != 512:
        return f"key is {shape(call['key'])} in layout {sizes.layout}, which allows [blocks, block_size, H] alone"
    return None


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


def _short_block_table(call: Call) -> str | None:
    table, lengths, size = call.get("block_table"), key_lengths(call), call["block_size"]
    if table is None or table.dim() != 2 or not lengths or not size:
        return None
    needed = -(-max(lengths) // size)
    return (
        f"block_table has {table.shape[1]} columns, {max(lengths)} keys need {needed}"
        if table.shape[1] < needed
        else None
    )


def _used_blocks(call: Call) -> str | None:
    table, lengths, size = call["block_table"], key_lengths(call) or (), call["block_size"]
    blocks = call["key"].shape[0]
    for row, length in zip(table.tolist(), lengths, strict=False):
        used = row[: -(-length // size)]
        if any(not 0 <= block < blocks for block in used):
            return f"block_table holds {max(used)}, the cache has {blocks} blocks"
    return None


def _lengths_count(call: Call) -> str | None:
    sizes, lengths = sizes_of(call), key_lengths(call)
    if sizes.packed or not lengths or sizes.batch is None or len(lengths) == 1 or len(lengths) >= sizes.batch:
        return None
    return f"{len(lengths)} lengths of keys for {sizes.batch} sequences"


def _length_beyond(call: Call) -> str | None:
    sizes, lengths = sizes_of(call), key_lengths(call)
    inner = sizes.layout.partition("_")[0]
    if sizes.paged or sizes.packed or not lengths or call["key"].dim() != len(inner):
        return None
    rows = call["key"].shape[inner.index("S")]
    return f"{max(lengths)} keys are asked for and key has {rows}" if max(lengths) > rows else None


RULES: list[Rule] = [
    Rule(
        "fused_infer_attention.kv_lengths", FUSED, "a block table without the lengths of keys", ONLY_910B,
        f"{PAGE}, page attention constraints", _kv_lengths_missing,
    ),
    Rule(
        "fused_infer_attention.block_table", FUSED, "a block table that is not int32 [batch, blocks]", ONLY_910B,
        f"{PAGE}, block_table", _block_table,
    ),
    Rule(
        "fused_infer_attention.block_size", FUSED, "a block size outside the documented ones", ONLY_910B,
        f"{PAGE}, block_size", _block_size,
    ),
    Rule(
        "fused_infer_attention.cache_rank", FUSED, "a cache of four dimensions with BSH or BSND", ONLY_910B,
        f"{PAGE}, page attention constraints", _cache_rank,
    ),
    Rule(
        "fused_infer_attention.block_axis", FUSED, "a block size that the cache does not have", ONLY_910B,
        f"{PAGE}, page attention constraints", _block_axis,
    ),
    Rule(
        "fused_infer_attention.block_columns", FUSED, "a block table with too few columns", ONLY_910B,
        f"{PAGE}, block_table", _short_block_table,
    ),
    Rule(
        "fused_infer_attention.block_values", FUSED, "entries of the block table beyond the cache", ONLY_910B,
        f"{PAGE}, block_table (the caller vouches for block numbers)",
        where(is_given("block_table"), lambda call: _used_blocks(call)), of_values=True,
    ),
    Rule(
        "fused_infer_attention.length_count", FUSED, "fewer lengths of keys than sequences", ONLY_910B,
        f"{PAGE}, actual_seq_lengths_kv", _lengths_count,
    ),
    Rule(
        "fused_infer_attention.length", FUSED, "a length beyond the keys", ONLY_910B,
        f"{PAGE}, actual_seq_lengths_kv", _length_beyond,
    ),
    Rule(
        "fused_infer_attention.prefix", FUSED_V1, "a shared prefix in a block table", ONLY_910B,
        f"{PAGE}, prefix constraints",
        where(is_given("block_table"), given("key_shared_prefix", "value_shared_prefix")),
    ),
]  # fmt: skip
