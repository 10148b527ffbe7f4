"""The decoder that the families share: a stack of attention and feed-forward layers on one residual stream.

:class:`LlamaForCausalLM` is its plain form (arXiv:2302.13971; names as in transformers' modeling_llama). A family whose
layers differ overrides what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.embedding import Embedding, LMHead
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.mlp import MLP
from npu_zoo.nn.model import CausalLM
from npu_zoo.nn.moe import MoE
from npu_zoo.nn.norm import RMSNorm
from npu_zoo.nn.rotary import RotaryEmbedding


class LlamaAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        self._layer = layer
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self._head_dim = config.head_dim
        self._kernels = context.kernels
        rows = dict(zip(("q_proj", "k_proj", "v_proj"), (n * config.head_dim for n in heads), strict=True))
        copies = max(1, context.tp.size // config.num_key_value_heads)
        shared = {"k_proj": copies, "v_proj": copies}
        self.qkv_proj = Linear(config.hidden_size, rows, context, split="rows", copies=shared)
        self.o_proj = Linear(rows["q_proj"], {"o_proj": config.hidden_size}, context, split="columns")

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], context: ForwardContext) -> Tensor:
        """[T, hidden_size] to [T, hidden_size]; ``rotation`` holds the rows' cosines and sines."""
        query, key, value = (part.view(len(x), -1, self._head_dim) for part in self.qkv_proj.by_parts(x))
        query, key = self._kernels.rotary_embedding(query, key, *rotation)
        return self._project(context.attend(self._layer, query, key, value))

    def _project(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(attended.flatten(1))
        return projected


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm of the residual stream.

    Args:
        attention: takes ([T, hidden_size], rotation, context) to [T, hidden_size], as :class:`LlamaAttention`.
        mlp: takes [T, hidden_size] to [T, hidden_size].
    """

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module, context: BuildContext) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.mlp = mlp

    def forward(
        self, x: Tensor, residual: Tensor | None, rotation: tuple[Tensor, Tensor], context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """The layer's output before it is added to the residual stream, and that stream; [T, hidden_size] each."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, rotation, context)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class DecoderModel(nn.Module):
    """Embedding, the stack of layers, and the last norm."""

    def __init__(self, config: ModelConfig, layers: Iterable[DecoderLayer], context: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, context)
        self.rotary = RotaryEmbedding(config, context)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T] ids to [T, hidden_size]."""
        rotation = self.rotary(positions)
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, rotation, context)
        normed: Tensor = self.norm(x, residual)[0]
        return normed


class LlamaForCausalLM(CausalLM):
    """The decoder with its head over the vocabulary.

    Raises:
        WeightsError: the checkpoint's linear layers have biases.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        if config.extra.get("attention_bias") or config.extra.get("mlp_bias"):
            raise WeightsError("the checkpoint's linear layers have biases; this decoder has none")
        numbers = range(config.num_hidden_layers)
        layers = (
            DecoderLayer(config, self.make_attention(number, context), self.make_mlp(number, context), context)
            for number in numbers
        )
        self.model = DecoderModel(config, layers, context)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, context)

    def make_attention(self, layer: int, context: BuildContext) -> nn.Module:
        """A layer's attention; see :class:`DecoderLayer`."""
        return LlamaAttention(self.config, layer, context)

    def make_mlp(self, layer: int, context: BuildContext) -> nn.Module:
        """A layer's feed-forward; see :class:`DecoderLayer`."""
        config = self.config
        return MLP(config.hidden_size, config.intermediate_size, config.hidden_act, context)

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See :meth:`CausalLM.forward`."""
        hidden: Tensor = self.model(input_ids, positions, context)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`CausalLM.compute_logits`."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def optional_tensors(self) -> frozenset[str]:
        """A tied head is not stored."""
        return frozenset({"lm_head.weight"}) if self.config.tie_word_embeddings else frozenset()

    def finish_loading(self) -> None:
        """Tie the head to the embedding where the checkpoint says so, then pack."""
        if self.config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens.weight)
        super().finish_loading()


class MoEForCausalLM(LlamaForCausalLM):
    """The decoder with routed and shared experts in the layers where config.json puts them."""

    def make_mlp(self, layer: int, context: BuildContext) -> nn.Module:
        """Experts, or the dense feed-forward of the first layers."""
        moe = self.config.moe
        return MoE(self.config, context) if moe and moe.has_experts(layer) else super().make_mlp(layer, context)
