"""The attention backends' interfaces. Shapes are in trailing brackets; T counts the tokens of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npu_zoo.core.model_config import MLAConfig

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
class LatentLayout:
    """What one rank stores per layer under latent attention: ``mla.cache_dim`` values a token, whatever the heads.

    Attributes:
        num_slots: the number of blocks.
        slot_size: tokens per block.
    """

    num_layers: int
    mla: MLAConfig
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


class StepAttention(ABC):
    """What every backend is: one object serves all layers of a rank, and allocates the cache when it is made.

    A step calls :meth:`prepare` once, then the backend's ``forward`` once per layer. The rows of a step may be of any
    mix: single tokens (decode), whole prompts, and chunks that continue a cached prefix. A sequence may read blocks
    that another sequence writes in the same step, so a layer's writes all come before its reads.
    """

    @abstractmethod
    def prepare(self, rows: list[SequenceSlice]) -> AttentionMetadata:
        """Turn a step's rows into the tensors that all layers share."""

    def lazy_memory(self) -> Sequence[Tensor]:
        """The parts of the cache whose memory is taken as they are written; none where all of it is taken at once."""
        return ()


class GraphAttention(StepAttention):
    """A backend whose decode can be captured into a graph: single tokens, whose metadata stays where it is.

    Attributes:
        spare_slot: a block that belongs to no sequence; rows of padding lie there.
    """

    spare_slot: int

    @abstractmethod
    def graph_metadata(self, batch: int, max_context: int) -> AttentionMetadata:
        """Metadata of ``batch`` rows of one token, of up to ``max_context`` keys, in tensors that a graph may hold."""

    @abstractmethod
    def fill(self, metadata: AttentionMetadata, rows: list[SequenceSlice]) -> dict[str, Any]:
        """Write a step's rows, as many as it was made for, into the metadata of :meth:`graph_metadata`.

        Returns:
            The host values of the attention operators that a replay must be told, by argument.
        """


class ReplayAttention(StepAttention):
    """A backend that reads the rows of a decode step from memory that stays where it is, so that it can be replayed."""

    @abstractmethod
    def replay_metadata(self, batch: int, max_context: int) -> AttentionMetadata:
        """Metadata of ``batch`` rows of one token, of up to ``max_context`` keys, to be written by :meth:`refill`."""

    @abstractmethod
    def refill(self, metadata: AttentionMetadata, rows: list[SequenceSlice], count: int) -> None:
        """Write a step's rows, as many as it was made for, into the metadata of :meth:`replay_metadata`.

        Args:
            count: how many rows the step has. Each of those behind repeats one of them, and writes what that one does.

        Raises:
            EngineError: a row's blocks do not cover its tokens.
        """


class AttentionBackend(StepAttention):
    """Stores keys and values by head, and attends over them.

    Its constructor takes ``(layout: CacheLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale:
    float)``.
    """

    @staticmethod
    @abstractmethod
    def bytes_per_token(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""

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


class LatentProjection(ABC):
    """A layer's expansion of latents to every head's keys and values; R is ``kv_lora_rank``.

    It can also be applied to the other side: a query taken through :meth:`absorb` meets the latents themselves, and
    what it attends to goes through :meth:`project`. That costs more per key and nothing per cached token.
    """

    @abstractmethod
    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[K, R] to transposed keys [num_heads, qk_nope_head_dim, K] and values [num_heads, K, v_head_dim]."""

    @abstractmethod
    def expand_keys(self, latent: Tensor) -> Tensor:
        """[K, R] to transposed keys [num_heads, qk_nope_head_dim, K] alone; :meth:`project` makes values too."""

    @abstractmethod
    def absorb(self, query: Tensor) -> Tensor:
        """[T, num_heads, qk_nope_head_dim] to [T, num_heads, R]."""

    @abstractmethod
    def project(self, attended: Tensor) -> Tensor:
        """Weighted latents [T, num_heads, R] to [T, num_heads, v_head_dim]."""


@dataclass(frozen=True)
class LatentKeys:
    """What a step adds to the cache, before norm and rotation, which a backend may do on the way into it.

    Attributes:
        values: [T, cache_dim], the latents and the keys to rotate.
        weight, eps: of the latents' root-mean-square norm; [kv_lora_rank].
        cos, sin: the rows' angles, in the form that the rotary kernel takes.
        normed: computes latents [T, kv_lora_rank], normed, and keys [T, qk_rope_head_dim], rotated.
    """

    values: Tensor
    weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor
    normed: Callable[[], tuple[Tensor, Tensor]]


class LatentAttentionBackend(StepAttention):
    """Stores the latents that keys and values are expanded from, and attends over them (MLA, arXiv:2405.04434).

    Its constructor takes ``(layout: LatentLayout, dtype: torch.dtype, device: torch.device, num_heads: int, scale:
    float)``.
    """

    @staticmethod
    @abstractmethod
    def bytes_per_token(mla: MLAConfig, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""

    @abstractmethod
    def forward(
        self,
        layer: int,
        query: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        key_rope: Tensor,
        projection: LatentProjection,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Write the step's latents, then attend.

        Args:
            layer: which layer's cache.
            query: [T, num_heads, qk_nope_head_dim], what is not rotated of it.
            query_rope: [T, num_heads, qk_rope_head_dim], rotated.
            latent: [T, kv_lora_rank], normed; rows in the order of :meth:`prepare`.
            key_rope: [T, qk_rope_head_dim], rotated.
            projection: the layer's.

        Returns:
            [T, num_heads, v_head_dim].
        """

    def forward_keys(
        self,
        layer: int,
        query: Tensor,
        query_rope: Tensor,
        keys: LatentKeys,
        projection: LatentProjection,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """As :meth:`forward`, for a backend that norms and rotates what it writes by one operator."""
        return self.forward(layer, query, query_rope, *keys.normed(), projection, metadata)


@dataclass(frozen=True)
class AttentionMetadata:
    """What :meth:`StepAttention.prepare` hands to every layer of a step; backends subclass it."""

    rows: list[SequenceSlice]
    num_tokens: int
