"""Rows: writes into the cache of keys and values."""

from __future__ import annotations

import torch

from npu_zoo.simulator.rules.detect import (
    HALVES,
    INT8,
    INT32,
    INT64,
    dtype_differs,
    dtype_outside,
    elements_outside,
    elements_repeated,
    equals,
    first,
    fractal_nz,
    given,
    not_contiguous,
    not_fractal_nz,
    only_one_of,
    rank_outside,
    shape,
    shape_outside,
    value_outside,
    where,
)  # fmt: skip
from npu_zoo.simulator.rules.table import FRACTAL_NZ, UNDOCUMENTED, Call, Rule, format_of, on

_SCATTER = ("npu::npu_scatter_pa_kv_cache",)
_PAGE = "op-plugin, torch_npu-npu_scatter_pa_kv_cache.md"
_RESHAPE = ("atb::_npu_reshape_and_cache",)
_RESHAPE_TEST = "op-plugin, test/test_custom_ops/test_atb_reshape_and_cache.py"
_LATENT = ("npu::npu_kv_rmsnorm_rope_cache",)
_LATENT_PAGE = "op-plugin, torch_npu-npu_kv_rmsnorm_rope_cache.md"
_UPDATE = ("npu::npu_scatter_nd_update_", "npu::npu_scatter_nd_update")
_UPDATE_PAGE = "op-plugin, torch_npu-npu_scatter_nd_update_.md"

_PAGED_MODES = ("PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ")
_BY_TOKEN = ("PA", "PA_BNSD", "PA_NZ")


def _slots(call: Call) -> int:
    """Slots of a cache: [blocks, block_size, heads, dim], or [blocks, heads * dim / 16, block_size, 16] in NZ."""
    cache = call["key_cache"]
    nz = call.get("cache_mode") == "PA_NZ" or format_of(cache) == FRACTAL_NZ
    return int(cache.shape[0] * cache.shape[2 if nz else 1])


def _nz_slots(call: Call) -> int:
    cache = call["key_cache"]
    lanes = cache.shape[-1] == 32 // cache.element_size() and cache.shape[1] * cache.shape[3] == call["key"][0].numel()
    return int(cache.shape[0] * cache.shape[2 if lanes else 1])


def _token_shapes(call: Call) -> str | None:
    key, value = call["key"], call["value"]
    if key.dim() == value.dim() and key.shape[:-1] == value.shape[:-1]:
        return None
    return f"key is {shape(key)} and value is {shape(value)}"


def _slot_count(name: str, call: Call) -> str | None:
    key, slots = call["key"], call[name]
    if key.dim() != 3 or (slots.dim() == 1 and slots.shape[0] == key.shape[0]):
        return None
    return f"{name} is {shape(slots)} for {key.shape[0]} tokens"


def _norm_cache_shape(call: Call) -> str | None:
    for name in ("key", "value"):
        token, cache = call[name], call[f"{name}_cache"]
        if token.dim() == 3 and cache.dim() == 4 and tuple(cache.shape[2:]) != tuple(token.shape[1:]):
            return f"{name}_cache is {shape(cache)}, its last dimensions are not those of {name} {shape(token)}"
    return None


def _nz_cache_shape(call: Call) -> str | None:
    for name in ("key", "value"):
        token, cache = call[name], call[f"{name}_cache"]
        lanes = 32 // cache.element_size()
        if token.dim() != 3 or cache.dim() != 4:
            continue
        if cache.shape[3] != lanes or cache.shape[1] * lanes != token.shape[1] * token.shape[2]:
            planes = token.shape[1] * token.shape[2] // lanes
            return f"{name}_cache is {shape(cache)}, not [blocks, {planes}, block_size, {lanes}]"
    return None


def _latent_shapes(call: Call) -> str | None:
    kv, cos = call["kv"], call["cos"]
    if kv.dim() != 4 or kv.shape[1] != 1 or kv.shape[3] != 576:
        return f"kv is {shape(kv)}, not [batch, 1, tokens, 576]"
    wanted = (kv.shape[0], 1, kv.shape[2], 64)
    for name in ("cos", "sin"):
        if tuple(call[name].shape) != wanted:
            return f"{name} is {shape(call[name])}, not {wanted}"
    return None if cos.dtype == kv.dtype else f"cos is {cos.dtype}, kv is {kv.dtype}"


def _latent_caches(call: Call) -> str | None:
    k_cache, ckv_cache = call["k_cache"], call["ckv_cache"]
    if k_cache.dim() != 4 or k_cache.shape[3] != 64 or ckv_cache.dim() != 4 or ckv_cache.shape[3] != 512:
        return f"the caches are {shape(k_cache)} and {shape(ckv_cache)}, their last dimensions not 64 and 512"
    heads = 1 if call["cache_mode"] == "Norm" else 2
    ones = k_cache.shape[heads] == 1 and ckv_cache.shape[heads] == 1
    if ones and k_cache.shape[:3] == ckv_cache.shape[:3]:
        return None
    return f"the caches are {shape(k_cache)} and {shape(ckv_cache)} in mode {call['cache_mode']}"


def _latent_index_shape(call: Call) -> str | None:
    kv, index, mode = call["kv"], call["index"], call["cache_mode"]
    if kv.dim() != 4 or mode not in ("Norm", *_BY_TOKEN):
        return None
    wanted = (kv.shape[0], kv.shape[2]) if mode == "Norm" else (kv.shape[0] * kv.shape[2],)
    return None if tuple(index.shape) == wanted else f"index is {shape(index)}, not {wanted} in mode {mode}"


def _latent_slots(call: Call) -> int:
    cache = call["k_cache"]
    return int(cache.shape[2] if call["cache_mode"] == "Norm" else cache.shape[0] * cache.shape[1])


def _latent_repeated(call: Call) -> str | None:
    if call["cache_mode"] != "Norm":
        return elements_repeated("index", ignore_negative=True)(call)
    rows = call["index"]
    repeated = any(row.unique().numel() != row.numel() for row in rows)
    return "index holds an offset more than once within a sequence" if repeated else None


def _latent_quantised(call: Call) -> str | None:
    scaled, caches = call["k_rope_scale"] is not None, (call["k_cache"].dtype, call["ckv_cache"].dtype)
    if scaled and caches != (INT8, INT8):
        return f"scales are given and the caches are {caches[0]} and {caches[1]}, not torch.int8"
    return f"the caches are {caches[0]} and {caches[1]} without scales" if not scaled and INT8 in caches else None


def _update_shape(call: Call) -> str | None:
    target, indices, updates = call["input"], call["indices"], call["updates"]
    depth = indices.shape[-1] if indices.dim() else 0
    if indices.dim() < 2 or depth > target.dim():
        return f"indices is {shape(indices)} for an input {shape(target)}"
    wanted = tuple(indices.shape[:-1]) + tuple(target.shape[depth:])
    return None if tuple(updates.shape) == wanted else f"updates is {shape(updates)}, not {wanted}"


def _update_values(call: Call) -> str | None:
    indices, sizes = call["indices"], call["input"].shape
    for axis in range(indices.shape[-1]):
        column = indices[..., axis]
        if column.numel() and not (int(column.min()) >= 0 and int(column.max()) < sizes[axis]):
            return f"indices[..., {axis}] is not in [0, {sizes[axis]})"
    return None


_SLOTS = (INT32, INT64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)

_SCATTER_RULES = [
    Rule(
        "npu_scatter_pa_kv_cache.dtype", _SCATTER, "another dtype", on(), f"{_PAGE}, key",
        dtype_outside(("key",), (*HALVES, torch.float32, INT8, torch.int16, INT32, *_UNSIGNED)),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.dtypes", _SCATTER, "tokens and caches of different dtypes", on(),
        f"{_PAGE}, constraints", dtype_differs("key", "value", "key_cache", "value_cache"),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.cache_mode", _SCATTER, "another cache_mode", on(), f"{_PAGE}, cache_mode",
        value_outside("cache_mode", None, "Norm", "PA_NZ"),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.contiguous", _SCATTER, "tensors that are not contiguous", on(),
        f"{_PAGE}, constraints", not_contiguous("key", "value", "key_cache", "value_cache", "slot_mapping"),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.rank", _SCATTER, "tokens or caches with other dimensions", on(),
        f"{_PAGE}, key, key_cache",
        first(
            rank_outside("key", 3, 4), rank_outside("value", 3, 4), rank_outside("key_cache", 4),
            rank_outside("value_cache", 4),
        ),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.shape", _SCATTER, "keys and values of different numbers", on(),
        f"{_PAGE}, constraints", _token_shapes,
    ),
    Rule(
        "npu_scatter_pa_kv_cache.format", _SCATTER, "an NZ cache in mode Norm", on(), f"{_PAGE}, cache_mode",
        where(equals("cache_mode", None, "Norm"), fractal_nz("key_cache", "value_cache")),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.cache_shape", _SCATTER, "a cache of other heads or head dimensions", on(),
        f"{_PAGE}, key_cache", where(equals("cache_mode", None, "Norm"), _norm_cache_shape),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.nz_cache_shape", _SCATTER, "mode PA_NZ with a cache of another shape", on(),
        f"{_PAGE}, cache_mode; op-plugin, torch_npu-npu_fused_infer_attention_score.md (NZ caches)",
        where(equals("cache_mode", "PA_NZ"), _nz_cache_shape),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.slot_dtype", _SCATTER, "slots that are neither int32 nor int64", on(),
        f"{_PAGE}, slot_mapping", dtype_outside(("slot_mapping",), _SLOTS),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.slot_count", _SCATTER, "another number of slots than tokens", on(),
        f"{_PAGE}, slot_mapping", lambda call: _slot_count("slot_mapping", call),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.lens_dtype", _SCATTER, "lengths of another dtype than the slots", on(),
        f"{_PAGE}, constraints", dtype_differs("slot_mapping", "compress_lens", "compress_seq_offsets", "seq_lens"),
    ),
    Rule(
        "npu_scatter_pa_kv_cache.slots", _SCATTER, "slots outside the cache", on(), f"{_PAGE}, constraints",
        where(lambda call: call["key"].dim() == 3, elements_outside("slot_mapping", 0, _slots)), of_values=True,
    ),
    Rule(
        "npu_scatter_pa_kv_cache.unique", _SCATTER, "a slot that is used twice", on(), f"{_PAGE}, constraints",
        where(lambda call: call["key"].dim() == 3, elements_repeated("slot_mapping")), of_values=True,
    ),
]  # fmt: skip

_RESHAPE_RULES = [
    Rule(
        "_npu_reshape_and_cache.slot_dtype", _RESHAPE, "slots that are not int32", on(), _RESHAPE_TEST,
        dtype_outside(("slot_indices",), (INT32,)),
    ),
    Rule(
        "_npu_reshape_and_cache.slot_count", _RESHAPE, "another number of slots than tokens", on(), _RESHAPE_TEST,
        lambda call: _slot_count("slot_indices", call),
    ),
    Rule(
        "_npu_reshape_and_cache.shape", _RESHAPE, "keys and values of different numbers", on(), _RESHAPE_TEST,
        _token_shapes,
    ),
    Rule(
        "_npu_reshape_and_cache.dtypes", _RESHAPE, "tokens and caches of different dtypes", on(), _RESHAPE_TEST,
        first(dtype_differs("key", "key_cache"), dtype_differs("value", "value_cache")),
    ),
    Rule(
        "_npu_reshape_and_cache.format", _RESHAPE, "a cache that is not FRACTAL_NZ", on("ascend310p"),
        "vllm-ascend, vllm_ascend/_310p/attention/attention_v1.py, model_runner_310p.py (the cache is FRACTAL_NZ)",
        not_fractal_nz("key_cache", "value_cache"),
    ),
    Rule(
        "_npu_reshape_and_cache.cache_shape", _RESHAPE, "a cache of another shape", on(), _RESHAPE_TEST,
        lambda call: _nz_cache_shape(call) if format_of(call["key_cache"]) == FRACTAL_NZ else _norm_cache_shape(call),
    ),
    Rule(
        "_npu_reshape_and_cache.slots", _RESHAPE, "slots outside the cache", on(), _RESHAPE_TEST,
        elements_outside("slot_indices", -(1 << 31), _nz_slots), of_values=True,
    ),
    Rule(
        "_npu_reshape_and_cache.unique", _RESHAPE, "a slot that is used twice", on(), _RESHAPE_TEST,
        elements_repeated("slot_indices", ignore_negative=True), of_values=True,
    ),
]  # fmt: skip

_LATENT_RULES = [
    Rule(
        "npu_kv_rmsnorm_rope_cache.dtype", _LATENT, "an input that is neither float16 nor bfloat16", on(),
        f"{_LATENT_PAGE}, kv, gamma, cos, sin", dtype_outside(("kv", "gamma", "cos", "sin"), HALVES),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.shape", _LATENT, "other dimensions than 512 + 64", on(),
        f"{_LATENT_PAGE}, kv, cos, sin", _latent_shapes,
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.gamma_shape", _LATENT, "a gamma of another length than 512", on(),
        f"{_LATENT_PAGE}, gamma", shape_outside("gamma", (512,)),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.cache_mode", _LATENT, "another cache_mode", on(), f"{_LATENT_PAGE}, cache_mode",
        value_outside("cache_mode", "Norm", *_PAGED_MODES),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.cache_shape", _LATENT, "caches of another shape", on(),
        f"{_LATENT_PAGE}, cache_mode", _latent_caches,
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.index_dtype", _LATENT, "an index that is not int64", on(),
        f"{_LATENT_PAGE}, index", dtype_outside(("index",), (INT64,)),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.index_shape", _LATENT, "an index of another shape", on(),
        f"{_LATENT_PAGE}, cache_mode", _latent_index_shape,
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.scales", _LATENT, "one of the two scales", on(), f"{_LATENT_PAGE}, constraints",
        only_one_of("k_rope_scale", "c_kv_scale"),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.quantised", _LATENT, "scales without int8 caches, or the reverse", on(),
        f"{_LATENT_PAGE}, constraints", _latent_quantised,
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.scale_dtype", _LATENT, "scales that are not float32", on(),
        f"{_LATENT_PAGE}, k_rope_scale, c_kv_scale", dtype_outside(("k_rope_scale", "c_kv_scale"), (torch.float32,)),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.offsets", _LATENT, "asymmetric quantisation", on(), f"{_LATENT_PAGE}, constraints",
        given("k_rope_offset", "c_kv_offset"),
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.unique", _LATENT, "an index that is used twice", on(),
        f"{_LATENT_PAGE}, constraints", where(equals("cache_mode", "Norm", *_BY_TOKEN), _latent_repeated),
        of_values=True,
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.padding", _LATENT, "an index of -1", on("ascend910b", value=UNDOCUMENTED),
        f"{_LATENT_PAGE}, constraints; vllm-ascend, vllm_ascend/attention/mla_v1.py pads with PAD_SLOT_ID",
        where(equals("cache_mode", *_BY_TOKEN), elements_outside("index", 0, lambda call: 1 << 62)), of_values=True,
    ),
    Rule(
        "npu_kv_rmsnorm_rope_cache.slots", _LATENT, "an index outside the cache", on(), f"{_LATENT_PAGE}, cache_mode",
        where(equals("cache_mode", "Norm", *_BY_TOKEN), elements_outside("index", -1, _latent_slots)), of_values=True,
    ),
]  # fmt: skip

_UPDATE_RULES = [
    Rule(
        "npu_scatter_nd_update.dtypes", _UPDATE, "updates of another dtype", on(), f"{_UPDATE_PAGE}, updates",
        dtype_differs("input", "updates"),
    ),
    Rule(
        "npu_scatter_nd_update.index_dtype", _UPDATE, "indices that are neither int32 nor int64", on(),
        f"{_UPDATE_PAGE}, indices", dtype_outside(("indices",), _SLOTS),
    ),
    Rule(
        "npu_scatter_nd_update.dtype_310p", _UPDATE, "another dtype than float32, float16 or bool", on("ascend310p"),
        f"{_UPDATE_PAGE}, input", dtype_outside(("input",), (torch.float32, torch.float16, torch.bool)),
    ),
    Rule(
        "npu_scatter_nd_update.shape", _UPDATE, "updates of another shape", on(), f"{_UPDATE_PAGE}, constraints",
        _update_shape,
    ),
    Rule(
        "npu_scatter_nd_update.indices", _UPDATE, "indices outside the input", on(), f"{_UPDATE_PAGE}, indices",
        _update_values, of_values=True,
    ),
]  # fmt: skip

RULES: list[Rule] = _SCATTER_RULES + _RESHAPE_RULES + _LATENT_RULES + _UPDATE_RULES
