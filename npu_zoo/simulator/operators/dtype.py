"""Casts by torch_npu's own operators, which its release for torch 2.9 uses for ``Tensor.to``."""

from __future__ import annotations

import torch

from npu_zoo.simulator.errors import NoSemantics
from npu_zoo.simulator.golden import golden


@golden("npu::npu_dtype_cast", "npu::_npu_dtype_cast")
def npu_dtype_cast(input: torch.Tensor, dtype: torch.dtype | int, input_dtype: int | None = None) -> torch.Tensor:
    """Source: op-plugin, npu_dtype_cast. Later releases also take numbers, for dtypes that torch does not have."""
    if not isinstance(dtype, torch.dtype) or input_dtype is not None:
        raise NoSemantics(f"npu_dtype_cast: argument dtype={dtype} has no golden semantics; give a torch.dtype")
    return input.to(dtype)
