"""A model's tensors apart from the formats that they are stored in: what is read, and where it is written.

A :class:`Source` gives each tensor under the name of Hugging Face's checkpoints, whole, in rows of its first dimension.
A :class:`Target` says which files hold which part of it, in which form. So any source goes with any target, and what
happens on the way (another dtype, quantization) knows of neither.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npu_zoo.weights.quantize import Scheme
from npu_zoo.weights.reading import ITEMSIZES, Digest, Piece, Reader

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of a model.

    Attributes:
        name: Hugging Face's.
        dtype: torch's name: of the values, or of the scales where it is quantized.
        scheme: how it is quantized; None for plain values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: Scheme | None = None

    @property
    def num_rows(self) -> int:
        """The first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_values(self) -> int:
        """Values of one row."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: plain values, or int8 codes with their scales [rows, groups]."""

    values: Tensor
    scales: Tensor | None = None


Digests = dict[Piece, Digest]


class Source(ABC):
    """A checkpoint that is read tensor by tensor.

    Attributes:
        directory: where it lies.
        tensors: every tensor by name, in the order in which they are best read.
        num_ranks: ranks that share it.
    """

    directory: Path
    tensors: dict[str, LogicalTensor]
    num_ranks: int = 1

    @abstractmethod
    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The stored tensors that one is made of."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int, reader: Reader, digests: Digests | None = None) -> Rows:
        """Rows of one tensor.

        Args:
            start: a multiple of :meth:`row_multiple`.
            digests: of each piece, to be carried on with what is read.

        Raises:
            WeightsError: a file cannot be read.
        """

    def row_multiple(self, name: str) -> int:
        """Rows that belong together: stretches that are read begin at a multiple of this."""
        return 1

    def files(self) -> list[Path]:
        """All files that hold tensors."""
        return sorted({piece.path for name in self.tensors for piece in self.pieces(name)})


Encode = Callable[[Rows], "Tensor"]


@dataclass(frozen=True)
class Placement:
    """A stored tensor of the result, and the part of a logical one that it holds.

    Attributes:
        file: the file's name, relative to the directory.
        name: the tensor's name in that file.
        dtype: torch's name.
        rows: the logical tensor's rows that it holds, from and to.
        encode: makes its content of those rows, or of some of them in order.
        takes: ``rows`` where those are stored one after the other, so that some can be written without the others;
            ``all`` of them at once; ``none`` where the content does not depend on them.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    encode: Encode
    takes: Literal["rows", "all", "none"] = "rows"

    @property
    def num_bytes(self) -> int:
        """Of the stored tensor."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


Segments = tuple[tuple[int, int], ...]
"""Where a stored tensor's bytes go: (offset in the file, length) pairs in order."""


@dataclass(frozen=True)
class TargetOptions:
    """What a target is made with.

    Attributes:
        num_ranks: ranks that share the model.
        num_experts: routed experts of the model; 0 where it has none.
        shard_size: bytes of a file, where the format has files of any number.
    """

    num_ranks: int = 1
    num_experts: int = 0
    shard_size: int = 5_000_000_000


class Target(ABC):
    """A format as something that is written."""

    @abstractmethod
    def place(self, tensors: Iterable[LogicalTensor]) -> dict[str, tuple[Placement, ...]]:
        """By logical tensor, the stored tensors that hold it.

        Raises:
            WeightsError: the format cannot hold one; names it.
        """

    @abstractmethod
    def lay_out(self, path: Path, placements: Iterable[Placement]) -> dict[str, Segments]:
        """Write everything of a file but its tensors' content, whose place is returned by stored name."""

    def side_files(self, placed: Mapping[str, tuple[Placement, ...]]) -> dict[str, Any]:
        """JSON files that go with the result, such as an index, by name."""
        return {}


def stored_size(placed: Mapping[str, tuple[Placement, ...]]) -> int:
    """Bytes of all stored tensors."""
    return sum(placement.num_bytes for placements in placed.values() for placement in placements)
