"""The layer that predicts further tokens, as a runner drafts with it."""

from __future__ import annotations

import torch

from npu_zoo.core.attention import StepAttention
from npu_zoo.core.config import EngineConfig
from npu_zoo.engine.decode.graph import DecodeGraphs
from npu_zoo.engine.decode.path import DecodePath
from npu_zoo.engine.speculation.graph import MtpGraphs
from npu_zoo.engine.speculation.layer import MtpDrafter
from npu_zoo.nn.model import CausalLM


def create_drafter(
    config: EngineConfig,
    model: CausalLM,
    attention: StepAttention,
    slot_size: int,
    device: torch.device,
    path: DecodePath | None,
) -> MtpDrafter | None:
    """What drafts with the model's own layer, from graphs where the model has some; None where the run does not.

    Args:
        attention: whose cache has the layer's keys and values behind those of the model's last.
        slot_size: tokens of the cache's slots.
        path: how the model decodes.
    """
    if config.speculation is None or not config.mtp:
        return None
    count = config.speculation.num_tokens
    graphs = [MtpGraphs(path.setup) for _ in range(count)] if isinstance(path, DecodeGraphs) else []
    return MtpDrafter(model, attention, slot_size, device, graphs)
