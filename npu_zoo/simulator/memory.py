"""Device memory seen from the host: every tensor on the device as a CPU tensor over the same bytes."""

from __future__ import annotations

import ctypes

import torch


class DeviceMemory:
    """Views of device memory without a copy.

    Args:
        base: address of the first byte.
        size: bytes, all devices together.
    """

    def __init__(self, base: int, size: int) -> None:
        self._base = base
        # Views made outside inference mode can be written to in and outside of it.
        with torch.inference_mode(False):
            whole = torch.frombuffer((ctypes.c_char * size).from_address(base), dtype=torch.uint8)
            self._by_dtype = {torch.uint8: whole}

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor over the bytes of one on the device: same shape, strides and dtype. No reference is kept."""
        address = tensor.data_ptr()
        if address == 0:  # nothing is allocated for an empty tensor
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        typed = self._typed(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), (address - self._base) // typed.itemsize)

    def _typed(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._by_dtype:
            with torch.inference_mode(False):
                self._by_dtype[dtype] = self._by_dtype[torch.uint8].view(dtype)
        return self._by_dtype[dtype]
