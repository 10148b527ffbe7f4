"""The kernel for Ascend's chips, on torch_npu's fused operator (Ascend/op-plugin, torch_npu-npu_rms_norm)."""

from __future__ import annotations

import torch_npu
from torch import Tensor


def head_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`npu_zoo_qwen3.kernels.head_rms_norm`; one launch, which norms over the dimensions of the weight."""
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, eps)[0]
    return normed
