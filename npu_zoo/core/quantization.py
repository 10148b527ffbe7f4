"""How a checkpoint's linear layers are quantized, as the reader of its method makes it of config.json."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

CONFIG_KEY = "quantization_config"
"""Where config.json keeps it."""

_PATTERN = "re:"
"""What an entry of ``ignore`` begins with that is a pattern."""


def _scheme_of_bits(values: dict[str, Any]) -> str:
    return f"w{values.get('weight_bits')}a{values.get('activation_bits')}"


class QuantizationConfig(BaseModel):
    """How linear layers are stored.

    Attributes:
        weight_bits: of a code.
        activation_bits: 16 where activations stay in the compute dtype, 8 where each token's become int8 with a scale.
        scheme: what ``--quantization`` and the matrix call it; by default after the bits, such as ``w8a16``.
        group_size: inputs that share a scale; None where an output channel has a single one.
        ignore: names of layers that are stored plainly; one that begins with ``re:`` is a pattern.
        codes_per_word: neighbouring inputs whose codes are packed into one word, which no two ranks share; 1 where
            codes are not packed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int = Field(gt=0)
    activation_bits: int = Field(gt=0)
    scheme: str = Field(default_factory=_scheme_of_bits, min_length=1)
    group_size: int | None = Field(default=None, gt=0)
    ignore: tuple[str, ...] = ()
    codes_per_word: int = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _readable_patterns(self) -> QuantizationConfig:
        try:
            for entry in self.ignore:
                if entry.startswith(_PATTERN):
                    re.compile(entry[len(_PATTERN) :])
        except re.error as error:
            raise ValueError(f"ignore holds a pattern that cannot be read: {error}") from None
        return self

    def ignores(self, layer: str) -> bool:
        """Whether a layer, by its name in the checkpoint, is stored plainly."""
        return any(_matches(entry, layer) for entry in self.ignore)


def _matches(entry: str, layer: str) -> bool:
    return re.match(entry[len(_PATTERN) :], layer) is not None if entry.startswith(_PATTERN) else entry == layer


_OPERATIONS = ("linear", "experts")


def scheme_operations(scheme: str) -> tuple[str, str]:
    """The operations that compute a scheme's linear layers and experts, such as ``linear_w8a16``."""
    return f"{_OPERATIONS[0]}_{scheme}", f"{_OPERATIONS[1]}_{scheme}"


def scheme_of(operation: str) -> str | None:
    """The scheme whose layers an operation computes; None for every other operation."""
    kind, _, scheme = operation.partition("_")
    return scheme if scheme and kind in _OPERATIONS else None
