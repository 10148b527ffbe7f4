"""How a checkpoint's linear layers are quantized, as its config.json says it.

The layout is that of compressed-tensors (github.com/vllm-project/compressed-tensors): symmetric integers, with a scale
per output channel or per group of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npu_zoo.core.errors import validation_lines

CONFIG_KEY = "quantization_config"
"""Where config.json keeps it."""

QUANT_METHOD = "compressed-tensors"

_FORMATS = {"pack-quantized": 16, "int-quantized": 8}
"""Layouts that are read, and the bits of the activations that go with each."""

_PATTERN = "re:"
"""What an entry of ``ignore`` begins with that is a pattern."""


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


class QuantizationConfig(BaseModel):
    """How linear layers are stored: ``weight = code * scale``.

    Attributes:
        weight_bits: of a code, which is from ``-2 ** (bits - 1)`` to ``2 ** (bits - 1) - 1``.
        activation_bits: 16 where activations stay in the compute dtype, 8 where each token's become int8 with a scale.
        group_size: inputs that share a scale; None where an output channel has a single one.
        ignore: names of layers that are stored plainly; one that begins with ``re:`` is a pattern.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(gt=0)
    activation_bits: int = Field(gt=0)
    group_size: int | None = Field(default=None, gt=0)
    ignore: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """Such as ``w8a16``: what ``--quantization`` and the matrix call it."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    def ignores(self, layer: str) -> bool:
        """Whether a layer, by its name in the checkpoint, is stored plainly."""
        return any(_matches(entry, layer) for entry in self.ignore)

    @classmethod
    def from_hf(cls, raw: Any) -> QuantizationConfig:
        """Read config.json's ``quantization_config``.

        Raises:
            ValueError: it is of another method, or says something that is not read; the message says what.
        """
        if not isinstance(raw, Mapping) or raw.get("quant_method") != QUANT_METHOD:
            raise ValueError(f"only quant_method {QUANT_METHOD} is read")
        try:
            found = _CompressedTensors.model_validate(raw)
            _check_patterns(found.ignore)
        except ValidationError as error:
            raise ValueError("; ".join(validation_lines(error))) from None
        except re.error as error:
            raise ValueError(f"ignore holds a pattern that cannot be read: {error}") from None
        (group,) = found.config_groups.values()
        weights, activations = group.weights, 8 if group.input_activations else 16
        _require_consistent(found.format, weights, activations)
        return cls(
            weight_bits=weights.num_bits,
            activation_bits=activations,
            group_size=weights.group_size if weights.strategy == "group" else None,
            ignore=found.ignore,
        )


def _matches(entry: str, layer: str) -> bool:
    return re.match(entry[len(_PATTERN) :], layer) is not None if entry.startswith(_PATTERN) else entry == layer


def _check_patterns(ignore: Iterable[str]) -> None:
    for entry in ignore:
        if entry.startswith(_PATTERN):
            re.compile(entry[len(_PATTERN) :])


def _require_consistent(layout: str, weights: _Weights, activation_bits: int) -> None:
    if _FORMATS[layout] != activation_bits:
        raise ValueError(f"format {layout} goes with activations of {_FORMATS[layout]} bits, not {activation_bits}")
    if weights.strategy == "group" and weights.group_size is None:
        raise ValueError("strategy group lacks its group_size")
    if activation_bits == 8 and (weights.num_bits, weights.strategy) != (8, "channel"):
        raise ValueError("int8 activations go with int8 weights that have a scale per channel")


_OPERATIONS = ("linear", "experts")


def scheme_operations(scheme: str) -> tuple[str, str]:
    """The operations that compute a scheme's linear layers and experts, such as ``linear_w8a16``."""
    return f"{_OPERATIONS[0]}_{scheme}", f"{_OPERATIONS[1]}_{scheme}"


def scheme_of(operation: str) -> str | None:
    """The scheme whose layers an operation computes; None for every other operation."""
    kind, _, scheme = operation.partition("_")
    return scheme if scheme and kind in _OPERATIONS else None
