"""The dense feed-forward layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from npu_zoo.core.errors import WeightsError
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.kernels.table import Stored
from npu_zoo.nn.layer import Layer
from npu_zoo.nn.linear import Linear

FeedForward = Callable[[Tensor, Stored, Stored], Tensor]
"""A kernel's whole feed-forward; see :class:`npu_zoo.nn.kernels.table.LinearKernel`."""


class MLP(Layer):
    """SwiGLU feed-forward (arXiv:2002.05202).

    Args:
        reduce: whether ranks' products are added up here; otherwise the caller does it.

    Raises:
        WeightsError: the activation is not silu.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str, context: BuildContext, *, reduce: bool = True
    ) -> None:
        super().__init__()
        if hidden_act != "silu":
            raise WeightsError(f"the checkpoint's activation is {hidden_act}; this decoder has silu")
        self._kernels = context.kernels
        self._feed_forward: FeedForward | None = getattr(context.kernels.linear, "feed_forward", None)
        rows = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(hidden_size, rows, context, split="rows")
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size}, context, split="columns", reduce=reduce)

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        """[T, hidden_size] to [T, hidden_size]; nothing of the context is needed."""
        if self._feed_forward is not None and self._is_plain:
            return self.down_proj.complete(self._feed_forward(x, self.gate_up_proj.stored, self.down_proj.stored))
        projected: Tensor = self.down_proj(self._kernels.silu_and_mul(self.gate_up_proj(x)))
        return projected

    @functools.cached_property
    def _is_plain(self) -> bool:
        return self.gate_up_proj.quantization is None and self.down_proj.quantization is None
