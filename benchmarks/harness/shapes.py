"""Model shapes: what a random-weight checkpoint is made of, and what a token costs."""

from __future__ import annotations

from dataclasses import dataclass

ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model and how the engine is started for it.

    Attributes:
        model: npu-zoo's ``family:variant`` that takes the checkpoint.
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

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or cached value."""
        return ITEMSIZE[self.dtype]

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' matrices, which every token is multiplied with."""
        return self.num_hidden_layers * self.layer_parameters

    @property
    def head_parameters(self) -> int:
        """Weights of the language-model head, which every sampled token is multiplied with."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights: matrices, head, embedding and norms."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.linear_parameters + 2 * self.head_parameters + norms

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
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
    )
}
