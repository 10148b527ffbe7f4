"""Tensors as views of mapped files."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


def map_file(path: Path) -> mmap.mmap:
    """A whole file, mapped for reading.

    Raises:
        WeightsError: it cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be mapped: {error}") from error


def view_tensor(buffer: mmap.mmap, entry: TensorEntry) -> Tensor:
    """A tensor of a mapped file, read-only: writing into it ends the process. One that is not aligned is copied."""
    import torch

    dtype = getattr(torch, entry.dtype)
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start)
    if flat.data_ptr() % entry.itemsize:  # no format promises alignment
        flat = flat.clone()
    return flat.view(dtype).view(entry.shape)
