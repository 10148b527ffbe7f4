"""Reads what compressed-tensors (github.com/vllm-project/compressed-tensors) writes into config.json.

Of its layouts those with symmetric integers, with a scale per output channel or per group of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npu_zoo.core.errors import validation_lines
from npu_zoo.core.quantization import QuantizationConfig

QUANT_METHOD = "compressed-tensors"
"""What config.json calls it."""

_WORD_BITS = 32

_FORMATS = {"pack-quantized": 16, "int-quantized": 8}
"""Layouts that are read, and the bits of the activations that go with each."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Weights(_Section):
    num_bits: Literal[4, 8]
    type: Literal["int"]
    symmetric: Literal[True]
    strategy: Literal["channel", "group"]
    group_size: int | None = Field(default=None, gt=0)
    dynamic: Literal[False] = False


class _Activations(_Section):
    num_bits: Literal[8]
    type: Literal["int"]
    symmetric: Literal[True]
    strategy: Literal["token"]
    dynamic: Literal[True]


class _Group(_Section):
    targets: tuple[Literal["Linear"]]
    weights: _Weights
    input_activations: _Activations | None = None
    output_activations: None = None


class _CompressedTensors(_Section):
    quant_method: Literal["compressed-tensors"]
    format: Literal["pack-quantized", "int-quantized"]
    quantization_status: Literal["compressed"] = "compressed"
    config_groups: dict[str, _Group] = Field(min_length=1, max_length=1)
    ignore: tuple[str, ...] = ()
    kv_cache_scheme: None = None


def read_compressed_tensors(section: Any) -> QuantizationConfig:
    """Read config.json's ``quantization_config``.

    Raises:
        ValueError: it is of another method, or says something that is not read; the message says what.
    """
    if not isinstance(section, Mapping) or section.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"only quant_method {QUANT_METHOD} is read")
    try:
        found = _CompressedTensors.model_validate(section)
        (group,) = found.config_groups.values()
        weights, activations = group.weights, 8 if group.input_activations else 16
        _require_consistent(found.format, weights, activations)
        return QuantizationConfig(
            weight_bits=weights.num_bits,
            activation_bits=activations,
            group_size=weights.group_size if weights.strategy == "group" else None,
            ignore=found.ignore,
            codes_per_word=_WORD_BITS // weights.num_bits if found.format == "pack-quantized" else 1,
        )
    except ValidationError as error:
        raise ValueError("; ".join(validation_lines(error))) from None


def _require_consistent(layout: str, weights: _Weights, activation_bits: int) -> None:
    if _FORMATS[layout] != activation_bits:
        raise ValueError(f"format {layout} goes with activations of {_FORMATS[layout]} bits, not {activation_bits}")
    if weights.strategy == "group" and weights.group_size is None:
        raise ValueError("strategy group lacks its group_size")
    if activation_bits == 8 and (weights.num_bits, weights.strategy) != (8, "channel"):
        raise ValueError("int8 activations go with int8 weights that have a scale per channel")
