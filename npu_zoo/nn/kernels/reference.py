"""Every operation in plain torch: the oracle that each other kernel is tested against, and the fallback.

A kernel has the signature of the function or class of the same name here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (arXiv:1910.07467), in float32, rounded before the weight as transformers does.

    Args:
        x: [..., hidden].
        weight: [hidden].
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and the sum, which is the next residual. Shapes as in :func:`rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position, first half against second half (arXiv:2104.09864, the NeoX layout).

    Args:
        query: [T, num_heads, head_dim].
        key: [T, num_kv_heads, head_dim].
        cos, sin: [T, head_dim / 2], in the dtype of the query.
    """
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_and_mul(x: Tensor) -> Tensor:
    """SwiGLU's activation: ``silu(first half) * second half`` of [..., 2 * d], giving [..., d]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Linear:
    """``x @ weight.T``, in two steps, so that a kernel can keep the weight in a layout of its own."""

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Whether :meth:`pack` gives another layout than it is given."""
        return False

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """The stored form of a [out, in] weight; called once, after loading. May return the weight itself."""
        return weight

    @staticmethod
    def apply(x: Tensor, packed: Tensor) -> Tensor:
        """[..., in] times the packed [out, in] weight, giving [..., out]."""
        return F.linear(x, packed)
