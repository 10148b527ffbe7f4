"""The weight loader's interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class WeightLoader(ABC):
    """Reads one checkpoint directory of one format, tensor by tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, read from headers alone.

        Raises:
            WeightsError: a file is missing, truncated or inconsistent; names file and tensor.
        """

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in file order, in the stored dtype.

        A tensor is valid until the next one is asked for: it may be a view of a mapped file. Consumers copy.
        """

    @abstractmethod
    def total_bytes(self) -> int:
        """The size of all tensors."""
