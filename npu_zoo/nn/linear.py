"""Linear layers, one or several of the checkpoint's matrices in each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from npu_zoo.core.errors import HardwareError, WeightsError
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels.table import Product, Stored, apply_parts
from npu_zoo.nn.quantization import Quantization, require_shapes, split_parts, stacked_shape
from npu_zoo.nn.staging import Staging


class Linear(nn.Module):
    """``x @ weight.T`` without bias.

    Several matrices that take the same input are stacked into one weight, so that one product serves them all.
    A quantized layer holds the checkpoint's codes and scales in place of ``weight``; see :meth:`quantize`.

    Attributes:
        quantizable: whether a quantized checkpoint has this layer quantized.
        quantization: how it is quantized; None where its weight is plain.

    Args:
        parts: the checkpoint's name of each stacked matrix (``q_proj``) and its number of rows.
        padding: rows of zeros after them, which no checkpoint has.
        halves: by part, ``(first, second)`` rows of each head: :meth:`by_parts` gives the heads' first rows and their
            second rows apart, each contiguous in the weight.
    """

    quantizable = True

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
        self.quantization: Quantization | None = None
        self._padding = padding
        self._halves = dict(halves or {})
        self._outputs = tuple(size for name, rows in self.parts.items() for size in self._output_rows(name, rows))
        self._kernel = context.kernels.linear
        self._product: Product = self._kernel
        self._in_features, self._dtype = in_features, context.dtype
        rows = sum(parts.values()) + padding
        self._tensors: tuple[str, ...] = ("weight",)
        self.weight = _parameter(torch.empty(rows, in_features, dtype=context.dtype))
        self._packed: Stored | None = None
        self._staging: Staging | None = None

    def quantize(self, quantization: Quantization) -> None:
        """Hold a quantized weight from now on; called before anything is allocated.

        Raises:
            WeightsError: the checkpoint's groups do not fit the layer.
            HardwareError: the kernel does not take its shape.
        """
        rows, config = sum(self.parts.values()), quantization.config
        try:
            tensors = quantization.method.tensors(rows, self._in_features)
        except WeightsError as error:
            raise WeightsError(f"{self._describe(config)}: {error}") from None
        device = self.weight.device
        del self.weight
        for name, (shape, dtype) in tensors.items():
            shape = stacked_shape(name, shape, len(self.parts))
            setattr(self, name, _parameter(torch.empty(shape, dtype=dtype, device=device)))
        self.quantization, self._product, self._tensors = quantization, quantization.linear, tuple(tensors)
        self.require(quantization.linear)

    def require(self, kernel: object) -> None:
        """Ask a kernel whether it takes this layer's quantized weight.

        Raises:
            HardwareError: it does not; says what it takes.
        """
        check = getattr(kernel, "require", None)
        if check is None or self.quantization is None:
            return
        config, rows = self.quantization.config, sum(self.parts.values())
        try:
            check(rows, self._in_features, None if config.group_size == self._in_features else config.group_size)
        except HardwareError as error:
            raise HardwareError(f"{self._describe(config)}: {error}") from None

    def _describe(self, config: QuantizationConfig) -> str:
        return f"{'/'.join(self.parts)} of {sum(self.parts.values())} x {self._in_features} in {config.scheme}"

    def checkpoint_views(self) -> dict[str, Tensor]:
        """What a loader fills: views of each part's tensors, by names such as ``q_proj.weight``."""
        rows = (*self.parts.values(), self._padding)
        return {
            f"{part}.{name}": view
            for name in self._tensors
            for part, view in zip(self.parts, split_parts(name, getattr(self, name), rows), strict=False)
        }

    @property
    def packs(self) -> bool:
        """Whether the kernel keeps the weight in a layout of its own, so that the plain one is only passing through."""
        return self.quantization is not None or self._kernel.packs(self.weight.dtype)

    @property
    def stored(self) -> Stored:
        """The weight as the kernel takes it: packed, once :meth:`pack` was called."""
        return self.weight if self._packed is None else self._packed

    def stage(self, staging: Staging) -> None:
        """Give tensors without storage buffers to be loaded into; :meth:`pack` gives them back."""
        for name in self._tensors:
            tensor = getattr(self, name)
            if tensor.is_meta:
                setattr(self, name, _parameter(staging.take(tensor.shape, tensor.dtype)))
                self._staging = staging

    def tie(self, weight: nn.Parameter) -> None:
        """Take another layer's [rows, in_features] weight; one that was loaded for this layer does not count."""
        self.weight, self._packed = weight, None

    def pack(self) -> None:
        """Bring the loaded weight into the kernel's layout, once; a layout that copies replaces the weight."""
        if self._packed is not None:
            return
        for name, view in self.checkpoint_views().items():
            part = name.partition(".")[0]
            if part in self._halves and view.dim() == 2:
                _part_heads(view.data, *self._halves[part])
        if self.quantization is not None:
            self._packed = self._pack_quantized(self.quantization)
            self._release()
            return
        weight = self.weight.data
        weight[len(weight) - self._padding :].zero_()
        self._packed = self._kernel.pack(weight)
        if self._packed is not weight:
            self._release()

    def _pack_quantized(self, quantization: Quantization) -> Stored:
        tensors = {name: getattr(self, name).data for name in self._tensors}
        if "weight_shape" in tensors:
            require_shapes(tensors["weight_shape"], self.parts, self._in_features)
        return quantization.linear.pack(quantization.method.weight(tensors, self._in_features, self._dtype))

    def release(self) -> None:
        """Let go of the weight, which another layer holds in a form of its own from now on."""
        self._packed = None
        self._release()

    def _release(self) -> None:
        """Let go of the weight, which is stored in another form, and of the buffers that it was loaded into."""
        for name in self._tensors:
            tensor = getattr(self, name).data
            setattr(self, name, _parameter(torch.empty(0, dtype=tensor.dtype)))
            if self._staging is not None:
                self._staging.give_back(tensor)
        self._staging = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., rows of all parts]."""
        return self._product.apply(x, self.stored)

    def by_parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in_features] to [T, rows] of each part, or of each of its halves."""
        return apply_parts(self._product, x, self.stored, self._outputs)

    def _output_rows(self, part: str, rows: int) -> tuple[int, ...]:
        first, second = self._halves.get(part, (rows, 0))
        heads = rows // (first + second)
        return (heads * first, heads * second) if second else (rows,)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _part_heads(weight: Tensor, first: int, second: int) -> None:
    """Bring the first rows of all heads before their second rows, in place."""
    heads = weight.view(-1, first + second, weight.shape[1])
    weight.copy_(torch.cat((heads[:, :first].flatten(0, 1), heads[:, first:].flatten(0, 1))))
