"""Sampling."""

from __future__ import annotations

import torch

from npu_zoo.simulator.golden import golden


@golden("npu::npu_top_k_top_p")
def npu_top_k_top_p(logits: torch.Tensor, p: torch.Tensor | None = None, k: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, V] with minus infinity outside of each row's top k and top p.

    Top p keeps the smallest tokens out whose sum of probabilities stays at most ``1 - p``; the best always stays.
    Source: op-plugin, torch_npu-npu_top_k_top_p.md.
    """
    values, order = logits.float().sort(dim=-1, stable=True)  # ascending
    if k is not None:
        kept = k.long().clamp(1, logits.shape[-1])
        threshold = values.gather(1, (logits.shape[-1] - kept)[:, None])
        values = values.masked_fill(values < threshold, float("-inf"))
    if p is not None:
        outside = values.softmax(-1).cumsum(-1) <= (1 - p.float())[:, None]
        outside[:, -1] = False
        values = values.masked_fill(outside, float("-inf"))
    return torch.empty_like(values).scatter_(1, order, values).to(logits.dtype)
