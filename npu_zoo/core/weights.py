"""The weight loader's interface."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The part of a checkpoint's tensor that one rank holds.

    Attributes:
        dim: the dimension that ranks share.
        start, stop: this rank's part of it.
        size: all of it.
    """

    dim: int
    start: int
    stop: int
    size: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor, from that of the part."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """The part as a view."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


class WeightLoader(ABC):
    """Reads one checkpoint directory of one format, tensor by tensor.

    Attributes:
        tensors_last: whether a tensor may be read for as long as somebody holds it, rather than until the next one is
            asked for.
    """

    tensors_last: bool = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, read from headers alone.

        Raises:
            WeightsError: a file is missing, truncated or inconsistent; names file and tensor.
        """

    @abstractmethod
    def tensors(
        self, shards: Mapping[str, Shard] | None = None, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in file order, in the stored dtype, or the part of it that ``shards`` names.

        Those in ``without`` are left out, and not read.

        A tensor is valid until the next one is asked for, or for good where :attr:`tensors_last` says so. It may be a
        view of a mapped file: consumers copy before they write.
        """

    @abstractmethod
    def total_bytes(self) -> int:
        """The size of all tensors."""

    def files(self) -> list[Path]:
        """The files that tensors are read from: every one beneath the directory, unless a loader knows better."""
        walked = os.walk(self.directory, followlinks=True)
        return sorted(Path(folder, name) for folder, _, names in walked for name in names)
