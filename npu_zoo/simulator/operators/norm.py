"""Normalisations and gated activations."""

from __future__ import annotations

import torch

from npu_zoo.simulator.golden import golden


def rms(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the dimensions of ``gamma``, computed in float32; also the reciprocal root."""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@golden("npu::npu_rms_norm")
def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Source: op-plugin, （beta）torch_npu-npu_rms_norm.md."""
    return rms(input, gamma, epsilon)


@golden("npu::npu_add_rms_norm")
def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of a sum; the third result is the sum. Source: op-plugin, torch_npu-npu_add_rms_norm.md."""
    total = (x1.float() + x2.float()).to(x1.dtype)
    normed, rstd = rms(total, gamma, epsilon)
    return normed, rstd, total


@golden("npu::npu_swiglu")
def npu_swiglu(input: torch.Tensor, dim: int) -> torch.Tensor:
    """``silu(a) * b`` of the two halves. Source: op-plugin, （beta）torch_npu-npu_swiglu.md."""
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)
