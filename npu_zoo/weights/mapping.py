"""Tensors as views of mapped files."""

from __future__ import annotations

import contextlib
import mmap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

_READ_AT_ONCE = 64 << 20
_MADV_POPULATE_READ = 22
"""Linux's, since 5.14: maps and reads every page; :mod:`mmap` does not name it."""


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


def read_ahead(buffer: mmap.mmap, progress: Callable[[int, int], None] | None = None) -> None:
    """Have a mapped file in memory before it is used, in large pages where the system has them for files.

    Args:
        progress: called with the bytes done and the bytes in all.
    """
    size = len(buffer)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # hints, which not every system knows
        buffer.madvise(mmap.MADV_HUGEPAGE)
    for first in range(0, size, _READ_AT_ONCE):
        last = min(size, first + _READ_AT_ONCE)
        with contextlib.suppress(OSError, ValueError):
            buffer.madvise(_MADV_POPULATE_READ, first, last - first)
        if progress is not None:
            progress(last, size)


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


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values in memory, as they are written to a file."""
    import torch

    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
