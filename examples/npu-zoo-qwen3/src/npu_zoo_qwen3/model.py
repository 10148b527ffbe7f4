"""Qwen3 (arXiv:2505.09388): a Llama whose heads are normed before they are turned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npu_zoo.api import ModelConfig, WeightsError
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.decoder import LlamaAttention, LlamaForCausalLM
from npu_zoo_qwen3 import HEAD_NORM


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head by itself, with one weight for all of them."""

    def __init__(self, head_dim: int, eps: float, context: BuildContext) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim, dtype=context.dtype), requires_grad=False)
        self._eps = eps
        self._kernel = context.kernels.more[HEAD_NORM]

    def forward(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] to the same."""
        normed: Tensor = self._kernel(x, self.weight, self._eps)
        return normed


class Qwen3Attention(LlamaAttention):
    """Grouped-query attention over normed queries and keys."""

    def __init__(self, config: ModelConfig, layer: int, context: BuildContext) -> None:
        super().__init__(config, layer, context)
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps, context)
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps, context)

    def prepare_heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Norm [T, heads, head_dim] queries and keys."""
        return self.q_norm(query), self.k_norm(key)


class Qwen3ForCausalLM(LlamaForCausalLM):
    """The dense models; the names of parameters are transformers'.

    Raises:
        WeightsError: the checkpoint's linear layers have biases, or some of its layers see a window of the text alone.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        windows = "sliding_attention" in (config.extra.get("layer_types") or ())
        if windows or config.extra.get("use_sliding_window"):
            raise WeightsError(
                "the checkpoint has layers with a sliding window; npu-zoo-qwen3 has full attention alone"
            )
        super().__init__(config, context)

    def make_attention(self, layer: int, context: BuildContext) -> nn.Module:
        """Attention with normed heads."""
        return Qwen3Attention(self.config, layer, context)
