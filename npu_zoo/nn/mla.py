"""Multi-head latent attention (arXiv:2405.04434; parameters have the checkpoints' names)."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_zoo.core.attention import LatentKeys, LatentProjection
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import MLAConfig, ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.layer import Layer
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.norm import RMSNorm

_LATENT_EPS = 1e-6  # of the norms inside, whatever rms_norm_eps is


class UpProjection(Linear, LatentProjection):
    """``kv_b_proj``: every head's keys and values from the latents, kept as two stacks of matrices.

    Never quantized, since both forms of the attention read it and no operator for quantized weights serves either.

    Attributes:
        keys: [num_heads, qk_nope_head_dim, kv_lora_rank], what a latent is multiplied with for a head's key.
        values: [num_heads, kv_lora_rank, v_head_dim], transposed, so that both forms of the attention read it in rows.
    """

    quantizable = adopts = False

    def __init__(self, num_heads: int, mla: MLAConfig, context: BuildContext) -> None:
        rows = num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        super().__init__(mla.kv_lora_rank, {"kv_b_proj": rows}, context, split="rows")
        self._shape = (num_heads // context.tp.size, mla.qk_nope_head_dim, mla.v_head_dim)
        self._head_linear = context.kernels.head_linear
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def packs(self) -> bool:
        """Always: the weight is split by :meth:`pack`."""
        return True

    def pack(self) -> None:
        """Split the loaded weight, once."""
        if self.keys is not None:
            return
        num_heads, nope, value = self._shape
        weight = self.weight.data.view(num_heads, nope + value, -1)
        # Copies even of a single head, whose slice is contiguous as it is: the weight's buffer is given back.
        self.keys, self.values = (
            part.clone(memory_format=torch.contiguous_format)
            for part in (weight[:, :nope], weight[:, nope:].transpose(1, 2))
        )
        self._release()

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`LatentProjection.expand`."""
        values = self._matrices()[1]
        return self.expand_keys(latent), torch.bmm(latent.expand(len(values), -1, -1), values)

    def expand_keys(self, latent: Tensor) -> Tensor:
        """See :meth:`LatentProjection.expand_keys`."""
        keys = self._matrices()[0]
        return torch.mm(keys.flatten(0, 1), latent.t()).view(*keys.shape[:2], -1)

    def absorb(self, query: Tensor) -> Tensor:
        """See :meth:`LatentProjection.absorb`."""
        return self._head_linear(query, self._matrices()[0])

    def project(self, attended: Tensor) -> Tensor:
        """See :meth:`LatentProjection.project`."""
        return self._head_linear(attended, self._matrices()[1])

    def _matrices(self) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.pack()
            return self._matrices()
        return self.keys, self.values


class MultiHeadLatentAttention(Layer):
    """Attention whose cache holds one latent and one rotated key per token, whatever the number of heads.

    The checkpoint's rotated parts are interleaved: values 2i and 2i + 1 turn together.

    Raises:
        WeightsError: the config has no latent attention, or its rotated parts are not interleaved.
    """

    def __init__(self, config: ModelConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        mla = config.mla
        if mla is None:
            raise WeightsError("config.json has no kv_lora_rank; latent attention cannot be built from it")
        if config.extra.get("rope_interleave") is False:
            raise WeightsError("config.json says rope_interleave false; this attention rotates interleaved pairs only")
        self._layer = layer
        self._mla = mla
        self._num_heads = config.num_attention_heads // context.tp.size
        self._kernels = context.kernels
        rows = config.num_attention_heads * mla.qk_head_dim
        latents = {"kv_a_proj_with_mqa": mla.cache_dim}
        halves = (mla.qk_nope_head_dim, mla.qk_rope_head_dim)
        first = {"q_a_proj": mla.q_lora_rank} if mla.q_lora_rank else {"q_proj": rows}
        everywhere = dict.fromkeys(("q_a_proj", *latents), context.tp.size)
        self.qkv_a_proj = Linear(
            config.hidden_size, first | latents, context, halves={"q_proj": halves}, split="rows", copies=everywhere
        )
        if mla.q_lora_rank:
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, _LATENT_EPS, context)
            self.q_b_proj = Linear(
                mla.q_lora_rank, {"q_b_proj": rows}, context, halves={"q_b_proj": halves}, split="rows"
            )
        self.kv_a_layernorm = RMSNorm(mla.kv_lora_rank, _LATENT_EPS, context)
        self.kv_b_proj = UpProjection(config.num_attention_heads, mla, context)
        self.o_proj = Linear(
            config.num_attention_heads * mla.v_head_dim, {"o_proj": config.hidden_size}, context, split="columns"
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], context: ForwardContext) -> Tensor:
        """[T, hidden_size] to [T, hidden_size]; ``rotation`` holds the rows' cosines and sines."""
        mla = self._mla
        *queries, latents = self.qkv_a_proj.by_parts(x)
        if mla.q_lora_rank:
            queries = list(self.q_b_proj.by_parts(self.q_a_layernorm(queries[0])[0]))
        query, query_rope = (part.view(len(x), self._num_heads, -1) for part in queries)
        query_rope = self._kernels.interleaved_rotary_embedding(query_rope, *rotation)
        keys = LatentKeys(
            latents, self.kv_a_layernorm.weight, _LATENT_EPS, *rotation, lambda: self._normed(latents, rotation)
        )
        attended = context.attend_latent(self._layer, (query, query_rope), keys, self.kv_b_proj)
        projected: Tensor = self.o_proj(attended.flatten(1))
        return projected

    def _normed(self, latents: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mla = self._mla
        latent, key = torch.split(latents, [mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        key = self._kernels.interleaved_rotary_embedding(key.unsqueeze(1), *rotation)
        return self.kv_a_layernorm(latent)[0], key.squeeze(1)
