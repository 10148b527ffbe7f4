"""Linear layers, one or several of the checkpoint's matrices in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from npu_zoo.core.errors import HardwareError, WeightsError
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.core.weights import Shard
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels.table import Product, Stored, apply_parts, from_packed_parts, pack_parts, packed_parts
from npu_zoo.nn.layer import Layer
from npu_zoo.nn.quantization import Quantization, require_shapes, split_parts, stacked_shape
from npu_zoo.nn.staging import Staging


class Linear(Layer):
    """``x @ weight.T`` without bias.

    Several matrices that take the same input are stacked into one weight, so that one product serves them all.
    A quantized layer holds the checkpoint's codes and scales in place of ``weight``; see :meth:`quantize`.

    Attributes:
        quantizable: whether a quantized checkpoint has this layer quantized.
        quantization: how it is quantized; None where its weight is plain.
        adopts: whether a weight may be packed from where the checkpoint's loader has it; see :meth:`adopt`.

    Args:
        parts: the checkpoint's name of each stacked matrix (``q_proj``) and its number of rows.
        padding: rows of zeros after them, which no checkpoint has.
        halves: by part, ``(first, second)`` rows of each head: :meth:`by_parts` gives the heads' first rows and their
            second rows apart, each contiguous in the weight.
        split: how ranks share the weight: each has some ``rows`` (of every part), and so some outputs; or some
            ``columns``, takes some inputs, and adds its product to the others'. None: each has all of it.
        copies: of a part that is split by rows, how many neighbouring ranks have the same rows.
        reduce: whether products of columns are added up here; otherwise the caller does it.

    Raises:
        WeightsError: the ranks do not divide what they share.
    """

    quantizable = True
    adopts = True

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        context: BuildContext,
        padding: int = 0,
        halves: Mapping[str, tuple[int, int]] | None = None,
        *,
        split: Literal["rows", "columns"] | None = None,
        copies: Mapping[str, int] | None = None,
        reduce: bool = True,
    ) -> None:
        super().__init__()
        self._tp, self._split, self._reduce = context.tp, split if context.tp.size > 1 else None, reduce
        self._copies = dict(copies or {})
        self._whole, self._whole_columns = dict(parts), in_features
        self.parts = {name: self._share(name, rows) for name, rows in parts.items()}
        in_features = self._share_of_columns(in_features)
        self.quantization: Quantization | None = None
        self._padding = padding
        self._halves = dict(halves or {})
        self._outputs = tuple(size for name, rows in self.parts.items() for size in self._output_rows(name, rows))
        self._kernel = context.kernels.linear
        self._product: Product = self._kernel
        self._in_features, self._dtype = in_features, context.dtype
        rows = sum(self.parts.values()) + padding
        self._tensors: tuple[str, ...] = ("weight",)
        self.weight = _parameter(torch.empty(rows, in_features, dtype=context.dtype))
        self._packed: Stored | None = None
        self._staging: Staging | None = None
        self._adopted: dict[str, Tensor] = {}
        self._restored = False

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

    def shards(self) -> dict[str, Shard]:
        """Of the views in :meth:`checkpoint_views` that are parts of the checkpoint's tensors, which part."""
        if self._split is None:
            return {}
        cut = self._shard_of_rows if self._split == "rows" else self._shard_of_columns
        found = {name: cut(name, view) for name, view in self.checkpoint_views().items()}
        return {name: shard for name, shard in found.items() if shard is not None}

    def _shard_of_rows(self, name: str, view: Tensor) -> Shard | None:
        part, _, tensor = name.partition(".")
        if tensor == "weight_shape" or self.parts[part] == self._whole[part]:
            return None
        index, rows = self._tp.rank // self._copies.get(part, 1), self.parts[part]
        return Shard(0, index * rows, (index + 1) * rows, self._whole[part])

    def _shard_of_columns(self, name: str, view: Tensor) -> Shard | None:
        if name.partition(".")[2] not in self._tensors_of_columns():
            return None
        size = view.shape[1]
        return Shard(1, self._tp.rank * size, (self._tp.rank + 1) * size, size * self._tp.size)

    def _tensors_of_columns(self) -> set[str]:
        """The tensors whose shape depends on the number of columns; of a scale per row every rank has all."""
        if self.quantization is None:
            return set(self._tensors)
        method, rows = self.quantization.method, sum(self.parts.values())
        share, whole = (method.tensors(rows, columns) for columns in (self._in_features, self._whole_columns))
        return {name for name in self._tensors if share[name] != whole[name]}

    def _share(self, part: str, rows: int) -> int:
        if self._split != "rows":
            return rows
        return _divided(f"{part}'s rows", rows, self._tp.size // self._copies.get(part, 1))

    def _share_of_columns(self, columns: int) -> int:
        if self._split != "columns":
            return columns
        return _divided(f"{'/'.join(self._whole)}'s columns", columns, self._tp.size)

    @property
    def packs(self) -> bool:
        """Whether the kernel keeps the weight in a layout of its own, so that the plain one is only passing through."""
        return self.quantization is not None or self._kernel.packs(self.weight.dtype)

    @property
    def stored(self) -> Stored:
        """The weight as the kernel takes it: packed, once :meth:`pack` was called."""
        return self.weight if self._packed is None else self._packed

    def adopt(self, view: str, tensor: Tensor) -> bool:
        """Have a part's weight packed from where it is, without a copy between; False where that cannot be.

        Args:
            view: its name in :meth:`checkpoint_views`.
            tensor: what was loaded, which stays as it is until :meth:`pack`.
        """
        alone = len(self.parts) == 1 and not self._padding
        if not self.adopts or self._halves or self.quantization is not None or not self.weight.is_meta:
            return False
        if not self.packs or not (alone or hasattr(self._kernel, "pack_parts")):
            return False
        if tensor.dtype != self.weight.dtype or not tensor.is_contiguous():
            return False
        self._adopted[view] = tensor
        return True

    def stage(self, staging: Staging) -> None:
        """Give tensors without storage buffers to be loaded into; :meth:`pack` gives them back."""
        for name in self._tensors:
            tensor = getattr(self, name)
            if tensor.is_meta:
                setattr(self, name, _parameter(staging.take(tensor.shape, tensor.dtype)))
                self._staging = staging
        views = self.checkpoint_views() if self._adopted else {}
        for name, tensor in self._adopted.items():  # another part has to be copied, so all are
            views[name].data.copy_(tensor)
        self._adopted.clear()

    def tie(self, weight: nn.Parameter) -> None:
        """Take another layer's [rows, in_features] weight; one that was loaded for this layer does not count."""
        self.weight = weight
        if not self._restored:
            self._packed = None

    def pack(self) -> None:
        """Bring the loaded weight into the kernel's layout, once; a layout that copies replaces the weight."""
        if self._packed is not None:
            if self._restored:
                self._release()
            return
        if self._adopted:
            self._pack_adopted()
            return
        for name, view in self.checkpoint_views().items():
            part, _, tensor = name.partition(".")
            if part in self._halves and tensor != "weight_shape":
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

    def packed_parts(self) -> Mapping[str, Tensor]:
        """What the packed weight consists of, to be kept in a file; none where it cannot be, or is not packed yet."""
        return packed_parts(self._product, self._packed) if self._packed is not None and self.packs else {}

    def restore(self, parts: Mapping[str, Tensor]) -> None:
        """Take the weight as :meth:`packed_parts` gave it in an earlier run, in place of loading one.

        Raises:
            WeightsError: it is not this layer's.
        """
        rows = sum(self.parts.values()) + self._padding
        self._packed = from_packed_parts(self._product, parts, rows, self._in_features)
        self._restored = True

    def _pack_adopted(self) -> None:
        parts = [self._adopted[f"{part}.weight"] for part in self.parts]
        if self._padding:
            parts.append(torch.zeros(self._padding, self._in_features, dtype=self._dtype))
        self._packed = pack_parts(self._kernel, parts)
        self._adopted.clear()
        self._release()

    def _pack_quantized(self, quantization: Quantization) -> Stored:
        tensors = {name: getattr(self, name).data for name in self._tensors}
        if "weight_shape" in tensors:
            require_shapes(tensors["weight_shape"], self._whole, self._whole_columns)
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
        return self.complete(self._product.apply(x, self.stored))

    def complete(self, product: Tensor) -> Tensor:
        """Add up what ranks have computed of a product of this layer, where they share its columns."""
        return self._tp.all_reduce(product) if self._split == "columns" and self._reduce else product

    def by_parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in_features] to [T, rows] of each part, or of each of its halves."""
        return apply_parts(self._product, x, self.stored, self._outputs)

    def _output_rows(self, part: str, rows: int) -> tuple[int, ...]:
        first, second = self._halves.get(part, (rows, 0))
        heads = rows // (first + second)
        return (heads * first, heads * second) if second else (rows,)


def _divided(what: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise WeightsError(f"{what}, {size}, cannot be shared by {ranks} ranks")
    return size // ranks


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _part_heads(weight: Tensor, first: int, second: int) -> None:
    """Bring the first rows of all heads before their second rows, in place."""
    heads = weight.view(-1, first + second, *weight.shape[1:])
    weight.copy_(torch.cat((heads[:, :first].flatten(0, 1), heads[:, first:].flatten(0, 1))))
