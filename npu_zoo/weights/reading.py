"""Parts of tensors read from files, a few rows at a time, and hashed as they pass."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

ITEMSIZES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int64": 8,
    "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
"""The bytes of one element, by torch's names of the dtypes."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor.

    Attributes:
        name: what the file calls it.
        dtype: torch's name of the stored dtype.
        chunks: where its bytes lie, row-major: (offset in the file, length) pairs in order.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        """The first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * ITEMSIZES[self.dtype]


class Reader:
    """Reads pieces with any number of threads at once; files stay open until :meth:`close`."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def read(self, piece: Piece, start: int = 0, stop: int | None = None, digest: Digest | None = None) -> Tensor:
        """Rows of a piece in memory of their own; a scalar has one row.

        Raises:
            WeightsError: the file cannot be read, or has become shorter.
        """
        import torch

        stop = piece.num_rows if stop is None else stop
        size = (stop - start) * piece.row_bytes
        buffer = torch.empty(size, dtype=torch.uint8)
        view = memoryview(buffer.numpy()).cast("B")  # type: ignore[arg-type]
        done = 0
        for offset, length in _within(piece.chunks, start * piece.row_bytes, size):
            self._fill(piece, view[done : done + length], offset)
            done += length
        if digest is not None:
            digest.update(view)
        shape = (stop - start, *piece.shape[1:]) if piece.shape else ()
        return buffer.view(getattr(torch, piece.dtype)).view(shape)

    def _fill(self, piece: Piece, view: memoryview, offset: int) -> None:
        descriptor = self._open(piece.path)
        while view:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise WeightsError(f"{piece.path}: tensor {piece.name}: {error.strerror or error}") from error
            if not count:
                raise WeightsError(f"{piece.path}: tensor {piece.name}: the file ends before it does")
            view, offset = view[count:], offset + count

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
            return self._files[path]


def _within(chunks: tuple[tuple[int, int], ...], start: int, size: int) -> list[tuple[int, int]]:
    """The (offset, length) pairs of a stretch of the joined chunks."""
    found, begin = [], 0
    for offset, length in chunks:
        first, last = max(start, begin), min(start + size, begin + length)
        if first < last:
            found.append((offset + first - begin, last - first))
        begin += length
    return found


@dataclass
class Digest:
    """The SHA-256 of a tensor's bytes, given in order."""

    _hash: Any = field(default_factory=hashlib.sha256)

    def update(self, data: memoryview) -> None:
        """Add bytes."""
        self._hash.update(data)

    def hex(self) -> str:
        """The digest so far."""
        return str(self._hash.hexdigest())
