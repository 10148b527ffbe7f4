"""Linear layers, one or several of the checkpoint's matrices in each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels.table import apply_parts
from npu_zoo.nn.staging import Staging


class Linear(nn.Module):
    """``x @ weight.T`` without bias.

    Several matrices that take the same input are stacked into one weight, so that one product serves them all.

    Args:
        parts: the checkpoint's name of each stacked matrix (``q_proj``) and its number of rows.
        padding: rows of zeros after them, which no checkpoint has.
        halves: by part, ``(first, second)`` rows of each head: :meth:`by_parts` gives the heads' first rows and their
            second rows apart, each contiguous in the weight.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        context: BuildContext,
        padding: int = 0,
        halves: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        self._padding = padding
        self._halves = dict(halves or {})
        self._outputs = tuple(size for name, rows in self.parts.items() for size in self._output_rows(name, rows))
        self._kernel = context.kernels.linear
        rows = sum(parts.values()) + padding
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=context.dtype), requires_grad=False)
        self._packed: Tensor | None = None
        self._staging: Staging | None = None

    def checkpoint_views(self) -> tuple[Tensor, ...]:
        """Each part's rows of the weight, in the order of ``parts``, which a loader fills."""
        return torch.split(self.weight, [*self.parts.values(), self._padding])[:-1]

    @property
    def packs(self) -> bool:
        """Whether the kernel keeps the weight in a layout of its own, so that the plain one is only passing through."""
        return self._kernel.packs(self.weight.dtype)

    @property
    def stored(self) -> Tensor:
        """The weight as the kernel takes it: packed, once :meth:`pack` was called."""
        return self.weight if self._packed is None else self._packed

    def stage(self, staging: Staging) -> None:
        """Give a weight without storage a buffer to be loaded into; :meth:`pack` gives it back."""
        if self.weight.is_meta:
            weight = staging.take(self.weight.shape, self.weight.dtype)
            self.weight, self._staging = nn.Parameter(weight, requires_grad=False), staging

    def tie(self, weight: nn.Parameter) -> None:
        """Take another layer's [rows, in_features] weight; one that was loaded for this layer does not count."""
        self.weight, self._packed = weight, None

    def pack(self) -> None:
        """Bring the loaded weight into the kernel's layout, once; a layout that copies replaces the weight."""
        if self._packed is not None:
            return
        weight = self.weight.data
        weight[len(weight) - self._padding :].zero_()
        for name, view in zip(self.parts, self.checkpoint_views(), strict=True):
            if name in self._halves:
                _part_heads(view.data, *self._halves[name])
        self._packed = self._kernel.pack(weight)
        if self._packed is not weight:
            self._release()

    def release(self) -> None:
        """Let go of the weight, which another layer holds in a form of its own from now on."""
        self._packed = None
        self._release()

    def _release(self) -> None:
        """Let go of the weight, which is stored in another form, and of the buffer that it was loaded into."""
        weight = self.weight.data
        self.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        if self._staging is not None:
            self._staging.give_back(weight)
            self._staging = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., rows of all parts]."""
        return self._kernel.apply(x, self.stored)

    def by_parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in_features] to [T, rows] of each part, or of each of its halves."""
        return apply_parts(self._kernel, x, self.stored, self._outputs)

    def _output_rows(self, part: str, rows: int) -> tuple[int, ...]:
        first, second = self._halves.get(part, (rows, 0))
        heads = rows // (first + second)
        return (heads * first, heads * second) if second else (rows,)


def _part_heads(weight: Tensor, first: int, second: int) -> None:
    """Bring the first rows of all heads before their second rows, in place."""
    heads = weight.view(-1, first + second, weight.shape[1])
    weight.copy_(torch.cat((heads[:, :first].flatten(0, 1), heads[:, first:].flatten(0, 1))))
