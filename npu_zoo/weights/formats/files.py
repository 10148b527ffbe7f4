"""The stored tensors of one file, whatever its format."""

from __future__ import annotations

import math
from pathlib import Path

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import read_safetensors_header
from npu_zoo.weights.mindspore import read_index as read_ckpt_index
from npu_zoo.weights.reading import ITEMSIZES, Piece
from npu_zoo.weights.torch_bin import BinTensor
from npu_zoo.weights.torch_bin import read_index as read_bin_index


def file_pieces(path: Path) -> dict[str, Piece]:
    """The stored tensors of a .safetensors, .ckpt or pickled file, by name; texts beside them are left out.

    Raises:
        WeightsError: the file is damaged, asks for code, or holds a tensor whose rows are not in order.
    """
    if path.suffix == ".safetensors":
        return {
            entry.name: Piece(path, entry.name, entry.dtype, entry.shape, ((entry.start, entry.stop - entry.start),))
            for entry in read_safetensors_header(path)
        }
    if path.suffix == ".ckpt":
        return {
            tensor.name: Piece(path, tensor.name, tensor.dtype, tensor.shape, tensor.chunks)
            for tensor in read_ckpt_index(path).values()
            if tensor.dtype != "str"
        }
    return {tensor.name: _bin_piece(path, tensor) for tensor in read_bin_index(path).values()}


def _bin_piece(path: Path, tensor: BinTensor) -> Piece:
    due, expected = 1, []
    for size in reversed(tensor.shape):
        expected.append(due)
        due *= size
    strides = zip(tensor.shape, tensor.strides, reversed(expected), strict=True)
    if math.prod(tensor.shape) and any(size > 1 and stride != wanted for size, stride, wanted in strides):
        raise WeightsError(
            f"{path}: tensor {tensor.name} is stored as a view whose rows are not in order; save it anew with "
            "torch.save({name: t.contiguous() for name, t in state.items()}, …)"
        )
    itemsize = ITEMSIZES[tensor.dtype]
    start = tensor.offset + tensor.storage_offset * itemsize
    return Piece(path, tensor.name, tensor.dtype, tensor.shape, ((start, math.prod(tensor.shape) * itemsize),))
