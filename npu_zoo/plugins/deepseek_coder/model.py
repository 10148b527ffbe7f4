"""DeepSeek-Coder is a Llama: the shared decoder, unchanged."""

from __future__ import annotations

from npu_zoo.nn.decoder import LlamaForCausalLM


class DeepseekCoderForCausalLM(LlamaForCausalLM):
    """Grouped-query attention, rotary positions with linear scaling, SwiGLU."""
