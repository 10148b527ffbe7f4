"""Rows: attention through ATB."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    FLOAT16,
    HALVES,
    INT32,
    dtype_differs,
    dtype_outside,
    first,
    not_fractal_nz,
    rank_outside,
    shape,
    shape_differs,
    value_outside,
)  # fmt: skip
from npu_zoo.simulator.rules.table import FRACTAL_NZ, Call, Rule, format_of, on

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


RULES: list[Rule] = [
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
