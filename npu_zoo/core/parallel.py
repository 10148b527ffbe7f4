"""How the ranks that share a layer talk to each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Communicator(ABC):
    """One rank's view of the ranks that share every layer.

    All of them call the same operations in the same order.

    Attributes:
        rank, size: this one's number, and how many there are.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, on each of them; ``x`` may be overwritten."""

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tensors, one after the other along a dimension, on each of them."""

    @abstractmethod
    def minimum(self, value: int) -> int:
        """The least of all ranks' numbers, on each of them."""


class SingleRank(Communicator):
    """Nobody to talk to."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The tensor itself."""
        return x

    def minimum(self, value: int) -> int:
        """The number itself."""
        return value


SINGLE = SingleRank()
