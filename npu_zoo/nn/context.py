"""What a model is built with, and what every layer of a forward pass is handed."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from npu_zoo.core.config import ExpertDispatch
from npu_zoo.core.errors import EngineError
from npu_zoo.core.parallel import ALONE, Apart, Communicator, Ranks
from npu_zoo.nn.kernels.table import Kernels
from npu_zoo.nn.quantization import Quantization


@dataclass(frozen=True)
class BuildContext:
    """What a model's layers are built with.

    Attributes:
        dtype: of weights and activations.
        max_model_len: positions that rotary tables must cover.
        quantization: of the linear layers, which :func:`npu_zoo.nn.model.build_on_meta` gives them.
        ranks: this rank's place and the groups that it talks in.
        expert_dispatch: how tokens reach experts of other ranks in steps that are not captured.
        mtp: whether the layer that predicts further tokens is built.
    """

    kernels: Kernels
    dtype: torch.dtype
    max_model_len: int
    quantization: Quantization | None = None
    ranks: Ranks = ALONE
    expert_dispatch: ExpertDispatch = "all_gather"
    mtp: bool = False

    @property
    def tp(self) -> Communicator:
        """The ranks that share a layer."""
        return self.ranks.tp

    def of_experts(self) -> BuildContext:
        """The same for a routed expert's layers, which other ranks share, and whose caller adds up the products."""
        place = self.ranks.place
        share = Apart(place.moe_tp_rank, place.split.moe_tp)
        return replace(self, ranks=replace(self.ranks, tp=share))


@dataclass(frozen=True)
class ForwardContext:
    """What a step's layers share: the cache behind the backend, and the step's rows.

    Attributes:
        first_layer: the first of the stage, whose keys and values are the cache's first.
        replica_tokens: how many tokens each replica of the attention computes; empty where there is but one.
        captured: whether the step is being captured, so that no size may come from the device.
    """

    attention: StepAttention
    metadata: AttentionMetadata
    first_layer: int = 0
    replica_tokens: tuple[int, ...] = ()
    captured: bool = False

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values and attend; [T, heads, head_dim] each, see :class:`AttentionBackend`."""
        if not isinstance(self.attention, AttentionBackend):
            raise EngineError(
                f"{type(self.attention).__name__} stores no keys and values by head, as this model has them"
            )
        return self.attention.forward(layer - self.first_layer, query, key, value, self.metadata)

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
        return self.attention.forward_keys(layer - self.first_layer, *query, keys, projection, self.metadata)
