"""The decoder that the families share: a stack of attention and feed-forward layers on one residual stream.

:class:`LlamaForCausalLM` is its plain form (arXiv:2302.13971; names as in transformers' modeling_llama). A family whose
layers differ overrides what they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.embedding import Embedding, LMHead
from npu_zoo.nn.layer import Layer
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.mlp import MLP
from npu_zoo.nn.model import CausalLM
from npu_zoo.nn.moe import MoE
from npu_zoo.nn.norm import RMSNorm
from npu_zoo.nn.rotary import RotaryEmbedding


class LlamaAttention(Layer):
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
        query, key, value = [part.view(x.shape[0], -1, self._head_dim) for part in self.qkv_proj.by_parts(x)]
        query, key = self._kernels.rotary_embedding(*self.prepare_heads(query, key), *rotation)
        return self._project(context.attend(self._layer, query, key, value))

    def prepare_heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What a family does with [T, heads, head_dim] queries and keys before they are turned; here nothing."""
        return query, key

    def _project(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(attended.flatten(1))
        return projected


class DecoderLayer(Layer):
    """Attention and feed-forward, each behind a norm of the residual stream.

    Args:
        attention: takes ([T, hidden_size], rotation, context) to [T, hidden_size], as :class:`LlamaAttention`.
        mlp: takes ([T, hidden_size], context) to [T, hidden_size].
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
        return self.mlp(x, context), residual


class DecoderModel(Layer):
    """Embedding, the stack of layers, and the last norm; of a pipeline, one stage's share of them."""

    def __init__(self, config: ModelConfig, layers: Mapping[int, DecoderLayer], context: BuildContext) -> None:
        super().__init__()
        stage, last = context.ranks.place.stage, context.ranks.place.split.pp - 1
        self._hidden_size, self._dtype = config.hidden_size, context.dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, context) if stage == 0 else None
        self.rotary = RotaryEmbedding(config, context)
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self._stack = list(layers.values())
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context) if stage == last else None
        mine = {"embed_tokens": self.embed_tokens, "norm": self.norm}
        others = [f"layers.{number}" for number in range(config.num_hidden_layers) if number not in layers]
        self.parts_elsewhere = (*others, *(name for name, module in mine.items() if module is None))

    def forward(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T] ids, or [T, hidden_size] of the stage before, to [T, hidden_size]."""
        if not len(x):
            return self._assist(x.new_empty(0, self._hidden_size, dtype=self._dtype), context)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        rotation = self.rotary(positions)
        residual = None
        for layer in self._stack:
            x, residual = layer(x, residual, rotation, context)
        if self.norm is None:
            return x if residual is None else x + residual
        normed: Tensor = self.norm(x, residual)[0]
        return normed

    def _assist(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Lend this rank's experts to replicas that have tokens, since this one has none."""
        for layer in self._stack:
            if isinstance(layer.mlp, MoE):
                layer.mlp(x, context)
        return x

    def add_behind(self, number: int, layer: nn.Module) -> None:
        """Hold a layer that is no part of the stack, under the checkpoint's name of it."""
        self.layers[str(number)] = layer


class LlamaForCausalLM(CausalLM):
    """The decoder with its head over the vocabulary.

    Raises:
        WeightsError: the checkpoint's linear layers have biases.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        if config.extra.get("attention_bias") or config.extra.get("mlp_bias"):
            raise WeightsError("the checkpoint's linear layers have biases; this decoder has none")
        place = context.ranks.place
        layers = {
            number: DecoderLayer(config, self.make_attention(number, context), self.make_mlp(number, context), context)
            for number in place.layers(config.num_hidden_layers)
        }
        self.model = DecoderModel(config, layers, context)
        self.lm_head = self._make_head(context) if place.stage == place.split.pp - 1 else None
        own_head = self.lm_head is not None and "lm_head" in self.lm_head.parts
        self.parts_elsewhere = () if own_head else ("lm_head",)

    def _make_head(self, context: BuildContext) -> LMHead:
        config = self.config
        shared = config.tie_word_embeddings and self.model.embed_tokens is None
        name = "model.embed_tokens" if shared else "lm_head"  # a tied head without its embedding reads that itself
        return LMHead(config.hidden_size, config.vocab_size, context, name)

    def make_attention(self, layer: int, context: BuildContext) -> nn.Module:
        """A layer's attention; see :class:`DecoderLayer`."""
        return LlamaAttention(self.config, layer, context)

    def make_mlp(self, layer: int, context: BuildContext) -> nn.Module:
        """A layer's feed-forward; see :class:`DecoderLayer`."""
        config = self.config
        return MLP(config.hidden_size, config.intermediate_size, config.hidden_act, context)

    def forward(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See :meth:`CausalLM.forward`."""
        hidden: Tensor = self.model(x, positions, context)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`CausalLM.compute_logits`."""
        if self.lm_head is None:
            raise EngineError("the head is on the last stage of the pipeline, and this is another one")
        logits: Tensor = self.lm_head(hidden)
        return logits

    def optional_tensors(self) -> frozenset[str]:
        """A tied head is not stored."""
        return frozenset({"lm_head.weight"}) if self.config.tie_word_embeddings else frozenset()

    def finish_loading(self) -> None:
        """Tie the head to the embedding where the checkpoint says so, then pack."""
        if self.config.tie_word_embeddings and self.lm_head is not None and self.model.embed_tokens is not None:
            self.lm_head.tie(self.model.embed_tokens.weight)
        super().finish_loading()


class MoEForCausalLM(LlamaForCausalLM):
    """The decoder with routed and shared experts in the layers where config.json puts them."""

    def make_mlp(self, layer: int, context: BuildContext) -> nn.Module:
        """Experts, or the dense feed-forward of the first layers."""
        moe = self.config.moe
        return MoE(self.config, context) if moe and moe.has_experts(layer) else super().make_mlp(layer, context)
