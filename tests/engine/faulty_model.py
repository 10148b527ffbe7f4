"""A model of which one rank fails when a file says so: ``FAULTS`` names it, its content is ``RANK KIND``."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext, ForwardContext
from npu_zoo.nn.decoder import LlamaForCausalLM

FAULTS = "NPU_ZOO_TEST_FAULTS"


class FaultyForCausalLM(LlamaForCausalLM):
    """The shared decoder, whose forward pass asks whether it is to fail."""

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        self._rank = context.ranks.place.rank
        if self._kind() == "load":
            raise ValueError("the first layer is missing")

    def forward(self, x: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        hidden = super().forward(x, positions, context)
        _fail(self._kind())
        return hidden

    def _kind(self) -> str:
        path = Path(os.environ[FAULTS])
        words = path.read_text().split() if path.exists() else []
        return words[1] if words and int(words[0]) == self._rank else ""


def _fail(kind: str) -> None:
    if kind == "raise":
        raise ValueError("the ninth layer is upside down")
    if kind == "sleep":
        time.sleep(600)
    while kind == "spin":
        pass
