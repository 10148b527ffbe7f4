"""The quantization method as config.json states it; no torch.

Beside a quantized layer's name X a checkpoint has ``X.weight``, int8 codes [out, in], and ``X.scale``, float32 [out]:
``weight = code * scale``. config.json has::

    "quantization_config": {"quant_method": "int8-rows", "bits": 8, "modules_to_not_convert": ["lm_head"]}
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from npu_zoo.api import QuantizationConfig

QUANT_METHOD = "int8-rows"
SCHEME = "int8_rows"
"""What ``--quantization`` and matrix rows call it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    quant_method: Literal["int8-rows"]
    bits: Literal[8]
    modules_to_not_convert: list[str] = []


def read_section(section: Any) -> QuantizationConfig:
    """What config.json's ``quantization_config`` says.

    Raises:
        ValueError: it says something that is not read, or lacks something.
    """
    found = _Section.model_validate(section)
    return QuantizationConfig(
        weight_bits=found.bits, activation_bits=16, scheme=SCHEME, ignore=tuple(found.modules_to_not_convert)
    )


def make_section(plain: list[str]) -> dict[str, Any]:
    """What :func:`read_section` reads; ``plain`` names linear layers that are not quantized."""
    return {"quant_method": QUANT_METHOD, "bits": 8, "modules_to_not_convert": plain}
