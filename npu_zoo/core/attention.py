"""The attention backend's interface. Shapes are in trailing brackets; T counts the tokens of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CacheLayout:
    """What one rank stores per layer.

    Attributes:
        num_slots: for paged, the number of blocks; for flash, the number of sequences.
        slot_size: for paged, tokens per block; for flash, the longest sequence.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    slot_size: int


@dataclass(frozen=True)
class SequenceSlice:
    """One sequence's share of a step: ``num_tokens`` new tokens from position ``start`` on.

    Attributes:
        slots: where its keys and values lie: block numbers in order, or one contiguous slot's number.
    """

    start: int
    num_tokens: int
    slots: Sequence[int]

    @property
    def context_len(self) -> int:
        """Tokens that the last new token attends to, itself included."""
        return self.start + self.num_tokens


class AttentionBackend(ABC):
    """Stores keys and values, and attends over them.

    One object serves all layers of a rank. Its constructor takes ``(layout: CacheLayout, dtype: torch.dtype,
    device: torch.device, num_heads: int, scale: float)`` and allocates the cache.

    A step calls :meth:`prepare` once, then :meth:`forward` once per layer. The rows of a step may be of any mix: single
    tokens (decode), whole prompts, and chunks that continue a cached prefix. A sequence may read blocks that another
    sequence writes in the same step, so a layer's writes all come before its reads.
    """

    @staticmethod
    @abstractmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""

    @abstractmethod
    def prepare(self, rows: list[SequenceSlice]) -> AttentionMetadata:
        """Turn a step's rows into the tensors that all layers share."""

    @abstractmethod
    def forward(self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write the step's keys and values, then attend.

        Args:
            layer: which layer's cache.
            query: [T, num_heads, head_dim].
            key, value: [T, num_kv_heads, head_dim], rotated already; rows in the order of :meth:`prepare`.

        Returns:
            [T, num_heads, head_dim].
        """


@dataclass(frozen=True)
class AttentionMetadata:
    """What :meth:`AttentionBackend.prepare` hands to every layer of a step; backends subclass it."""

    rows: list[SequenceSlice]
    num_tokens: int
