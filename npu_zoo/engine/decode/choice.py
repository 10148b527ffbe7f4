"""Which way of decoding a rank has."""

from __future__ import annotations

import torch

from npu_zoo.core.attention import GraphAttention, ReplayAttention, StepAttention
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.parallel import Place
from npu_zoo.engine.decode.graph import DecodeGraphs, GraphSetup
from npu_zoo.engine.decode.path import DecodePath
from npu_zoo.engine.decode.replay import DecodeReplays
from npu_zoo.nn.model import CausalLM


def create_decode_path(
    config: EngineConfig,
    model: CausalLM,
    attention: StepAttention,
    place: Place,
    max_model_len: int,
    device: torch.device,
) -> DecodePath | None:
    """Graphs or replays, as the attention backend allows; None where steps go through the model's code.

    Args:
        model: with its weights loaded.
        max_model_len: the longest sequence.
    """
    if config.enforce_eager:
        return None
    if isinstance(attention, GraphAttention):
        return DecodeGraphs(GraphSetup(model, attention, place, config, max_model_len, device))
    if isinstance(attention, ReplayAttention) and config.world_size == 1:
        return DecodeReplays(model, attention, max_model_len)
    return None
