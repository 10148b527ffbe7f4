"""Rotary position embeddings."""

from __future__ import annotations

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """``(-second half, first half)`` of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    """``(-x1, x0, -x3, x2, …)`` of the last dimension."""
    return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    """``x * cos + rotate(x) * sin`` in float32, rounded once."""
    if mode not in ("half", "interleave"):
        raise NoSemantics(f"rotary embedding: argument rotary_mode='{mode}' has no golden semantics")
    wide = x.float()
    turned = rotate_half(wide) if mode == "half" else rotate_pairs(wide)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def interleaved_to_half(x: torch.Tensor) -> torch.Tensor:
    """``(x0, x2, …, x1, x3, …)`` of the last dimension."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


@golden("npu::npu_rotary_mul")
def npu_rotary_mul(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str, rotate: torch.Tensor | None = None
) -> torch.Tensor:
    """Source: op-plugin, torch_npu-npu_rotary_mul.md."""
    if rotate is not None:
        raise NoSemantics("npu_rotary_mul: argument rotate has no golden semantics")
    return rotated(input, r1, r2, rotary_mode)


@golden("npu::npu_apply_rotary_pos_emb")
def npu_apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_mode: str = "half"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes into query and key as well, as the operator does. Source: op-plugin, torch_npu-apply_rotary_pos_emb.md."""
    found = rotated(query, cos, sin, rotary_mode), rotated(key, cos, sin, rotary_mode)
    query.copy_(found[0])
    key.copy_(found[1])
    return found


@golden("npu::npu_interleave_rope")
def npu_interleave_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs are brought apart first, then rotated by halves. Source: op-plugin, torch_npu-npu_interleave_rope.md."""
    return rotated(interleaved_to_half(x), cos, sin, "half")
