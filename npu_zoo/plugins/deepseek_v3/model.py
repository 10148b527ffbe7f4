"""DeepSeek-V2 and -V3 (arXiv:2405.04434, arXiv:2412.19437): latent attention, and experts.

V3's layer that predicts further tokens is given the model's output behind its last norm: so it is in vLLM, whose model
returns normed states to what drafts (model_executor/models/deepseek_v2.py, deepseek_mtp.py), and in SGLang, whose layer
is given what the head is given (srt/models/deepseek_nextn.py).
"""

from __future__ import annotations

from torch import nn

from npu_zoo.api import ModelConfig, WeightsError
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.mla import MultiHeadLatentAttention
from npu_zoo.nn.mtp import MTPForCausalLM


class DeepseekV3ForCausalLM(MTPForCausalLM):
    """Both generations: they differ in routing and sizes, which config.json states, and V3 has a predicting layer."""

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        if config.mla is None:
            raise WeightsError("config.json names no kv_lora_rank; this architecture has latent attention")
        super().__init__(config, context)

    def make_attention(self, layer: int, context: BuildContext) -> nn.Module:
        """Latent attention, in every layer."""
        return MultiHeadLatentAttention(self.config, layer, context)
