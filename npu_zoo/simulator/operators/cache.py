"""The cache of keys and values in blocks: what writes into it, and what reads a sequence out of it."""

from __future__ import annotations

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden
from npu_zoo.simulator.operators.norm import rms
from npu_zoo.simulator.operators.rotary import interleaved_to_half, rotated

FRACTAL = 16
"""Columns of one fractal of the NZ layout, of 16 bits; of eight bits there are twice as many."""

Optional = torch.Tensor | None


def paged_rows(cache: torch.Tensor, blocks: torch.Tensor, length: int, heads: int) -> torch.Tensor:
    """The first ``length`` rows [length, heads, head_size] of a sequence, for fused attention.

    Args:
        cache: [nb, bs, heads*head_size], [nb, heads, bs, head_size] or NZ [nb, heads, head_size/16, bs, 16].
        blocks: the sequence's blocks in order.
        length: rows to read.
        heads: heads of keys and values.
    """
    if cache.dim() == 3:
        rows = cache.reshape(*cache.shape[:2], heads, -1)
    elif cache.dim() == 4:
        rows = cache.transpose(1, 2)
    else:
        rows = cache.permute(0, 3, 1, 2, 4).flatten(3)
    used = blocks[: -(-length // rows.shape[1])].long()
    return rows[used].flatten(0, 1)[:length]


def is_nz(cache: torch.Tensor, heads: int, head_size: int) -> bool:
    """Whether a cache is [nb, heads*head_size/16, bs, 16] rather than [nb, bs, heads, head_size].

    Raises:
        NoSemantics: it is neither.
    """
    if cache.dim() == 4 and tuple(cache.shape[2:]) == (heads, head_size):
        return False
    if cache.dim() == 4 and cache.shape[3] == FRACTAL and cache.shape[1] * FRACTAL == heads * head_size:
        return True
    raise NoSemantics(f"a cache of shape {tuple(cache.shape)} for {heads} heads of {head_size} has no golden semantics")


def write_rows(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, nz: bool) -> None:
    """Write rows [T, heads, head_size] into slots [T] (``block * block_size + offset``); negative slots are skipped.

    Args:
        cache: [nb, bs, heads, head_size], or NZ [nb, .., bs, width] whose axes before ``bs`` and ``width`` together
            make a row.
        rows: what to write.
        slots: where.
        nz: which of the two the cache is.
    """
    kept = slots >= 0
    slots, rows = slots[kept].long(), rows[kept].to(cache.dtype)
    axis = -2 if nz else 1
    block, offset = slots // cache.shape[axis], slots % cache.shape[axis]
    of_slots = cache.movedim(axis, 1)
    of_slots[block, offset] = rows.reshape(len(rows), *of_slots.shape[2:])


@golden("npu::npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    compress_lens: Optional = None,
    compress_seq_offsets: Optional = None,
    seq_lens: Optional = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Source: op-plugin, torch_npu-npu_scatter_pa_kv_cache.md."""
    if any(argument is not None for argument in (compress_lens, compress_seq_offsets, seq_lens)):
        raise NoSemantics("npu_scatter_pa_kv_cache: compression has no golden semantics")
    if key.dim() != 3:
        raise NoSemantics(f"npu_scatter_pa_kv_cache: a key of {key.dim()} dimensions has no golden semantics")
    if cache_mode not in (None, "Norm", "PA_NZ"):
        raise NoSemantics(f"npu_scatter_pa_kv_cache: cache_mode='{cache_mode}' has no golden semantics")
    write_rows(key_cache, key, slot_mapping, nz=cache_mode == "PA_NZ")
    write_rows(value_cache, value, slot_mapping, nz=cache_mode == "PA_NZ")


@golden("npu::npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> None:
    """Write updates at indices, whose last dimension counts the leading ones of the input that it points into.

    Source: op-plugin, torch_npu-npu_scatter_nd_update_.md.
    """
    input[tuple(indices.long().unbind(-1))] = updates


@golden("npu::npu_kv_rmsnorm_rope_cache")
def npu_kv_rmsnorm_rope_cache(
    kv: torch.Tensor,
    gamma: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor,
    k_cache: torch.Tensor,
    ckv_cache: torch.Tensor,
    k_rope_scale: Optional = None,
    c_kv_scale: Optional = None,
    k_rope_offset: Optional = None,
    c_kv_offset: Optional = None,
    v: Optional = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Optional, Optional]:
    """Norm of the latent part, rotation of the rest, both written into their caches.

    Source: op-plugin, torch_npu-npu_kv_rmsnorm_rope_cache.md.
    """
    if v is not None or k_rope_offset is not None or c_kv_offset is not None:
        raise NoSemantics("npu_kv_rmsnorm_rope_cache: arguments v and the offsets have no golden semantics")
    rank = gamma.shape[0]
    wide = kv.float()
    latent = rms(wide[..., :rank], gamma, epsilon)[0]
    rope = rotated(interleaved_to_half(wide[..., rank:]), cos, sin, "half")
    _store(k_cache, rope, index, k_rope_scale, cache_mode)
    _store(ckv_cache, latent, index, c_kv_scale, cache_mode)
    if is_output_kv:
        return k_cache, ckv_cache, rope.to(kv.dtype), latent.to(kv.dtype)
    return k_cache, ckv_cache, None, None


def _store(cache: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, scale: Optional, mode: str) -> None:
    """Write [B, 1, S, D] of float32 into a cache [B, 1, S_max, D] (Norm) or into blocks [nb, bs, 1, D] (PA)."""
    values = rows if scale is None else (rows * scale.float()).round().clamp(-128, 127)
    if mode == "Norm":
        for batch, positions in enumerate(index):
            kept = positions >= 0
            cache[batch, 0, positions[kept].long()] = values[batch, 0, kept].to(cache.dtype)
        return
    if mode not in ("PA", "PA_BNSD", "PA_NZ"):
        raise NoSemantics(f"npu_kv_rmsnorm_rope_cache: argument cache_mode='{mode}' has no golden semantics")
    if mode == "PA_NZ":  # the blocks keep their shape, and hold fractals
        width = FRACTAL * 2 if cache.dtype is torch.int8 else FRACTAL
        cache = cache.view(len(cache), -1, cache.shape[1], width)
    write_rows(cache, values.reshape(-1, 1, values.shape[-1]), index.flatten(), nz=mode == "PA_NZ")
