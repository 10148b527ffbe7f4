"""Wrong calls, each refused by the rule that it breaks, and right calls near them that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedOperatorException

from npu_zoo.simulator.activation import runtime
from npu_zoo.simulator.errors import RuleBroken
from npu_zoo.simulator.golden import load_golden
from npu_zoo.simulator.overrides import Operator, Overrides, install, overload

BOTH = ("ascend910b", "ascend310p")
A2, DUO = ("ascend910b",), ("ascend310p",)
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
I8, I32, I64, BOOL = torch.int8, torch.int32, torch.int64, torch.bool

Arguments = dict[str, Any]


def t(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """A tensor on the device. bfloat16 is left as it is: nothing may fill it on the Duo."""
    return (torch.empty if dtype == BF16 else torch.zeros)(shape, dtype=dtype, device="npu")


def ints(*values: int, dtype: torch.dtype = I32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to("npu")


def nz(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """A tensor in FRACTAL_NZ; fake tensors have no formats."""
    if isinstance(torch.empty(0), FakeTensor):
        return t(*shape, dtype=dtype)
    made: torch.Tensor = torch_npu.empty_with_format(shape, dtype=dtype, device="npu", acl_format=29)
    return made


@dataclass(frozen=True)
class Base:
    """A right call, which wrong ones are made from."""

    operator: str
    arguments: Callable[[], Arguments]
    chips: tuple[str, ...] = BOTH


def fia(layout: str, query: torch.Tensor, key: torch.Tensor, heads: int, kv_heads: int, **others: Any) -> Arguments:
    sizes = {"num_heads": heads, "num_key_value_heads": kv_heads, "input_layout": layout, "scale": 0.1}
    return {"query": query, "key": key, "value": key.clone(), **sizes, **others}


def packed() -> Arguments:
    """Two sequences of three and two tokens on a cache of four blocks."""
    return fia(
        "TND", t(5, 8, 128), t(4, 16, 256), 8, 2, block_table=ints(0, 1, 2, 3).view(2, 2), block_size=16, sparse_mode=3,
        actual_seq_lengths=[3, 5], actual_seq_lengths_kv=[20, 10], atten_mask=t(2048, 2048, dtype=BOOL),
    )  # fmt: skip


def decode() -> Arguments:
    return fia(
        "BSH", t(2, 1, 512), t(4, 128, 128), 8, 2, block_table=ints(0, 1, 2, 3).view(2, 2), block_size=128,
        actual_seq_lengths_kv=[200, 10],
    )  # fmt: skip


def codes() -> Arguments:
    """Two sequences of one token on a cache of int8, with scales per token and head in its blocks."""
    scales = {f"{name}_antiquant_scale": t(4, 2, 128, dtype=FLOAT) for name in ("key", "value")}
    return fia(
        "BNSD", t(2, 8, 1, 64), t(4, 128, 128, dtype=I8), 8, 2, block_table=ints(0, 1, 2, 3).view(2, 2), block_size=128,
        actual_seq_lengths_kv=[200, 10], key_antiquant_mode=5, value_antiquant_mode=5, **scales,
    )  # fmt: skip


def latent() -> Arguments:
    """Latent attention of one token of each of two sequences."""
    ropes = {"query_rope": t(2, 16, 1, 64), "key_rope": t(4, 1, 128, 64)}
    sizes = {"num_query_heads": 16, "num_key_value_heads": 1, "input_layout": "BNSD", "softmax_scale": 0.1}
    key = t(4, 1, 128, 512)
    return {
        "query": t(2, 16, 1, 512), "key": key, "value": key, **ropes, **sizes, "block_size": 128,
        "block_table": ints(0, 1, 2, 3).view(2, 2), "actual_seq_kvlen": [200, 10],
    }  # fmt: skip


def latent_cache() -> Arguments:
    return {
        "kv": t(4, 1, 1, 576), "gamma": t(512), "cos": t(4, 1, 1, 64), "sin": t(4, 1, 1, 64),
        "index": ints(5, 2, 9, 0, dtype=I64), "k_cache": t(2, 16, 1, 64), "ckv_cache": t(2, 16, 1, 512),
        "cache_mode": "PA",
    }  # fmt: skip


def paged_duo() -> Arguments:
    caches = {"key_cache": nz(4, 16, 128, 16), "value_cache": nz(4, 16, 128, 16)}
    heads = {"num_kv_heads": 2, "num_heads": 8, "scale_value": 0.1}
    return {
        "query": t(2, 8, 128), **caches, **heads, "block_table": ints(0, 1, 2, 3).view(2, 2),
        "context_lens": ints(200, 10), "out": t(2, 8, 128),
    }  # fmt: skip


def splitfuse_duo() -> Arguments:
    return {**paged_duo(), "mask": t(2048, 2048), "seq_len": ints(1, 1)}


def flash_duo() -> Arguments:
    return {
        "query": t(16, 8, 128), "key": t(16, 2, 128), "value": t(16, 2, 128), "mask": nz(1, 128, 2048, 16),
        "seq_len": ints(16), "scale_value": 0.1, "num_heads": 8, "num_kv_heads": 2, "out": t(16, 8, 128),
    }  # fmt: skip


def grouped() -> Arguments:
    return {
        "x": [t(6, 64)], "weight": [t(3, 64, 32)], "group_list": ints(1, 4, 6, dtype=I64), "split_item": 2,
        "group_type": 0, "group_list_type": 0,
    }  # fmt: skip


def quant_matmul() -> Arguments:
    return {
        "x1": t(4, 64, dtype=I8), "x2": t(64, 32, dtype=I8), "scale": t(32, dtype=FLOAT), "output_dtype": 5,
    }  # fmt: skip


def dispatched() -> Arguments:
    return {
        "x": t(4, 64), "expert_ids": ints(0, 1, 2, 3, 4, 5, 6, 7).view(4, 2), "group_ep": "ep", "ep_world_size": 8,
        "ep_rank_id": 0, "moe_expert_num": 16,
    }  # fmt: skip


def combined() -> Arguments:
    shared = dispatched()
    del shared["x"]
    return {
        **shared, "expand_x": t(8, 64), "assist_info_for_combine": t(1024, dtype=I32),
        "ep_send_counts": t(16, dtype=I32), "expert_scales": t(4, 2, dtype=FLOAT),
    }  # fmt: skip


BASES: dict[str, Base] = {
    "rms": Base("npu::npu_rms_norm", lambda: {"input": t(4, 64), "gamma": t(64)}),
    "add_rms": Base("npu::npu_add_rms_norm", lambda: {"x1": t(4, 64), "x2": t(4, 64), "gamma": t(64)}),
    "add_rms_quant": Base(
        "npu::npu_add_rms_norm_quant",
        lambda: {"x1": t(4, 64), "x2": t(4, 64), "gamma": t(64), "scales1": t(64, dtype=FLOAT), "zero_points1": None},
    ),
    "add_rms_dynamic": Base(
        "npu::npu_add_rms_norm_dynamic_quant", lambda: {"x1": t(4, 64), "x2": t(4, 64), "gamma": t(64)}, A2
    ),
    "swiglu": Base("npu::npu_swiglu", lambda: {"input": t(4, 64)}),
    "swiglu_quant": Base(
        "npu::npu_swiglu_quant",
        lambda: {"x": t(4, 64), "smooth_scales": t(2, 32, dtype=FLOAT), "group_index": ints(1, 4), "quant_mode": 1},
        A2,
    ),
    "dequant_swiglu": Base(
        "npu::npu_dequant_swiglu_quant",
        lambda: {
            "x": t(4, 64, dtype=I32), "weight_scale": t(1, 64, dtype=FLOAT), "activation_scale": t(4, 1, dtype=FLOAT),
            "quant_mode": 1,
        },
        A2,
    ),
    "rope": Base(
        "npu::npu_apply_rotary_pos_emb",
        lambda: {"query": t(1, 5, 8, 128), "key": t(1, 5, 2, 128), "cos": t(1, 5, 1, 128), "sin": t(1, 5, 1, 128)},
    ),
    "rotary_mul": Base(
        "npu::npu_rotary_mul", lambda: {"input": t(1, 5, 8, 64), "r1": t(1, 5, 1, 64), "r2": t(1, 5, 1, 64)}
    ),
    "interleave": Base(
        "npu::npu_interleave_rope", lambda: {"x": t(2, 8, 1, 64), "cos": t(2, 1, 1, 64), "sin": t(2, 1, 1, 64)}, A2
    ),
    "mrope": Base(
        "npu::npu_mrope",
        lambda: {
            "positions": ints(0, 1, 2, dtype=I64), "query": t(3, 256), "key": t(3, 128), "cos_sin_cache": t(16, 64),
            "head_size": 64,
        },
        A2,
    ),
    "packed": Base("npu::npu_fused_infer_attention_score", packed, A2),
    "decode": Base("npu::npu_fused_infer_attention_score", decode, A2),
    "codes": Base("npu::npu_fused_infer_attention_score", codes, A2),
    "prefill": Base(
        "npu::npu_fused_infer_attention_score", lambda: fia("BNSD", t(2, 8, 5, 64), t(2, 2, 5, 64), 8, 2), A2
    ),
    "latent": Base("npu::npu_fused_infer_attention_score_v2", latent, A2),
    "prompt": Base(
        "npu::npu_prompt_flash_attention",
        lambda: {"query": t(1, 8, 16, 64), "key": t(1, 8, 16, 64), "value": t(1, 8, 16, 64), "num_heads": 8,
                 "input_layout": "BNSD"},
    ),
    "incre": Base(
        "npu::npu_incre_flash_attention",
        lambda: {"query": t(1, 1, 512), "key": t(1, 16, 512), "value": t(1, 16, 512), "num_heads": 8},
    ),
    "update": Base(
        "npu::npu_attention_update",
        lambda: {"lse": [t(6, dtype=FLOAT)] * 2, "local_out": [t(6, 64)] * 2, "update_type": 0}, A2,
    ),
    "scatter": Base(
        "npu::npu_scatter_pa_kv_cache",
        lambda: {"key": t(3, 2, 64), "value": t(3, 2, 64), "key_cache": t(4, 16, 2, 64), "value_cache": t(4, 16, 2, 64),
                 "slot_mapping": ints(5, 63, 0), "cache_mode": "Norm"},
        A2,
    ),
    "latent_cache": Base("npu::npu_kv_rmsnorm_rope_cache", latent_cache, A2),
    "scatter_nd": Base(
        "npu::npu_scatter_nd_update_",
        lambda: {"input": t(8, 4), "indices": ints(1, 7).view(2, 1), "updates": t(2, 4)},
    ),
    "gate": Base(
        "npu::npu_moe_gating_top_k",
        lambda: {"x": t(4, 64, dtype=FLOAT), "k": 4, "bias": t(64, dtype=FLOAT), "k_group": 2, "group_count": 8,
                 "group_select_mode": 1, "norm_type": 1},
        A2,
    ),
    "gate_softmax": Base("npu::npu_moe_gating_top_k_softmax", lambda: {"x": t(4, 64), "k": 4}),
    "routing": Base(
        "npu::npu_moe_init_routing_v2",
        lambda: {"x": t(4, 64), "expert_idx": ints(0, 1, 2, 3, 0, 1, 2, 3).view(4, 2), "active_num": 8, "expert_num": 4,
                 "active_expert_range": [0, 4], "expert_tokens_num_flag": True},
    ),
    "grouped": Base("npu::npu_grouped_matmul", grouped),
    "permute": Base(
        "npu::npu_moe_token_permute",
        lambda: {"tokens": t(4, 64, dtype=BF16), "indices": ints(0, 1, 2, 3).view(4, 1)},
        A2,
    ),
    "unpermute": Base(
        "npu::npu_moe_token_unpermute",
        lambda: {"permuted_tokens": t(4, 64), "sorted_indices": ints(3, 1, 0, 2), "probs": t(2, 2)},
    ),
    "grouped_dequant": Base(
        "npu::npu_quant_grouped_matmul_dequant",
        lambda: {"x": t(6, 64), "quantized_weight": t(2, 32, 64, dtype=I8), "weight_scale": t(2, 32, dtype=FLOAT),
                 "group_list": ints(2, 6, dtype=I64)},
    ),
    "dynamic": Base("npu::npu_dynamic_quant", lambda: {"input": t(4, 64)}),
    "matmul": Base("npu::npu_quant_matmul", quant_matmul),
    "param": Base("npu::npu_trans_quant_param", lambda: {"scale": t(32, dtype=FLOAT)}),
    "weight": Base(
        "npu::npu_weight_quant_batchmatmul",
        lambda: {"x": t(4, 128), "weight": t(128, 32, dtype=I8), "antiquant_scale": t(32)},
    ),
    "pack": Base("npu::npu_convert_weight_to_int4pack", lambda: {"weight": t(16, 8, dtype=I32)}, A2),
    "quantize": Base(
        "npu::npu_quantize",
        lambda: {"input": t(4, 64, dtype=FLOAT), "scales": t(64, dtype=FLOAT) + 1, "zero_points": t(64, dtype=I32),
                 "dtype": 12, "axis": 1},
    ),
    "transpose": Base(
        "npu::npu_transpose_batchmatmul",
        lambda: {"input": t(4, 8, 64), "weight": t(8, 64, 32), "perm_x1": [1, 0, 2], "perm_y": [1, 0, 2]},
        A2,
    ),
    "cast": Base("npu::npu_format_cast", lambda: {"input": t(32, 64), "acl_format": 29}),
    "mm": Base("aten::mm", lambda: {"self": t(4, 64), "mat2": t(64, 32)}),
    "sampling": Base(
        "npu::npu_top_k_top_p",
        lambda: {"logits": t(2, 64, dtype=FLOAT), "p": t(2, dtype=FLOAT) + 1, "k": ints(1, 64)}, A2,
    ),
    "all_reduce": Base(
        "npu::npu_mm_all_reduce_base", lambda: {"x1": t(4, 256), "x2": t(256, 32), "hcom": "group"}, A2
    ),
    "reduce_scatter": Base(
        "npu::npu_mm_reduce_scatter_base",
        lambda: {"input": t(4, 256), "x2": t(256, 32), "hcom": "group", "world_size": 2}, A2,
    ),
    "all_gather": Base(
        "npu::npu_all_gather_base_mm",
        lambda: {"input": t(4, 256), "x2": t(256, 32), "hcom": "group", "world_size": 2}, A2,
    ),
    "finalize": Base(
        "npu::npu_moe_finalize_routing",
        lambda: {"expanded_permuted_rows": t(8, 64), "skip1": None, "skip2": None, "bias": None, "scales": t(4, 2),
                 "expanded_src_to_dst_row": ints(*range(8)), "export_for_source_row": None},
        A2,
    ),
    "re_routing": Base(
        "npu::npu_moe_re_routing",
        lambda: {"tokens": t(4, 64), "expert_token_num_per_rank": ints(1, 1, 1, 1).view(2, 2)}, A2,
    ),
    "rope_in_place": Base(
        "atb::_npu_rotary_embedding",
        lambda: {"positions": ints(0, 1, 2, dtype=I64), "query": t(3, 256), "key": t(3, 128), "head_size": 64,
                 "cos_sin_cache": t(16, 64), "is_neox_style": True},
    ),
    "sample": Base(
        "npu::npu_top_k_top_p_sample",
        lambda: {"logits": t(2, 64, dtype=FLOAT), "top_k": ints(1, 2), "top_p": t(2, dtype=FLOAT)}, A2,
    ),
    "combine": Base("npu::npu_moe_distribute_combine_v2", combined, A2),
    "dispatch": Base("npu::npu_moe_distribute_dispatch_v2", dispatched, A2),
    "paged_duo": Base("atb::_npu_paged_attention", paged_duo, DUO),
    "splitfuse_duo": Base("atb::_npu_paged_attention_splitfuse_v2", splitfuse_duo, DUO),
    "flash_duo": Base("atb::_npu_flash_attention_v3", flash_duo, DUO),
    "write_duo": Base(
        "atb::_npu_reshape_and_cache",
        lambda: {"key": t(3, 2, 128), "value": t(3, 2, 128), "key_cache": nz(4, 16, 128, 16),
                 "value_cache": nz(4, 16, 128, 16), "slot_indices": ints(5, 511, -1)},
        DUO,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Wrong:
    """A call that breaks one rule.

    Attributes:
        id: what is wrong.
        base: the right call that it is made from.
        changes: the arguments that differ.
        rule: the row that refuses it; empty where torch itself does.
        found: what the message says of it.
        chips: where it is wrong.
    """

    id: str
    base: str
    changes: Callable[[], Arguments]
    rule: str
    found: str
    chips: tuple[str, ...] = ()


def w(id: str, base: str, rule: str, found: str, chips: tuple[str, ...] = (), /, **changes: Callable[[], Any]) -> Wrong:
    made = lambda: {name: make() for name, make in changes.items()}  # noqa: E731
    return Wrong(id, base, made, rule, found, chips or BASES[base].chips)


def just(value: Any) -> Callable[[], Any]:
    return lambda: value


def transposed(rows: int, columns: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """[rows, columns] over the bytes of [columns, rows]."""
    return t(columns, rows, dtype=dtype).t()


_FIA = "fused_infer_attention"

NORM_CASES = [
    w("gamma too short", "rms", "npu_rms_norm.gamma_shape", "gamma is (32,)", gamma=lambda: t(32)),
    w("gamma of two rows", "rms", "npu_rms_norm.gamma_shape", "gamma is (2, 64)", gamma=lambda: t(2, 64)),
    w("gamma in float32", "rms", "npu_rms_norm.gamma_dtype_310p", "gamma is torch.float32", DUO,
      gamma=lambda: t(64, dtype=FLOAT)),
    w("gamma in float16 of a float32 input", "rms", "npu_rms_norm.gamma_dtype", "gamma is torch.float16", A2,
      input=lambda: t(4, 64, dtype=FLOAT)),
    w("input in int32", "rms", "npu_rms_norm.dtype", "input is torch.int32", input=lambda: t(4, 64, dtype=I32)),
    w("input in float64", "rms", "npu_rms_norm.dtype", "input is torch.float64", input=lambda: t(4, 64, dtype=DOUBLE)),
    w("row of 16 bytes", "rms", "npu_rms_norm.short_tail", "has 16 bytes", DUO, input=lambda: t(4, 8),
      gamma=lambda: t(8)),
    w("bfloat16", "rms", "chip.bfloat16", "input is torch.bfloat16", DUO, input=lambda: t(4, 64, dtype=BF16),
      gamma=lambda: t(64, dtype=BF16)),
    w("residual of other rows", "add_rms", "npu_add_rms_norm.shape", "x2 is (3, 64)", x2=lambda: t(3, 64)),
    w("residual to be broadcast", "add_rms", "npu_add_rms_norm.shape", "x2 is (1, 64)", x2=lambda: t(1, 64)),
    w("residual in float32", "add_rms", "npu_add_rms_norm.dtypes", "x2 is torch.float32",
      x2=lambda: t(4, 64, dtype=FLOAT)),
    w("gamma too long", "add_rms", "npu_add_rms_norm.gamma_shape", "gamma is (128,)", gamma=lambda: t(128)),
    w("no rows", "add_rms", "npu_add_rms_norm.empty", "x1 has no elements", x1=lambda: t(0, 64), x2=lambda: t(0, 64)),
    w("scales in float16", "add_rms_quant", "npu_add_rms_norm_quant.scale_dtype", "scales1 is torch.float16",
      scales1=lambda: t(64)),
    w("scales too short", "add_rms_quant", "npu_add_rms_norm_quant.scale_shape", "scales1 is (1,)",
      scales1=lambda: t(1, dtype=FLOAT)),
    w("float32", "add_rms_quant", "npu_add_rms_norm_quant.dtype", "x1 is torch.float32", A2,
      x1=lambda: t(4, 64, dtype=FLOAT)),
    w("bfloat16", "add_rms_quant", "npu_add_rms_norm_quant.dtype_310p", "x1 is torch.bfloat16", DUO,
      x1=lambda: t(4, 64, dtype=BF16)),
    w("row of 16 elements", "add_rms_quant", "npu_add_rms_norm_quant.short_tail", "x1.size(-1) is 16", DUO,
      x1=lambda: t(4, 16), x2=lambda: t(4, 16), gamma=lambda: t(16), scales1=lambda: t(16, dtype=FLOAT)),
    w("smooth scale in float32", "add_rms_dynamic", "npu_add_rms_norm_dynamic_quant.dtypes",
      "smooth_scale1 is torch.float32", smooth_scale1=lambda: t(64, dtype=FLOAT)),
    w("gamma of two dimensions", "add_rms_dynamic", "npu_add_rms_norm_dynamic_quant.gamma_shape", "gamma has 2",
      gamma=lambda: t(4, 64)),
    w("odd row", "swiglu", "npu_swiglu.odd", "input.size(-1) is 63", input=lambda: t(4, 63)),
    w("odd dimension", "swiglu", "npu_swiglu.odd", "input.size(0) is 3", input=lambda: t(3, 64), dim=just(0)),
    w("a slice", "swiglu", "npu_swiglu.contiguous", "not contiguous", input=lambda: t(4, 128)[:, :64]),
    w("int8", "swiglu", "npu_swiglu.dtype", "input is torch.int8", input=lambda: t(4, 64, dtype=I8)),
    w("nothing", "swiglu", "npu_swiglu.empty", "no elements", input=lambda: t(0, 64)),
    w("odd row", "swiglu_quant", "npu_swiglu_quant.last_dim", "x.size(-1) is 63", x=lambda: t(4, 63),
      smooth_scales=just(None), group_index=just(None)),
    w("row of 8194", "swiglu_quant", "npu_swiglu_quant.last_dim", "8194", x=lambda: t(4, 8194),
      smooth_scales=just(None), group_index=just(None)),
    w("group index in int64", "swiglu_quant", "npu_swiglu_quant.group_index", "torch.int64",
      group_index=lambda: ints(1, 4, dtype=I64)),
    w("scales of the whole row", "swiglu_quant", "npu_swiglu_quant.scales", "smooth_scales is (2, 64)",
      smooth_scales=lambda: t(2, 64, dtype=FLOAT)),
    w("decreasing groups", "swiglu_quant", "npu_swiglu_quant.group_values", "1 comes after 4",
      group_index=lambda: ints(4, 1)),
    w("groups beyond the rows", "swiglu_quant", "npu_swiglu_quant.group_values", "5 rows",
      group_index=lambda: ints(1, 5)),
    w("quant_mode 2", "swiglu_quant", "npu_swiglu_quant.modes", "quant_mode is 2", quant_mode=just(2)),
    w("int32 without token scale", "dequant_swiglu", "npu_dequant_swiglu_quant.activation_scale",
      "activation_scale is not given", activation_scale=just(None)),
    w("odd row", "dequant_swiglu", "npu_dequant_swiglu_quant.odd", "x.size(-1) is 63", x=lambda: t(4, 63, dtype=I32),
      weight_scale=just(None)),
    w("half scale", "dequant_swiglu", "npu_dequant_swiglu_quant.scale_dtype", "weight_scale is torch.float16",
      weight_scale=lambda: t(1, 64)),
    w("not on the Duo", "swiglu_quant", "npu_swiglu_quant.product", "does not list this chip", DUO),
]  # fmt: skip

ROTARY_CASES = [
    w("head of 96", "rope", "apply_rotary_pos_emb.head_dim", "query.size(-1) is 96", query=lambda: t(1, 5, 8, 96)),
    w("half a cosine", "rope", "apply_rotary_pos_emb.head_dim", "cos.size(-1) is 32", cos=lambda: t(1, 5, 1, 32)),
    w("BNSD", "rope", "apply_rotary_pos_emb.layout", "'BNSD'", layout=just("BNSD")),
    w("interleaved", "rope", "apply_rotary_pos_emb.rotary_mode", "'interleave'", rotary_mode=just("interleave")),
    w("three dimensions in BSND", "rope", "apply_rotary_pos_emb.rank", "query is (5, 8, 128)",
      query=lambda: t(5, 8, 128)),
    w("cosines of other tokens", "rope", "apply_rotary_pos_emb.shape", "cos is (1, 4, 1, 128)",
      cos=lambda: t(1, 4, 1, 128)),
    w("cosines of every head", "rope", "apply_rotary_pos_emb.shape", "heads are not 1", cos=lambda: t(1, 5, 8, 128),
      sin=lambda: t(1, 5, 8, 128)),
    w("cosines in float32", "rope", "apply_rotary_pos_emb.dtypes", "cos is torch.float32",
      cos=lambda: t(1, 5, 1, 128, dtype=FLOAT)),
    w("bfloat16", "rope", "chip.bfloat16", "query is torch.bfloat16", DUO, query=lambda: t(1, 5, 8, 128, dtype=BF16),
      key=lambda: t(1, 5, 2, 128, dtype=BF16), cos=lambda: t(1, 5, 1, 128, dtype=BF16),
      sin=lambda: t(1, 5, 1, 128, dtype=BF16)),
    w("two dimensions", "rotary_mul", "npu_rotary_mul.rank", "input has 2 dimensions", input=lambda: t(5, 64)),
    w("mode", "rotary_mul", "npu_rotary_mul.rotary_mode", "'quarter'", rotary_mode=just("quarter")),
    w("sines of other tokens", "rotary_mul", "npu_rotary_mul.shape", "r2 is (1, 4, 1, 64)", r2=lambda: t(1, 4, 1, 64)),
    w("head of 128", "interleave", "npu_interleave_rope.head_dim", "x.size(-1) is 128", x=lambda: t(2, 8, 1, 128)),
    w("cosines of heads", "interleave", "npu_interleave_rope.shape", "cos is (2, 8, 1, 64)",
      cos=lambda: t(2, 8, 1, 64), sin=lambda: t(2, 8, 1, 64)),
    w("strided", "interleave", "npu_interleave_rope.contiguous", "x is not contiguous",
      x=lambda: t(2, 8, 1, 128)[..., :64]),
    w("float32", "interleave", "npu_interleave_rope.dtype", "x is torch.float32",
      x=lambda: t(2, 8, 1, 64, dtype=FLOAT)),
    w("head of 72", "mrope", "npu_mrope.multiples", "head_size is 72", query=lambda: t(3, 144), key=lambda: t(3, 72),
      head_size=just(72)),
    w("section", "mrope", "npu_mrope.section", "sums to 24", mrope_section=just([8, 8, 8])),
    w("position beyond", "mrope", "npu_mrope.positions", "positions holds 16",
      positions=lambda: ints(0, 1, 16, dtype=I64)),
    w("not on the Duo", "interleave", "npu_interleave_rope.product", "does not list this chip", DUO),
    w("not on the Duo", "mrope", "npu_mrope.product", "does not list this chip", DUO),
]  # fmt: skip

ATTENTION_CASES = [
    w("query in float32", "prefill", f"{_FIA}.query_dtype", "query is torch.float32",
      query=lambda: t(2, 8, 5, 64, dtype=FLOAT)),
    w("mixed dtypes", "prefill", f"{_FIA}.dtypes", "query is torch.float16 and key is torch.bfloat16",
      key=lambda: t(2, 2, 5, 64, dtype=BF16), value=lambda: t(2, 2, 5, 64, dtype=BF16)),
    w("layout of another library", "prefill", f"{_FIA}.layout", "'SBH'", input_layout=just("SBH")),
    w("three dimensions", "prefill", f"{_FIA}.rank", "query is (2, 5, 512)", query=lambda: t(2, 5, 512)),
    w("strided query", "prefill", f"{_FIA}.contiguous", "query is not contiguous",
      query=lambda: t(2, 5, 8, 64).transpose(1, 2)),
    w("value of other length", "prefill", f"{_FIA}.key_value_shape", "value is (2, 2, 6, 64)",
      value=lambda: t(2, 2, 6, 64)),
    w("wrong num_heads", "prefill", f"{_FIA}.num_heads", "4 heads are given", num_heads=just(4)),
    w("wrong num_heads in TND", "packed", f"{_FIA}.num_heads", "16 heads are given", num_heads=just(16)),
    w("wrong num_key_value_heads", "prefill", f"{_FIA}.num_key_value_heads", "4 key heads are given",
      num_key_value_heads=just(4)),
    w("num_key_value_heads left out", "prefill", f"{_FIA}.num_key_value_heads", "8 key heads are given",
      num_key_value_heads=just(0)),
    w("wrong num_key_value_heads of a cache", "packed", f"{_FIA}.num_key_value_heads", "4 key heads are given",
      num_key_value_heads=just(4)),
    w("heads that do not divide", "prefill", f"{_FIA}.groups", "not divisible by 3", num_key_value_heads=just(3)),
    w("head of 60", "prefill", f"{_FIA}.head_dim", "is 60", query=lambda: t(2, 8, 5, 60), key=lambda: t(2, 2, 5, 60),
      value=lambda: t(2, 2, 5, 60)),
    w("head of 520", "prefill", f"{_FIA}.head_dim", "more than 512", query=lambda: t(2, 8, 5, 520),
      key=lambda: t(2, 2, 5, 520), value=lambda: t(2, 2, 5, 520)),
    w("head of 96 in TND", "packed", f"{_FIA}.packed_head_dim", "is 96 in layout TND", query=lambda: t(5, 8, 96),
      key=lambda: t(4, 16, 192), value=lambda: t(4, 16, 192)),
    w("TND without lengths", "packed", f"{_FIA}.packed_lengths", "without the lengths of queries",
      actual_seq_lengths=just(None)),
    w("TND without lengths of keys", "packed", f"{_FIA}.packed_lengths", "without the lengths of keys",
      actual_seq_lengths_kv=just(None)),
    w("lengths instead of cumulative ones", "packed", f"{_FIA}.cumulative", "[3, 2]", actual_seq_lengths=just([3, 2])),
    w("lengths beyond the tokens", "packed", f"{_FIA}.tokens", "end at 6", actual_seq_lengths=just([3, 6])),
    w("block table without lengths", "decode", f"{_FIA}.kv_lengths", "without the lengths of keys",
      actual_seq_lengths_kv=just(None)),
    w("block table in int64", "decode", f"{_FIA}.block_table", "torch.int64",
      block_table=lambda: ints(0, 1, 2, 3, dtype=I64).view(2, 2)),
    w("flat block table", "decode", f"{_FIA}.block_table", "1 dimensions", block_table=lambda: ints(0, 1, 2, 3)),
    w("block table of one sequence", "decode", f"{_FIA}.block_table", "for 2 sequences",
      block_table=lambda: ints(0, 1).view(1, 2)),
    w("block of 100", "decode", f"{_FIA}.block_size", "block_size is 100", block_size=just(100)),
    w("block of 1024 in decode", "decode", f"{_FIA}.block_size", "block_size is 1024", block_size=just(1024)),
    w("block of 16 in prefill", "decode", f"{_FIA}.block_size", "block_size is 16", query=lambda: t(2, 3, 512),
      block_size=just(16)),
    w("block of 24 in TND", "packed", f"{_FIA}.block_size", "block_size is 24", block_size=just(24)),
    w("block size left out", "decode", f"{_FIA}.block_size", "block_size is 0", block_size=just(0)),
    w("block size of another cache", "decode", f"{_FIA}.block_axis", "blocks of 128", block_size=just(256)),
    w("cache of four dimensions in BSH", "decode", f"{_FIA}.cache_rank", "(4, 2, 128, 64)",
      key=lambda: t(4, 2, 128, 64), value=lambda: t(4, 2, 128, 64)),
    w("too few columns", "decode", f"{_FIA}.block_columns", "300 keys need 3", actual_seq_lengths_kv=just([300, 10])),
    w("block beyond the cache", "decode", f"{_FIA}.block_values", "holds 7",
      block_table=lambda: ints(0, 7, 2, 3).view(2, 2)),
    w("one length short", "prefill", f"{_FIA}.length_count", "2 lengths of keys for 3", query=lambda: t(3, 8, 5, 64),
      key=lambda: t(3, 2, 5, 64), value=lambda: t(3, 2, 5, 64), actual_seq_lengths_kv=just([5, 5])),
    w("length beyond the keys", "prefill", f"{_FIA}.length", "6 keys are asked for",
      actual_seq_lengths_kv=just([6, 5])),
    w("sparse_mode 9", "prefill", f"{_FIA}.sparse_mode", "sparse_mode is 9", sparse_mode=just(9)),
    w("sparse_mode 5", "prefill", f"{_FIA}.sparse_mode", "sparse_mode is 5", sparse_mode=just(5)),
    w("mask in float16", "packed", f"{_FIA}.mask_dtype", "atten_mask is torch.float16",
      atten_mask=lambda: t(2048, 2048)),
    w("mask of 512", "packed", f"{_FIA}.compressed_mask", "(512, 512) in sparse_mode 3",
      atten_mask=lambda: t(512, 512, dtype=BOOL)),
    w("no mask in sparse_mode 3", "packed", f"{_FIA}.compressed_mask", "without atten_mask", atten_mask=just(None)),
    w("full mask in sparse_mode 2", "prefill", f"{_FIA}.compressed_mask", "(5, 5) in sparse_mode 2",
      atten_mask=lambda: t(5, 5, dtype=BOOL), sparse_mode=just(2)),
    w("compressed mask in sparse_mode 0", "prefill", f"{_FIA}.full_mask", "(2048, 2048) for 5 queries",
      atten_mask=lambda: t(2048, 2048, dtype=BOOL)),
    w("no mask in sparse_mode 1", "prefill", f"{_FIA}.full_mask", "without atten_mask", sparse_mode=just(1)),
    w("inner_precise 2 in decode", "decode", f"{_FIA}.inner_precise", "inner_precise is 2", inner_precise=just(2)),
    w("scale of keys alone", "decode", f"{_FIA}.antiquant_pair", "value_antiquant_scale is not",
      key_antiquant_scale=lambda: t(128)),
    w("int8 keys without scales", "decode", f"{_FIA}.antiquant_missing", "key_antiquant_scale is not given",
      key=lambda: t(4, 128, 128, dtype=I8), value=lambda: t(4, 128, 128, dtype=I8)),
    w("int8 keys in a packed layout", "packed", f"{_FIA}.int8_layout", "int8 keys in layout TND",
      key=lambda: t(4, 16, 256, dtype=I8), value=lambda: t(4, 16, 256, dtype=I8),
      key_antiquant_scale=lambda: t(4, 2, 16, dtype=FLOAT), value_antiquant_scale=lambda: t(4, 2, 16, dtype=FLOAT)),
    w("int8 keys in pages for a prompt", "codes", f"{_FIA}.int8_layout", "in pages for 3 queries",
      query=lambda: t(2, 8, 3, 64), key_antiquant_mode=just(1), value_antiquant_mode=just(1)),
    w("int8 keys of 48", "codes", f"{_FIA}.int8_head_dim", "is 48", query=lambda: t(2, 8, 1, 48),
      key=lambda: t(4, 128, 96, dtype=I8), value=lambda: t(4, 128, 96, dtype=I8)),
    w("scales in mode 6", "codes", f"{_FIA}.scale_modes", "modes 6 and 6", key_antiquant_mode=just(6),
      value_antiquant_mode=just(6)),
    w("scales by head for a prompt", "codes", f"{_FIA}.scale_modes", "not in (0, 1)",
      query=lambda: t(2, 8, 3, 64), block_table=just(None), key=lambda: t(2, 2, 5, 64, dtype=I8),
      value=lambda: t(2, 2, 5, 64, dtype=I8), actual_seq_lengths_kv=just([5, 3])),
    w("scales in pages by token first", "codes", f"{_FIA}.scales_in_pages", "(4, 128, 2)",
      key_antiquant_scale=lambda: t(4, 128, 2, dtype=FLOAT)),
    w("scales in pages of half the width", "codes", f"{_FIA}.scales_in_pages", "torch.float16",
      value_antiquant_scale=lambda: t(4, 2, 128)),
    w("scales in pages without pages", "codes", f"{_FIA}.scales_in_pages", "without block_table",
      block_table=just(None), key=lambda: t(2, 2, 5, 64, dtype=I8), value=lambda: t(2, 2, 5, 64, dtype=I8),
      actual_seq_lengths_kv=just([5, 3])),
    w("scales in pages by token alone, with heads", "codes", f"{_FIA}.scales_in_pages", "in mode 4, not (4, 128)",
      key_antiquant_mode=just(4), value_antiquant_mode=just(4)),
    w("not on the Duo", "packed", "npu_fused_infer_attention_score.product", "does not list this chip", DUO),
    w("not on the Duo", "latent", "npu_fused_infer_attention_score_v2.product", "does not list this chip", DUO),
    w("rope of queries alone", "latent", f"{_FIA}.ropes", "key_rope is not", key_rope=just(None)),
    w("rope of 32", "latent", f"{_FIA}.rope_dim", "32 dimensions", query_rope=lambda: t(2, 16, 1, 32)),
    w("12 heads", "latent", f"{_FIA}.latent_heads", "12 heads", query=lambda: t(2, 12, 1, 512),
      query_rope=lambda: t(2, 12, 1, 64), num_query_heads=just(12)),
    w("log-sum-exp", "latent", f"{_FIA}.latent_lse", "softmax_lse", return_softmax_lse=just(True)),
    w("sparse_mode 2 in latent attention", "latent", f"{_FIA}.latent_sparse", "sparse_mode is 2", sparse_mode=just(2),
      atten_mask=lambda: t(2048, 2048, dtype=BOOL)),
    w("bfloat16", "prompt", "npu_prompt_flash_attention.dtype_310p", "query is torch.bfloat16", DUO,
      query=lambda: t(1, 8, 16, 64, dtype=BF16)),
    w("grouped queries", "prompt", "npu_prompt_flash_attention.groups_310p", "num_key_value_heads is 2", DUO,
      num_key_value_heads=just(2), key=lambda: t(1, 2, 16, 64), value=lambda: t(1, 2, 16, 64)),
    w("lengths", "prompt", "npu_prompt_flash_attention.lengths_310p", "actual_seq_lengths is given", DUO,
      actual_seq_lengths=just([16])),
    w("causal mode", "prompt", "npu_prompt_flash_attention.sparse_310p", "sparse_mode is 2", DUO, sparse_mode=just(2),
      atten_mask=lambda: t(2048, 2048, dtype=BOOL)),
    w("mask in float16", "prompt", "npu_prompt_flash_attention.mask_dtype", "torch.float16",
      atten_mask=lambda: t(16, 16)),
    w("TND", "incre", "npu_incre_flash_attention.layout", "'TND'", input_layout=just("TND")),
    w("block table in int64", "incre", "npu_incre_flash_attention.block_table", "torch.int64",
      block_table=lambda: ints(0, dtype=I64).view(1, 1)),
    w("17 partial results", "update", "npu_attention_update.count", "17", lse=lambda: [t(6, dtype=FLOAT)] * 17,
      local_out=lambda: [t(6, 64)] * 17),
    w("lse in float16", "update", "npu_attention_update.lse_dtype", "lse is torch.float16", lse=lambda: [t(6)] * 2),
    w("head of 60", "update", "npu_attention_update.head_dim", "60", local_out=lambda: [t(6, 60)] * 2),
    w("ND cache", "paged_duo", "_npu_paged_attention.cache_format", "not FRACTAL_NZ",
      key_cache=lambda: t(4, 16, 128, 16)),
    w("block of 256", "paged_duo", "_npu_paged_attention.block_limit", "is 32768",
      key_cache=lambda: nz(4, 16, 256, 16), value_cache=lambda: nz(4, 16, 256, 16)),
    w("block of 32", "paged_duo", "_npu_paged_attention.block_size", "32 tokens", key_cache=lambda: nz(4, 16, 32, 16),
      value_cache=lambda: nz(4, 16, 32, 16)),
    w("cache of other heads", "paged_duo", "_npu_paged_attention.cache_shape", "(4, 8, 128, 16)",
      key_cache=lambda: nz(4, 8, 128, 16), value_cache=lambda: nz(4, 8, 128, 16)),
    w("block table in int64", "paged_duo", "_npu_paged_attention.block_table", "torch.int64",
      block_table=lambda: ints(0, 1, 2, 3, dtype=I64).view(2, 2)),
    w("lengths in int64", "paged_duo", "_npu_paged_attention.context_lens", "torch.int64",
      context_lens=lambda: ints(200, 10, dtype=I64)),
    w("wrong num_heads", "paged_duo", "_npu_paged_attention.heads", "4 heads", num_heads=just(4)),
    w("output of another shape", "paged_duo", "_npu_paged_attention.out", "out is (2, 1024)", out=lambda: t(2, 1024)),
    w("float32", "paged_duo", "_npu_paged_attention.dtype", "query is torch.float32",
      query=lambda: t(2, 8, 128, dtype=FLOAT)),
    w("mask of 512", "splitfuse_duo", "_npu_paged_attention_splitfuse_v2.mask", "(512, 512)",
      mask=lambda: t(512, 512)),
    w("NZ mask", "splitfuse_duo", "_npu_paged_attention_splitfuse_v2.mask", "format 29", mask=lambda: nz(2048, 2048)),
    w("mask in bool", "splitfuse_duo", "_npu_paged_attention.mask_dtype", "torch.bool",
      mask=lambda: t(2048, 2048, dtype=BOOL)),
    w("mask_type 3", "splitfuse_duo", "_npu_paged_attention_splitfuse_v2.mask_type", "mask_type is 3",
      mask_type=just(3)),
    w("mask_type 5", "flash_duo", "_npu_flash_attention_v3.mask_type", "mask_type is 5", mask_type=just(5)),
    w("ND mask", "flash_duo", "_npu_flash_attention.mask_format", "not FRACTAL_NZ", mask=lambda: t(2048, 2048)),
]  # fmt: skip

CACHE_CASES = [
    w("slots in int16", "scatter", "npu_scatter_pa_kv_cache.slot_dtype", "torch.int16",
      slot_mapping=lambda: ints(5, 63, 0, dtype=torch.int16)),
    w("one slot short", "scatter", "npu_scatter_pa_kv_cache.slot_count", "slot_mapping is (2,)",
      slot_mapping=lambda: ints(5, 63)),
    w("slot beyond the cache", "scatter", "npu_scatter_pa_kv_cache.slots", "holds 64",
      slot_mapping=lambda: ints(5, 64, 0)),
    w("slot of padding", "scatter", "npu_scatter_pa_kv_cache.slots", "holds -1", slot_mapping=lambda: ints(5, -1, 0)),
    w("slot used twice", "scatter", "npu_scatter_pa_kv_cache.unique", "holds 5 more than once",
      slot_mapping=lambda: ints(5, 5, 0)),
    w("slice of a fused projection", "scatter", "npu_scatter_pa_kv_cache.contiguous", "value is not contiguous",
      value=lambda: t(3, 4, 64)[:, 2:]),
    w("cache of another dtype", "scatter", "npu_scatter_pa_kv_cache.dtypes", "key_cache is torch.bfloat16",
      key_cache=lambda: t(4, 16, 2, 64, dtype=BF16)),
    w("cache of other heads", "scatter", "npu_scatter_pa_kv_cache.cache_shape", "(4, 16, 4, 64)",
      key_cache=lambda: t(4, 16, 4, 64)),
    w("cache of three dimensions", "scatter", "npu_scatter_pa_kv_cache.rank", "key_cache has 3",
      key_cache=lambda: t(4, 16, 128)),
    w("values of other tokens", "scatter", "npu_scatter_pa_kv_cache.shape", "value is (2, 2, 64)",
      value=lambda: t(2, 2, 64)),
    w("mode PA", "scatter", "npu_scatter_pa_kv_cache.cache_mode", "'PA'", cache_mode=just("PA")),
    w("mode left at PA_NZ", "scatter", "npu_scatter_pa_kv_cache.nz_cache_shape", "(4, 16, 2, 64)",
      cache_mode=just("PA_NZ")),
    w("not on the Duo", "scatter", "npu_scatter_pa_kv_cache.product", "does not list this chip", DUO),
    w("index in int32", "latent_cache", "npu_kv_rmsnorm_rope_cache.index_dtype", "torch.int32",
      index=lambda: ints(5, 2, 9, 0)),
    w("index used twice", "latent_cache", "npu_kv_rmsnorm_rope_cache.unique", "more than once",
      index=lambda: ints(5, 2, 5, 0, dtype=I64)),
    w("index beyond the cache", "latent_cache", "npu_kv_rmsnorm_rope_cache.slots", "holds 32",
      index=lambda: ints(5, 2, 32, 0, dtype=I64)),
    w("latent of 320", "latent_cache", "npu_kv_rmsnorm_rope_cache.shape", "kv is (4, 1, 1, 320)",
      kv=lambda: t(4, 1, 1, 320)),
    w("two heads", "latent_cache", "npu_kv_rmsnorm_rope_cache.shape", "kv is (4, 2, 1, 576)",
      kv=lambda: t(4, 2, 1, 576)),
    w("gamma of 576", "latent_cache", "npu_kv_rmsnorm_rope_cache.gamma_shape", "gamma is (576,)",
      gamma=lambda: t(576)),
    w("mode PA_BSND", "latent_cache", "npu_kv_rmsnorm_rope_cache.cache_mode", "'PA_BSND'", cache_mode=just("PA_BSND")),
    w("mode left at Norm", "latent_cache", "npu_kv_rmsnorm_rope_cache.cache_shape", "in mode Norm",
      cache_mode=just("Norm")),
    w("one scale", "latent_cache", "npu_kv_rmsnorm_rope_cache.scales", "c_kv_scale is not",
      k_rope_scale=lambda: t(64, dtype=FLOAT)),
    w("int8 caches without scales", "latent_cache", "npu_kv_rmsnorm_rope_cache.quantised", "without scales",
      k_cache=lambda: t(2, 16, 1, 64, dtype=I8), ckv_cache=lambda: t(2, 16, 1, 512, dtype=I8)),
    w("float32", "latent_cache", "npu_kv_rmsnorm_rope_cache.dtype", "kv is torch.float32",
      kv=lambda: t(4, 1, 1, 576, dtype=FLOAT)),
    w("slots in int64", "write_duo", "_npu_reshape_and_cache.slot_dtype", "torch.int64",
      slot_indices=lambda: ints(5, 511, 0, dtype=I64)),
    w("slot beyond the cache", "write_duo", "_npu_reshape_and_cache.slots", "holds 512",
      slot_indices=lambda: ints(5, 512, 0)),
    w("ND cache", "write_duo", "_npu_reshape_and_cache.format", "not FRACTAL_NZ", key_cache=lambda: t(4, 128, 2, 128),
      value_cache=lambda: t(4, 128, 2, 128)),
    w("updates of another dtype", "scatter_nd", "npu_scatter_nd_update.dtypes", "updates is torch.float32",
      updates=lambda: t(2, 4, dtype=FLOAT)),
    w("updates of another shape", "scatter_nd", "npu_scatter_nd_update.shape", "updates is (2, 3)",
      updates=lambda: t(2, 3)),
    w("index beyond", "scatter_nd", "npu_scatter_nd_update.indices", "[0, 8)", indices=lambda: ints(1, 8).view(2, 1)),
]  # fmt: skip

MOE_CASES = [
    w("three dimensions", "gate", "npu_moe_gating_top_k.rank", "x has 3 dimensions",
      x=lambda: t(1, 4, 64, dtype=FLOAT)),
    w("4096 experts", "gate", "npu_moe_gating_top_k.experts", "4096", x=lambda: t(4, 4096, dtype=FLOAT),
      bias=just(None), group_count=just(1), k_group=just(1)),
    w("bias in float16", "gate", "npu_moe_gating_top_k.bias_dtype", "bias is torch.float16", bias=lambda: t(64)),
    w("bias of half the experts", "gate", "npu_moe_gating_top_k.bias_shape", "bias.size(0) is 32",
      bias=lambda: t(32, dtype=FLOAT)),
    w("groups that do not divide", "gate", "npu_moe_gating_top_k.groups", "not divisible by 7", group_count=just(7)),
    w("groups of two", "gate", "npu_moe_gating_top_k.groups", "32 groups of 2", group_count=just(32)),
    w("more groups than there are", "gate", "npu_moe_gating_top_k.k_group", "k_group is 9", k_group=just(9)),
    w("more experts than chosen", "gate", "npu_moe_gating_top_k.k", "k is 17", k=just(17)),
    w("renorm", "gate", "npu_moe_gating_top_k.renorm", "renorm is 1", renorm=just(1)),
    w("norm_type 2", "gate", "npu_moe_gating_top_k.norm_type", "norm_type is 2", norm_type=just(2)),
    w("not on the Duo", "gate", "npu_moe_gating_top_k.product", "does not list this chip", DUO),
    w("more than the experts", "gate_softmax", "npu_moe_gating_top_k_softmax.k", "k is 65", k=just(65)),
    w("k of 0", "gate_softmax", "npu_moe_gating_top_k_softmax.k", "k is 0", k=just(0)),
    w("one dimension", "gate_softmax", "npu_moe_gating_top_k_softmax.rank", "1 dimensions", x=lambda: t(64)),
    w("finished in int8", "gate_softmax", "npu_moe_gating_top_k_softmax.finished", "torch.int8",
      finished=lambda: t(4, dtype=I8)),
    w("1025 tokens", "gate_softmax", "npu_moe_gating_top_k_softmax.tokens_310p", "1025", DUO, x=lambda: t(1025, 64)),
    w("float32", "gate_softmax", "npu_moe_gating_top_k_softmax.dtype_310p", "torch.float32", DUO,
      x=lambda: t(4, 64, dtype=FLOAT)),
    w("NZ logits", "gate_softmax", "npu_moe_gating_top_k_softmax.format_310p", "FRACTAL_NZ", DUO, x=lambda: nz(4, 64)),
    w("experts in int64", "routing", "npu_moe_init_routing_v2.index_dtype", "torch.int64",
      expert_idx=lambda: t(4, 2, dtype=I64)),
    w("experts of other tokens", "routing", "npu_moe_init_routing_v2.rank", "expert_idx.size(0) is 3",
      expert_idx=lambda: t(3, 2, dtype=I32)),
    w("quantisation", "routing", "npu_moe_init_routing_v2.quant_mode_310p", "quant_mode is 1", DUO,
      quant_mode=just(1)),
    w("capacity", "routing", "npu_moe_init_routing_v2.drop_pad_mode_310p", "drop_pad_mode is 1", DUO,
      drop_pad_mode=just(1)),
    w("int8", "routing", "npu_moe_init_routing_v2.dtype_310p", "torch.int8", DUO, x=lambda: t(4, 64, dtype=I8)),
    w("mxfp8", "routing", "npu_moe_init_routing_v2.quant_mode", "quant_mode is 2", A2, quant_mode=just(2)),
    w("range beyond the experts", "routing", "npu_moe_init_routing_v2.expert_range", "[0, 5] of 4", A2,
      active_expert_range=just([0, 5])),
    w("backward range", "routing", "npu_moe_init_routing_v2.expert_range", "[3, 1]", active_expert_range=just([3, 1])),
    w("expert beyond", "routing", "npu_moe_init_routing_v2.experts", "holds 4", A2,
      expert_idx=lambda: ints(0, 1, 2, 3, 0, 1, 2, 4).view(4, 2)),
    w("padded permutation", "permute", "npu_moe_token_permute.padded", "padded_mode is True", padded_mode=just(True)),
    w("not on the Duo", "permute", "npu_moe_token_permute.product", "called", DUO),
    w("index beyond", "unpermute", "npu_moe_token_unpermute.indices", "holds 4",
      sorted_indices=lambda: ints(3, 1, 0, 4)),
    w("weights of other tokens", "unpermute", "npu_moe_token_unpermute.rows", "probs is (3, 2)",
      probs=lambda: t(3, 2)),
    w("inner dimensions", "grouped", "npu_grouped_matmul.reduction", "48 rows", weight=lambda: [t(3, 48, 32)]),
    w("weight in bfloat16", "grouped", "npu_grouped_matmul.dtypes", "weight is torch.bfloat16", A2,
      weight=lambda: [t(3, 64, 32, dtype=BF16)]),
    w("float32", "grouped", "npu_grouped_matmul.dtype_310p", "x is torch.float32", DUO,
      x=lambda: [t(6, 64, dtype=FLOAT)], weight=lambda: [t(3, 64, 32, dtype=FLOAT)]),
    w("group_list in int32", "grouped", "npu_grouped_matmul.group_list_dtype", "torch.int32",
      group_list=lambda: ints(1, 4, 6)),
    w("group_list too short", "grouped", "npu_grouped_matmul.group_list_length", "2 entries for 3",
      group_list=lambda: ints(1, 6, dtype=I64)),
    w("counts as cumulative", "grouped", "npu_grouped_matmul.cumulative", "2 comes after 3",
      group_list=lambda: ints(1, 3, 2, dtype=I64)),
    w("cumulative as counts", "grouped", "npu_grouped_matmul.rows", "covers 11 rows", group_list_type=just(1)),
    w("groups beyond the rows", "grouped", "npu_grouped_matmul.rows", "covers 7 rows",
      group_list=lambda: ints(1, 4, 7, dtype=I64)),
    w("no group_list", "grouped", "npu_grouped_matmul.group_list_missing", "group_list is not given",
      group_list=just(None)),
    w("several outputs", "grouped", "npu_grouped_matmul.one_output", "split_item is 0", split_item=just(0)),
    w("split_item 4", "grouped", "npu_grouped_matmul.split_item", "split_item is 4", split_item=just(4)),
    w("group_type 1", "grouped", "npu_grouped_matmul.group_type", "group_type is 1", A2, group_type=just(1)),
    w("group_type 2", "grouped", "npu_grouped_matmul.group_type_310p", "group_type is 2", DUO, group_type=just(2)),
    w("weights as a list", "grouped", "npu_grouped_matmul.single_310p", "weight has 3 tensors", DUO,
      weight=lambda: [t(64, 32) for _ in range(3)]),
    w("30 columns", "grouped", "npu_grouped_matmul.columns_310p", "30, no multiple of 16", DUO,
      weight=lambda: [t(3, 64, 30)]),
    w("activation", "grouped", "npu_grouped_matmul.quantised_310p", "act_type is 5", DUO, act_type=just(5)),
    w("activation 3", "grouped", "npu_grouped_matmul.act_type", "act_type is 3", A2, act_type=just(3)),
    w("weight of two dimensions", "grouped", "npu_grouped_matmul.ranks", "not of 3 dimensions",
      weight=lambda: [t(64, 32)], group_list=lambda: ints(6, dtype=I64)),
    w("transposed x", "grouped", "npu_grouped_matmul.transposed", "x is transposed", x=lambda: [transposed(6, 64)]),
    w("bias in float32", "grouped", "npu_grouped_matmul.bias_dtype", "bias is torch.float32", A2,
      bias=lambda: [t(3, 32, dtype=FLOAT)]),
    w("int8 weight without scale", "grouped", "npu_grouped_matmul.antiquant", "antiquant_scale is not given", A2,
      weight=lambda: [t(3, 64, 32, dtype=I8)]),
    w("scale of the weight in float32", "grouped", "npu_grouped_matmul.antiquant_dtype",
      "antiquant_scale is torch.float32", A2, weight=lambda: [t(3, 64, 32, dtype=I8)],
      antiquant_scale=lambda: [t(3, 32, dtype=FLOAT)]),
    w("int8 weight with scales by group", "grouped", "npu_grouped_matmul.antiquant_groups",
      "antiquant_scale is (3, 2, 32) for an int8 weight (3, 64, 32)", A2,
      weight=lambda: [t(3, 64, 32, dtype=I8)], antiquant_scale=lambda: [t(3, 2, 32)]),
    w("int8 without scale", "grouped", "npu_grouped_matmul.scale", "scale is not given", A2,
      x=lambda: [t(6, 64, dtype=I8)], weight=lambda: [t(3, 64, 32, dtype=I8)]),
    w("scale that is not the result's", "grouped", "npu_grouped_matmul.scale_dtype", "scale is torch.bfloat16", A2,
      x=lambda: [t(6, 64, dtype=I8)], weight=lambda: [t(3, 64, 32, dtype=I8)], scale=lambda: [t(3, 32, dtype=BF16)],
      output_dtype=just(5)),
    w("counts instead of cumulative", "grouped_dequant", "npu_quant_grouped_matmul_dequant.cumulative",
      "2 comes after 4", group_list=lambda: ints(4, 2, dtype=I64)),
    w("weight not transposed", "grouped_dequant", "npu_quant_grouped_matmul_dequant.shape", "(2, 64, 32)",
      quantized_weight=lambda: t(2, 64, 32, dtype=I8)),
    w("scale in float16", "grouped_dequant", "npu_quant_grouped_matmul_dequant.dtype", "weight_scale is torch.float16",
      weight_scale=lambda: t(2, 32)),
]  # fmt: skip

QUANT_CASES = [
    w("float32", "dynamic", "npu_dynamic_quant.dtype", "input is torch.float32", input=lambda: t(4, 64, dtype=FLOAT)),
    w("one dimension", "dynamic", "npu_dynamic_quant.rank", "1 dimensions", input=lambda: t(64)),
    w("smooth scales of other rows", "dynamic", "npu_dynamic_quant.smooth_scales", "smooth_scales is (32,)",
      smooth_scales=lambda: t(32)),
    w("groups without smooth scales", "dynamic", "npu_dynamic_quant.smooth_scales", "without smooth_scales",
      group_index=lambda: ints(1, 4)),
    w("groups in int64", "dynamic", "npu_dynamic_quant.group_index", "torch.int64", smooth_scales=lambda: t(2, 64),
      group_index=lambda: ints(1, 4, dtype=I64)),
    w("groups that do not cover", "dynamic", "npu_dynamic_quant.group_values", "ends at 3",
      smooth_scales=lambda: t(2, 64), group_index=lambda: ints(1, 3)),
    w("int4 rows of 60", "dynamic", "npu_dynamic_quant.int4_rows", "60, no multiple of 8", input=lambda: t(4, 60),
      dst_type=just(16)),
    w("float16 matrices", "matmul", "npu_quant_matmul.dtype", "x1 is torch.float16", A2, x1=lambda: t(4, 64),
      x2=lambda: t(64, 32)),
    w("packed int4", "matmul", "npu_quant_matmul.dtype_310p", "x1 is torch.int32", DUO, x1=lambda: t(4, 8, dtype=I32),
      x2=lambda: t(64, 4, dtype=I32)),
    w("weight not quantised", "matmul", "npu_quant_matmul.dtypes", "x2 is torch.int32", A2,
      x2=lambda: t(64, 32, dtype=I32)),
    w("inner dimensions", "matmul", "npu_quant_matmul.reduction", "cannot be multiplied",
      x2=lambda: t(32, 64, dtype=I8)),
    w("scale of other columns", "matmul", "npu_quant_matmul.scale_length", "scale is (16,)",
      scale=lambda: t(16, dtype=FLOAT)),
    w("scale in float16", "matmul", "npu_quant_matmul.scale_dtype", "scale is torch.float16", A2, scale=lambda: t(32)),
    w("scale in bfloat16", "matmul", "npu_quant_matmul.scale_dtype_310p", "scale is torch.bfloat16", DUO,
      scale=lambda: t(32, dtype=BF16)),
    w("results in float32", "matmul", "npu_quant_matmul.output_dtype", "output_dtype is torch.float32", A2,
      output_dtype=just(6)),
    w("results in bfloat16", "matmul", "npu_quant_matmul.output_dtype_310p", "output_dtype is torch.bfloat16", DUO,
      output_dtype=just(15)),
    w("bfloat16 scale for float16", "matmul", "npu_quant_matmul.combination", "scale is torch.bfloat16 for", A2,
      scale=lambda: t(32, dtype=BF16)),
    w("int64 scale for bfloat16", "matmul", "npu_quant_matmul.combination", "scale is torch.int64 for", A2,
      scale=lambda: t(32, dtype=I64), output_dtype=just(15)),
    w("token scales in float16", "matmul", "npu_quant_matmul.pertoken_dtype", "torch.float16",
      pertoken_scale=lambda: t(4)),
    w("token scales of other tokens", "matmul", "npu_quant_matmul.pertoken_shape", "pertoken_scale is (3,)",
      pertoken_scale=lambda: t(3, dtype=FLOAT)),
    w("bias in float16", "matmul", "npu_quant_matmul.bias", "bias is torch.float16", A2, bias=lambda: t(32)),
    w("bias in float32", "matmul", "npu_quant_matmul.bias_310p", "bias is torch.float32", DUO,
      bias=lambda: t(32, dtype=FLOAT)),
    w("bias of two dimensions", "matmul", "npu_quant_matmul.bias_shape", "bias is (1, 32)",
      bias=lambda: t(1, 32, dtype=I32)),
    w("offset for float16", "matmul", "npu_quant_matmul.offset", "offset is given", offset=lambda: t(32, dtype=FLOAT)),
    w("NZ weight not transposed", "matmul", "npu_quant_matmul.nz_310p", "not transposed", DUO,
      x2=lambda: nz(64, 32, dtype=I8)),
    w("scale in float16", "param", "npu_trans_quant_param.dtype", "scale is torch.float16", scale=lambda: t(32)),
    w("scale of three dimensions", "param", "npu_trans_quant_param.rank", "3 dimensions",
      scale=lambda: t(1, 1, 32, dtype=FLOAT)),
    w("strided scale", "param", "npu_trans_quant_param.contiguous", "not contiguous",
      scale=lambda: t(64, dtype=FLOAT)[::2]),
    w("weight in float16", "weight", "npu_weight_quant_batchmatmul.weight_dtype", "weight is torch.float16", A2,
      weight=lambda: t(128, 32)),
    w("packed weight", "weight", "npu_weight_quant_batchmatmul.weight_dtype_310p", "weight is torch.int32", DUO,
      weight=lambda: t(128, 4, dtype=I32)),
    w("inner dimensions", "weight", "npu_weight_quant_batchmatmul.reduction", "cannot be multiplied",
      weight=lambda: t(64, 32, dtype=I8)),
    w("scale in float32", "weight", "npu_weight_quant_batchmatmul.scale_dtype", "antiquant_scale is torch.float32",
      antiquant_scale=lambda: t(32, dtype=FLOAT)),
    w("scale of other columns", "weight", "npu_weight_quant_batchmatmul.scale_shape", "antiquant_scale is (16,)",
      antiquant_scale=lambda: t(16)),
    w("groups of 48", "weight", "npu_weight_quant_batchmatmul.group_size", "is 48", antiquant_scale=lambda: t(3, 32),
      antiquant_group_size=just(48)),
    w("groups of the whole row", "weight", "npu_weight_quant_batchmatmul.group_size", "is 128",
      antiquant_scale=lambda: t(1, 32), antiquant_group_size=just(128)),
    w("scale of other groups", "weight", "npu_weight_quant_batchmatmul.scale_shape", "antiquant_scale is (4, 32)",
      antiquant_scale=lambda: t(4, 32), antiquant_group_size=just(64)),
    w("offset of another shape", "weight", "npu_weight_quant_batchmatmul.offset_shape", "antiquant_offset is (1,)",
      antiquant_offset=lambda: t(1)),
    w("bias in float32", "weight", "npu_weight_quant_batchmatmul.bias_dtype", "bias is torch.float32",
      bias=lambda: t(32, dtype=FLOAT)),
    w("NZ weight", "weight", "npu_weight_quant_batchmatmul.nz", "weight is FRACTAL_NZ", DUO,
      weight=lambda: nz(128, 32, dtype=I8)),
    w("three dimensions", "weight", "npu_weight_quant_batchmatmul.rank", "x has 3", x=lambda: t(1, 4, 128)),
    w("int8", "pack", "npu_convert_weight_to_int4pack.dtype", "torch.int8", weight=lambda: t(16, 8, dtype=I8)),
    w("12 columns", "pack", "npu_convert_weight_to_int4pack.last_dim", "12, no multiple",
      weight=lambda: t(16, 12, dtype=I32)),
    w("value of 8", "pack", "npu_convert_weight_to_int4pack.values", "from -8 to 8",
      weight=lambda: ints(-8, 8, 0, 0, 0, 0, 0, 0).view(1, 8)),
    w("scales of other channels", "quantize", "npu_quantize.scale_length", "scales is (32,)",
      scales=lambda: t(32, dtype=FLOAT)),
    w("int64 results", "quantize", "npu_quantize.target", "dtype is 4", dtype=just(4)),
]  # fmt: skip

OTHER_CASES = [
    w("permutation", "transpose", "npu_transpose_batchmatmul.perm_x1", "perm_x1 is [2, 1, 0]",
      perm_x1=just([2, 1, 0])),
    w("order of results", "transpose", "npu_transpose_batchmatmul.perm_y", "perm_y is [0, 1, 2]",
      perm_y=just([0, 1, 2])),
    w("24 columns", "transpose", "npu_transpose_batchmatmul.multiples", "24, no multiple of 16",
      weight=lambda: t(8, 64, 24)),
    w("bias", "transpose", "npu_transpose_batchmatmul.bias", "bias is given", bias=lambda: t(32)),
    w("format 5", "cast", "npu_format_cast.format", "acl_format is 5", acl_format=just(5)),
    w("float32 to NZ", "cast", "npu_format_cast.float32_nz", "input is torch.float32",
      input=lambda: t(32, 64, dtype=FLOAT)),
    w("customize_dtype", "cast", "npu_format_cast.customize_dtype", "customize_dtype is given", DUO,
      customize_dtype=just(3)),
    w("one column in NZ", "mm", "matmul.nz_vector", "mat2 is FRACTAL_NZ", DUO, mat2=lambda: nz(64, 1)),
    w("product in bfloat16", "mm", "chip.bfloat16", "self is torch.bfloat16", DUO, self=lambda: t(4, 64, dtype=BF16),
      mat2=lambda: t(64, 32, dtype=BF16)),
    w("k in int64", "sampling", "npu_top_k_top_p.k_dtype", "k is torch.int64", k=lambda: ints(1, 64, dtype=I64)),
    w("k of 0", "sampling", "npu_top_k_top_p.k", "k holds 0", k=lambda: ints(0, 64)),
    w("k above the vocabulary", "sampling", "npu_top_k_top_p.k", "to 65", k=lambda: ints(1, 65)),
    w("p in float16", "sampling", "npu_top_k_top_p.p_dtype", "p is torch.float16", p=lambda: t(2)),
    w("p above 1", "sampling", "npu_top_k_top_p.p", "2.0", p=lambda: t(2, dtype=FLOAT) + 2),
    w("p of other rows", "sampling", "npu_top_k_top_p.shape", "p.size(0) is 3", p=lambda: t(3, dtype=FLOAT)),
    w("three dimensions", "sampling", "npu_top_k_top_p.rank", "logits has 3", logits=lambda: t(1, 2, 64, dtype=FLOAT)),
    w("not on the Duo", "sampling", "npu_top_k_top_p.product", "does not list this chip", DUO),
    w("maximum", "all_reduce", "npu_mm_all_reduce_base.reduce_op", "'max'", reduce_op=just("max")),
    w("inner dimensions", "all_reduce", "npu_mm_all_reduce_base.reduction", "x1.size(-1) is 128",
      x1=lambda: t(4, 128)),
    w("int8 weight without scale", "all_reduce", "npu_mm_all_reduce_base.scales", "without antiquant_scale",
      x2=lambda: t(256, 32, dtype=I8)),
    w("not on the Duo", "all_reduce", "npu_mm_all_reduce_base.product", "does not list this chip", DUO),
    w("k of 128", "reduce_scatter", "npu_mm_reduce_scatter_base.reduction", "128, not in", input=lambda: t(4, 128),
      x2=lambda: t(128, 32)),
    w("rows of no rank", "reduce_scatter", "npu_mm_reduce_scatter_base.rows", "5, no multiple of 2",
      input=lambda: t(5, 256)),
    w("three ranks", "reduce_scatter", "npu_mm_reduce_scatter_base.world_size", "world_size is 3", world_size=just(3)),
    w("experts of no rank", "dispatch", "npu_moe_distribute.experts", "15 experts on 8", moe_expert_num=just(15)),
    w("expert twice in a row", "dispatch", "npu_moe_distribute.expert_values", "twice",
      expert_ids=lambda: ints(0, 0, 2, 3, 4, 5, 6, 7).view(4, 2)),
    w("three ranks", "all_gather", "npu_all_gather_base_mm.world_size", "world_size is 3", world_size=just(3)),
    w("other operand gathered", "all_gather", "npu_all_gather_base_mm.gather_index", "is 1", gather_index=just(1)),
    w("weight in int8", "all_gather", "npu_all_gather_base_mm.dtypes", "x2 is torch.int8",
      x2=lambda: t(256, 32, dtype=I8)),
    w("skip2 alone", "finalize", "npu_moe_finalize_routing.skips", "skip1 is not given", skip2=lambda: t(4, 64)),
    w("weights in float32", "finalize", "npu_moe_finalize_routing.dtypes", "scales is torch.float32",
      scales=lambda: t(4, 2, dtype=FLOAT)),
    w("mode 4", "finalize", "npu_moe_finalize_routing.mode", "drop_pad_mode is 4", drop_pad_mode=just(4)),
    w("scatter indices", "re_routing", "npu_moe_re_routing.types", "idx_type is 1", idx_type=just(1)),
    w("position beyond", "rope_in_place", "_npu_rotary_embedding.positions", "positions holds 16",
      positions=lambda: ints(0, 1, 16, dtype=I64)),
    w("tokens of other positions", "rope_in_place", "_npu_rotary_embedding.shape", "query is (4, 256)",
      query=lambda: t(4, 256)),
    w("k in int64", "sample", "npu_top_k_top_p_sample.k_dtype", "top_k is torch.int64",
      top_k=lambda: ints(1, 2, dtype=I64)),
    w("weights in float16", "combine", "npu_moe_distribute_combine_v2.scales", "expert_scales is torch.float16",
      expert_scales=lambda: t(4, 2)),
    w("rank beyond", "combine", "npu_moe_distribute.rank", "ep_rank_id is 8 of 8", ep_rank_id=just(8)),
    w("9 ranks", "combine", "npu_moe_distribute.world_size", "ep_world_size is 9", ep_world_size=just(9)),
    w("20 experts a token", "dispatch", "npu_moe_distribute_dispatch_v2.top_k", "20",
      expert_ids=lambda: t(4, 20, dtype=I32)),
]  # fmt: skip

TORCH_CASES = [
    w("eps for epsilon", "rms", "", "eps", eps=just(1e-5)),
    w("num_query_heads of the second version", "prefill", "", "num_query_heads", num_query_heads=just(8)),
    w("block_tables for block_table", "decode", "", "block_tables", block_tables=just(None)),
    w("num_experts for expert_num", "routing", "", "num_experts", num_experts=just(4)),
    w("output_dtype as a name", "matmul", "", "output_dtype", output_dtype=just("float16")),
    w("a tensor for the list of x", "grouped", "", "", x=just(3)),
]  # fmt: skip

CASES = NORM_CASES + ROTARY_CASES + ATTENTION_CASES + CACHE_CASES + MOE_CASES + QUANT_CASES + OTHER_CASES + TORCH_CASES


@dataclass(frozen=True)
class Right:
    """A call that is near a border, and right."""

    id: str
    base: str
    changes: Callable[[], Arguments]
    chips: tuple[str, ...]


def r(id: str, base: str, chips: tuple[str, ...] = (), /, **changes: Callable[[], Any]) -> Right:
    return Right(id, base, lambda: {name: make() for name, make in changes.items()}, chips or BASES[base].chips)


RIGHT = [r("as it is", name) for name in BASES] + [
    r("gamma in float32", "rms", A2, gamma=lambda: t(64, dtype=FLOAT)),
    r("gamma of two dimensions", "rms", input=lambda: t(2, 4, 64), gamma=lambda: t(4, 64)),
    r("row of 32 bytes", "rms", DUO, input=lambda: t(4, 16), gamma=lambda: t(16)),
    r("row of 16 bytes", "rms", A2, input=lambda: t(4, 8), gamma=lambda: t(8)),
    r("strided input", "add_rms", x1=lambda: t(4, 128)[:, :64]),
    r("middle dimension", "swiglu", input=lambda: t(2, 4, 3), dim=just(1)),
    r("row of 8192", "swiglu_quant", x=lambda: t(2, 8192), smooth_scales=just(None), group_index=just(None)),
    r("head of 64", "rope", query=lambda: t(1, 5, 8, 64), key=lambda: t(1, 5, 2, 64), cos=lambda: t(1, 5, 1, 64),
      sin=lambda: t(1, 5, 1, 64)),
    r("TND", "rope", query=lambda: t(5, 8, 128), key=lambda: t(5, 2, 128), cos=lambda: t(5, 1, 128),
      sin=lambda: t(5, 1, 128), layout=just("TND")),
    r("factors of the whole shape", "rotary_mul", r1=lambda: t(1, 5, 8, 64), r2=lambda: t(1, 5, 8, 64)),
    r("block of 1024", "packed", key=lambda: t(4, 1024, 256), value=lambda: t(4, 1024, 256), block_size=just(1024)),
    r("head of 64 in TND", "packed", query=lambda: t(5, 8, 64), key=lambda: t(4, 16, 128),
      value=lambda: t(4, 16, 128)),
    r("mask of three dimensions", "packed", atten_mask=lambda: t(1, 2048, 2048, dtype=I8)),
    r("block of 16 in decode", "decode", key=lambda: t(32, 16, 128), value=lambda: t(32, 16, 128), block_size=just(16),
      block_table=lambda: ints(*range(26)).view(2, 13), actual_seq_lengths_kv=just([200, 10])),
    r("block of 512", "decode", key=lambda: t(4, 512, 128), value=lambda: t(4, 512, 128), block_size=just(512)),
    r("sparse_mode that decode ignores", "decode", sparse_mode=just(3)),
    r("cache by heads in BNSD", "decode", query=lambda: t(2, 8, 1, 64), key=lambda: t(4, 2, 128, 64),
      value=lambda: t(4, 2, 128, 64), input_layout=just("BNSD")),
    r("full mask", "prefill", atten_mask=lambda: t(2, 1, 5, 5, dtype=BOOL)),
    r("causal", "prefill", atten_mask=lambda: t(2048, 2048, dtype=BOOL), sparse_mode=just(3)),
    r("head of 72", "prefill", query=lambda: t(2, 8, 5, 72), key=lambda: t(2, 2, 5, 72), value=lambda: t(2, 2, 5, 72)),
    r("one length for all", "prefill", actual_seq_lengths_kv=just([5])),
    r("128 heads", "latent", query=lambda: t(2, 128, 1, 512), query_rope=lambda: t(2, 128, 1, 64),
      num_query_heads=just(128)),
    r("slots in int64", "scatter", slot_mapping=lambda: ints(5, 63, 0, dtype=I64)),
    r("NZ cache", "scatter", key_cache=lambda: t(4, 8, 16, 16), value_cache=lambda: t(4, 8, 16, 16),
      cache_mode=just("PA_NZ")),
    r("last slot", "latent_cache", index=lambda: ints(31, 2, 9, 0, dtype=I64)),
    r("256 experts in 8 groups", "gate", x=lambda: t(4, 256, dtype=FLOAT), bias=lambda: t(256, dtype=FLOAT), k=just(8),
      k_group=just(4)),
    r("all of the chosen experts", "gate", k=just(16)),
    r("1024 tokens", "gate_softmax", x=lambda: t(1024, 64)),
    r("1025 tokens", "gate_softmax", A2, x=lambda: t(1025, 64)),
    r("every expert", "gate_softmax", k=just(64)),
    r("experts of one rank", "routing", A2, expert_num=just(8), active_expert_range=just([4, 8]),
      expert_idx=lambda: ints(0, 7, 2, 3, 0, 1, 2, 3).view(4, 2)),
    r("no rows of the first experts", "grouped", group_list=lambda: ints(0, 0, 6, dtype=I64)),
    r("counts", "grouped", group_list=lambda: ints(1, 3, 2, dtype=I64), group_list_type=just(1)),
    r("rows that no expert takes", "grouped", group_list=lambda: ints(1, 2, 3, dtype=I64)),
    r("transposed weight", "grouped", weight=lambda: [t(3, 32, 64).transpose(1, 2)]),
    r("30 columns", "grouped", A2, weight=lambda: [t(3, 64, 30)]),
    r("scale of all columns", "matmul", scale=lambda: t(1, dtype=FLOAT)),
    r("token scales", "matmul", pertoken_scale=lambda: t(4, dtype=FLOAT)),
    r("int32 bias", "matmul", bias=lambda: t(32, dtype=I32)),
    r("transposed NZ weight", "matmul", x2=lambda: nz(32, 64, dtype=I8).t()),
    r("groups of 32", "weight", antiquant_scale=lambda: t(4, 32), antiquant_group_size=just(32)),
    r("groups of 96", "weight", antiquant_scale=lambda: t(2, 32), antiquant_group_size=just(96)),
    r("ends of int4", "pack", weight=lambda: ints(-8, 7, 0, 0, 0, 0, 0, 0).view(1, 8)),
    r("NZ weight", "mm", mat2=lambda: nz(64, 32)),
    r("block of 64", "paged_duo", key_cache=lambda: nz(8, 16, 64, 16), value_cache=lambda: nz(8, 16, 64, 16),
      block_table=lambda: ints(*range(8)).view(2, 4)),
]  # fmt: skip


def on_its_chips(cases: Sequence[Wrong | Right]) -> list[Any]:
    return [pytest.param(case, id=f"{case.base}: {case.id}", marks=pytest.mark.chip(*case.chips)) for case in cases]


@pytest.fixture
def simulator() -> Overrides:
    return install(runtime())


def arguments_of(case: Wrong | Right) -> Arguments:
    return {**BASES[case.base].arguments(), **case.changes()}


def bind(operator: str, arguments: Arguments) -> Arguments:
    """The arguments as the dispatcher would see them."""
    schema = overload(operator)._schema
    return {argument.name: arguments.get(argument.name, argument.default_value) for argument in schema.arguments}


def hold(simulator: Overrides, operator: str, arguments: Arguments) -> None:
    """A call against the table alone: first what the device's tensors show, then their values."""
    bound = bind(operator, arguments)
    simulator.rules.check(operator, bound)
    host = {name: simulator.to_host(value) for name, value in bound.items()}
    simulator.rules.check(operator, host, of_values=True)


def call(simulator: Overrides, case: Wrong | Right) -> None:
    """Through the dispatcher; where the operator has no semantics here, against the table alone."""
    operator, arguments = BASES[case.base].operator, arguments_of(case)
    if operator in simulator.names or (isinstance(case, Wrong) and not case.rule):
        overload(operator)(**arguments)
    else:
        hold(simulator, operator, arguments)


@pytest.mark.parametrize("case", on_its_chips(CASES))
def test_a_wrong_call_is_refused_by_its_rule(case: Wrong, chip: str, simulator: Overrides) -> None:
    expected: tuple[type[Exception], ...] = (RuleBroken,) if case.rule else (RuntimeError, TypeError)
    with pytest.raises(expected) as caught:
        call(simulator, case)
    assert case.found in str(caught.value)
    if case.rule:
        assert isinstance(caught.value, RuleBroken)
        assert caught.value.rule == case.rule
        message = str(caught.value)
        assert BASES[case.base].operator in message
        assert caught.value.source in message
        assert chip in message


@pytest.mark.parametrize("case", on_its_chips(RIGHT))
def test_a_right_call_is_not_refused(case: Right, simulator: Overrides) -> None:
    hold(simulator, BASES[case.base].operator, arguments_of(case))


def test_every_wrong_call_differs_from_a_right_one_only_where_it_is_wrong() -> None:
    assert len(CASES) >= 130
    assert len(RIGHT) >= 30
    assert {case.base for case in CASES} <= set(BASES)
    assert len({(case.base, case.id) for case in CASES}) == len(CASES)


def refused_by_fake_tensors(case: Wrong) -> bool:
    """Whether the schema or the meta function refuses the call. An operator without a meta function refuses nothing."""
    # Outside inference mode, overrides at the autograd key would see the fake tensors.
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            overload(BASES[case.base].operator)(**arguments_of(case))
        except (UnsupportedOperatorException, NotImplementedError):
            return False
        except Exception:
            return True
    return False


@contextmanager
def kernels_alone(simulator: Overrides, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch_npu's own kernels against the recorder: no rules, no values."""
    with monkeypatch.context() as patch:
        patch.setattr(simulator.rules, "check", lambda *_, **__: None)
        patch.setattr(Operator, "_run_or_capture", lambda *_: None)
        yield


def refused_by_kernel(simulator: Overrides, case: Wrong, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch_npu's kernel refuses the call; one that cannot run here refuses nothing."""
    golden = load_golden().get(BASES[case.base].operator)
    if golden is not None and not golden.native and case.rule:
        return False
    arguments = arguments_of(case)
    with kernels_alone(simulator, monkeypatch):
        simulator.runtime.enter()
        try:
            overload(BASES[case.base].operator)(**arguments)
        except Exception:
            return True
        finally:
            simulator.runtime.leave()
    return False


def test_neither_fake_tensors_nor_kernels_refuse_what_the_rules_refuse(
    chip: str, simulator: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [case for case in CASES if chip in case.chips]
    for case in wrong:
        with pytest.raises((RuleBroken, RuntimeError, TypeError)):
            call(simulator, case)
    fake = [case for case in wrong if refused_by_fake_tensors(case)]
    kernel = [case for case in wrong if refused_by_kernel(simulator, case, monkeypatch)]
    print(f"{len(wrong)} wrong calls; fake tensors refuse {len(fake)}, torch_npu's kernels {len(kernel)}")
    assert len(fake) * 3 <= len(wrong)
    assert len(kernel) * 3 <= len(wrong)
