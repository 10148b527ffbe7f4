"""What a model is built with, and what every layer of a forward pass is handed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_zoo.core.attention import (
    AttentionBackend,
    AttentionMetadata,
    LatentAttentionBackend,
    LatentKeys,
    LatentProjection,
    StepAttention,
)
from npu_zoo.core.errors import EngineError
from npu_zoo.core.parallel import SINGLE, Communicator
from npu_zoo.nn.kernels.table import Kernels
from npu_zoo.nn.quantization import Quantization


@dataclass(frozen=True)
class BuildContext:
    """What a model's layers are built with.

    Attributes:
        dtype: of weights and activations.
        max_model_len: positions that rotary tables must cover.
        tp: the ranks that share every layer.
        quantization: of the linear layers, which :func:`npu_zoo.nn.model.build_on_meta` gives them.
    """

    kernels: Kernels
    dtype: torch.dtype
    max_model_len: int
    quantization: Quantization | None = None
    tp: Communicator = SINGLE


@dataclass(frozen=True)
class ForwardContext:
    """What a step's layers share: the cache behind the backend, and the step's rows."""

    attention: StepAttention
    metadata: AttentionMetadata

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values and attend; [T, heads, head_dim] each, see :class:`AttentionBackend`."""
        if not isinstance(self.attention, AttentionBackend):
            raise EngineError(
                f"{type(self.attention).__name__} stores no keys and values by head, as this model has them"
            )
        return self.attention.forward(layer, query, key, value, self.metadata)

    def attend_latent(
        self,
        layer: int,
        query: tuple[Tensor, Tensor],
        keys: LatentKeys,
        projection: LatentProjection,
    ) -> Tensor:
        """Store latents and attend; ``query`` holds its plain and its rotated part. See LatentAttentionBackend."""
        if not isinstance(self.attention, LatentAttentionBackend):
            raise EngineError(f"{type(self.attention).__name__} stores no latents")
        return self.attention.forward_keys(layer, *query, keys, projection, self.metadata)
