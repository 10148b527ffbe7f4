"""Buffers that outlive a call, because fresh memory costs more than the arithmetic that fills it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_MASK_SIDE = 256


@dataclass
class Workspace:
    """Buffers by name, which grow and are used again; a buffer's content lasts until its next use."""

    dtype: torch.dtype
    device: torch.device
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # else the buffer could not be written outside of that mode
                held = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)

    def copy(self, name: str, source: Tensor) -> Tensor:
        """A contiguous copy."""
        return self.buffer(name, *source.shape).copy_(source)

    def causal_mask(self, size: int) -> Tensor:
        """[size, size]: minus infinity where a query comes before a key, else zero."""
        held = self._buffers.get("causal_mask")
        if held is None or len(held) < size:
            side = max(size, _MASK_SIDE)
            held = torch.full((side, side), -torch.inf, dtype=self.dtype, device=self.device).triu_(1)
            self._buffers["causal_mask"] = held
        return held[:size, :size]
