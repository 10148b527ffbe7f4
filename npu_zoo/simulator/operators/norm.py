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
