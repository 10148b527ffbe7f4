"""How fast memory is read at most, for floors."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, SIZE, Function

_read = Function("zoo_read", ADDRESS, SIZE, COUNT, result=SIZE)


def read(memory: Tensor) -> int:
    """The sum of a contiguous tensor's words of 32 bits, read 64 bytes at a time by torch's threads."""
    return _read(memory.data_ptr(), memory.nbytes // 64 * 64, torch.get_num_threads())
