"""Rows: attention of prompts and of tokens, an operator each, and the merging of partial results."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.attention_calls import compressed_mask, uneven_groups
from npu_zoo.simulator.rules.detect import (
    FLOAT16,
    FLOAT32,
    HALVES,
    INT8,
    INT32,
    LAST,
    dtype_outside,
    first,
    given,
    is_given,
    missing,
    not_contiguous,
    rank_outside,
    size_not_multiple,
    size_not_within,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import Rule, on

_PFA = ("npu::npu_prompt_flash_attention",)
_PFA_PAGE = "op-plugin, torch_npu-npu_prompt_flash_attention.md"
_IFA = ("npu::npu_incre_flash_attention",)
_IFA_PAGE = "op-plugin, torch_npu-npu_incre_flash_attention.md"
_UPDATE = ("npu::npu_attention_update",)
_UPDATE_PAGE = "op-plugin, torch_npu-npu_attention_update.md"
_310P = on("ascend310p")

RULES: list[Rule] = [
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
        f"{_PFA_PAGE}, constraints", compressed_mask,
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
        f"{_IFA_PAGE}, num_key_value_heads", uneven_groups,
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
