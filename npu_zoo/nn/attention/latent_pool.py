"""What all backends of latent attention (MLA, arXiv:2405.04434) have in common, whatever computes it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from npu_zoo.core.attention import AttentionMetadata, LatentAttentionBackend, LatentLayout, LatentProjection
from npu_zoo.core.errors import EngineError
from npu_zoo.core.model_config import MLAConfig

M = TypeVar("M", bound=AttentionMetadata)


class LatentTokens(NamedTuple):
    """What a step's tokens bring to a layer, as :meth:`LatentAttentionBackend.forward` is given it."""

    query: Tensor
    query_rope: Tensor
    latent: Tensor
    key_rope: Tensor


class LatentPoolAttention(LatentAttentionBackend, Generic[M]):
    """A backend over a pool of blocks of latents.

    Args:
        layout: ``num_slots`` blocks of ``slot_size`` tokens.
        num_heads: query heads of this rank; the pool is the same for any number.
        scale: what a query's product with a key is multiplied by.

    Attributes:
        metadata_type: what its :meth:`prepare` makes.
    """

    metadata_type: type[M]

    def __init__(self, layout: LatentLayout, num_heads: int, scale: float) -> None:
        self.layout, self.num_heads, self.scale = layout, num_heads, scale

    @staticmethod
    def bytes_per_token(mla: MLAConfig, itemsize: int) -> int:
        """Cache bytes of one token in one layer."""
        return mla.cache_dim * itemsize

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
        """Write the step's latents, then attend; see :meth:`LatentAttentionBackend.forward`.

        Raises:
            EngineError: the metadata is another backend's.
        """
        tokens = LatentTokens(query, query_rope, latent, key_rope)
        return self.write_and_attend(layer, tokens, projection, self.own(metadata))

    @abstractmethod
    def write_and_attend(self, layer: int, tokens: LatentTokens, projection: LatentProjection, metadata: M) -> Tensor:
        """As :meth:`forward`, of metadata that is this backend's own."""

    def own(self, metadata: AttentionMetadata) -> M:
        """A step's metadata as this backend made it.

        Raises:
            EngineError: it is another's.
        """
        if not isinstance(metadata, self.metadata_type):
            raise EngineError(f"{type(self).__name__} takes what its prepare() made, not {type(metadata).__name__}")
        return metadata

    def absorbs(self, num_queries: int, num_keys: int) -> bool:
        """Whether a row's queries are taken to the latents, rather than the latents to keys and values."""
        return num_queries == 1 or prefers_absorbed(self.layout.mla, num_queries, num_keys)


def prefers_absorbed(mla: MLAConfig, num_queries: int, num_keys: int) -> bool:
    """Whether the absorbed form takes fewer multiplications per head; at one query it always reads less."""
    widths = mla.qk_nope_head_dim + mla.v_head_dim
    expanded = num_keys * mla.kv_lora_rank * widths + num_queries * num_keys * (widths + mla.qk_rope_head_dim)
    absorbed = num_queries * mla.kv_lora_rank * widths + num_queries * num_keys * (mla.cache_dim + mla.kv_lora_rank)
    return absorbed < expanded
