"""Model shapes: what a random-weight checkpoint is made of, and what a token costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Experts:
    """Layers of experts behind the first, dense one: ``routed`` of them, ``per_token`` for each, and shared ones.

    Attributes:
        width: of one expert.
        groups: how many groups the routed ones are in, and how many of them a token reaches.
    """

    routed: int
    shared: int
    per_token: int
    width: int
    groups: tuple[int, int] = (1, 1)

    def hit(self, tokens: int) -> float:
        """Routed experts that some of the tokens go to, on average, when any is as likely as another."""
        return float(self.routed * (1 - (1 - self.per_token / self.routed) ** tokens))


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: what is cached of a token, and the parts of a head."""

    kv_lora_rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    q_lora_rank: int = 384


@dataclass(frozen=True)
class Shape:
    """A model's shape, and how the engine is started for it.

    Attributes:
        model: npu-zoo's ``family:variant`` that takes the checkpoint.
        experts, latent: where it has them.
        small: the shape of the same kind on which greedy tokens are compared.
        num_tokens: ordinary token ids; special ones follow, and prompts never hold them.
        divisor: what the cases' lengths are divided by, so that a small model gets small work.
        kv_cache_memory: bytes that npu-zoo may spend on keys and values.
    """

    name: str
    model: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_tokens: int
    dtype: str = "bfloat16"
    max_model_len: int = 4096
    kv_cache_memory: int = 4 * 2**30
    divisor: int = 1
    experts: Experts | None = None
    latent: Latent | None = None
    small: str = "tiny"

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or cached value."""
        return ITEMSIZE[self.dtype]

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention."""
        heads, latent = self.num_attention_heads, self.latent
        if latent is None:
            return self.hidden_size * (2 * heads + 2 * self.num_key_value_heads) * self.head_dim
        queries = latent.q_lora_rank * (self.hidden_size + heads * (latent.nope + latent.rope))
        cached = self.hidden_size * (latent.kv_lora_rank + latent.rope)
        expanded = latent.kv_lora_rank * heads * (latent.nope + latent.value)
        return queries + cached + expanded + heads * latent.value * self.hidden_size

    def matrices(self, experts: float) -> int:
        """Weights of all layers' matrices with so many routed experts a layer."""
        dense = 3 * self.hidden_size * self.intermediate_size
        attention = self.num_hidden_layers * self.attention_parameters
        if self.experts is None:
            return attention + self.num_hidden_layers * dense
        expert = 3 * self.hidden_size * self.experts.width
        layer = (experts + self.experts.shared) * expert + self.experts.routed * self.hidden_size
        return attention + dense + int((self.num_hidden_layers - 1) * layer)

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' matrices that one token is multiplied with."""
        return self.matrices(self.experts.per_token if self.experts else 0)

    def read_parameters(self, tokens: int) -> int:
        """Weights of all layers' matrices that a step of so many tokens has to read."""
        return self.matrices(self.experts.hit(tokens) if self.experts else 0)

    @property
    def head_parameters(self) -> int:
        """Weights of the language-model head, which every sampled token is multiplied with."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights: matrices, head, embedding, norms and correction biases."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        if self.latent and self.experts:
            norms += self.num_hidden_layers * (self.latent.q_lora_rank + self.latent.kv_lora_rank)
            norms += (self.num_hidden_layers - 1) * self.experts.routed
        return self.matrices(self.experts.routed if self.experts else 0) + 2 * self.head_parameters + norms

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, or its latents, in all layers."""
        if self.latent:
            return self.num_hidden_layers * (self.latent.kv_lora_rank + self.latent.rope) * self.itemsize
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * self.itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="1.3b",
            model="deepseek_coder:1.3b-base",
            hidden_size=2048,
            intermediate_size=5504,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
            vocab_size=32256,
            num_tokens=32000,
        ),
        Shape(
            name="tiny",
            model="deepseek_coder:custom",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=128,
            vocab_size=1056,
            num_tokens=1000,
            max_model_len=512,
            kv_cache_memory=64 * 2**20,
            divisor=16,
        ),
        Shape(
            name="moe-1b",
            model="deepseek_moe:custom",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=32256,
            num_tokens=32000,
            experts=Experts(32, 2, 6, 704),
            small="tiny-moe",
        ),
        Shape(
            name="mla-1b",
            model="deepseek_v3:custom",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
            vocab_size=32256,
            num_tokens=32000,
            experts=Experts(32, 1, 4, 704, (4, 2)),
            latent=Latent(),
            small="tiny-mla",
        ),
        Shape(
            name="tiny-moe",
            model="deepseek_moe:custom",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=128,
            vocab_size=1056,
            num_tokens=1000,
            max_model_len=512,
            kv_cache_memory=64 * 2**20,
            divisor=16,
            experts=Experts(8, 2, 3, 64),
            small="tiny-moe",
        ),
        Shape(
            name="tiny-mla",
            model="deepseek_v3:custom",
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=128,
            vocab_size=1056,
            num_tokens=1000,
            max_model_len=512,
            kv_cache_memory=64 * 2**20,
            divisor=16,
            experts=Experts(8, 1, 3, 64, (2, 1)),
            latent=Latent(64, 32, 64, 64, 96),
            small="tiny-mla",
        ),
    )
}


def read_shape(data: dict[str, Any]) -> Shape:
    """A shape from plain data, as ``dataclasses.asdict`` gives it."""
    experts, latent = data.get("experts"), data.get("latent")
    parts = {"experts": experts and Experts(**{**experts, "groups": tuple(experts["groups"])})}
    return Shape(**{**data, **parts, "latent": latent and Latent(**latent)})
