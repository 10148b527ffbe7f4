"""Products with a matrix of each head's own, in bfloat16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.nn.kernels.compiled.binding import ADDRESS, COUNT, SIZE, Function
from npu_zoo.nn.kernels.compiled.linear import INPUTS_OF_A_BLOCK

_head_linear = Function("zoo_head_linear", ADDRESS, SIZE, SIZE, SIZE, SIZE, ADDRESS, SIZE, SIZE, ADDRESS, COUNT)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, summed in float32; the matrices are read as they are, once for all tokens."""
    (tokens, heads, inputs), outputs = x.shape, weight.shape[2]
    out = x.new_empty(tokens, heads, outputs)
    if inputs % INPUTS_OF_A_BLOCK:
        x = F.pad(x, (0, -inputs % INPUTS_OF_A_BLOCK))
    elif x.stride(2) != 1:
        x = x.contiguous()
    _head_linear(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        tokens,
        heads,
        weight.contiguous().data_ptr(),
        inputs,
        outputs,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
