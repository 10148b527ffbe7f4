"""Where weights wait that a kernel keeps in a layout of its own."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Buffers that weights pass through on their way into a kernel's layout.

    They are used again and again, for the first touch of fresh memory costs more than the copy. Those that wait take no
    more than twice the largest: a file may hold all codes before the first scale, and then all are taken at once.

    Attributes:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []
        self._taken: dict[int, Tensor] = {}
        self._largest = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of a shape and dtype, with whatever it held before."""
        size = shape.numel() * dtype.itemsize
        fitting = [number for number, buffer in enumerate(self._free) if len(buffer) >= size]
        best = min(fitting, key=lambda number: len(self._free[number]), default=None)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device) if best is None else self._free.pop(best)
        self._taken[buffer.data_ptr()] = buffer
        self._largest = max(self._largest, len(buffer))
        return buffer[:size].view(dtype).view(shape)

    def give_back(self, tensor: Tensor) -> None:
        """Let the buffer behind a taken tensor serve again."""
        self._free.append(self._taken.pop(tensor.data_ptr()))
        self._free.sort(key=len)
        while sum(map(len, self._free)) > 2 * self._largest:
            self._free.pop(0)
