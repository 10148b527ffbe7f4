"""Quantized checkpoints in the layout of compressed-tensors, which vLLM and transformers read as well.

Beside a linear layer's name X: ``X.weight_packed`` (codes in words), ``X.weight_scale`` and ``X.weight_shape`` for
weights that are kept in words (``pack-quantized``); int8 ``X.weight`` and ``X.weight_scale`` for w8a8
(``int-quantized``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.compressed_tensors import QUANT_METHOD, read_compressed_tensors
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.quantization import CONFIG_KEY
from npu_zoo.weights.quantize import Scheme, pack_rows
from npu_zoo.weights.tensors import LogicalTensor, Placement, Rows

if TYPE_CHECKING:
    from torch import Tensor

_PACKED = ("weight_packed", "weight_scale", "weight_shape")
_PLAIN = ("weight", "weight_scale")


def quantization_config(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """config.json's ``quantization_config`` of a scheme; ``ignore`` names linear layers that are not quantized."""
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None if scheme.packs else tokens}
    return {
        "quant_method": QUANT_METHOD,
        "format": "pack-quantized" if scheme.packs else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def quantization_of(directory: Path, config: Mapping[str, Any]) -> tuple[Scheme | None, tuple[int, int]]:
    """The scheme that config.json names, and the blocks of float8 scales.

    Raises:
        WeightsError: it names a method or scheme that is not known here.
    """
    found = config.get(CONFIG_KEY)
    if not found:
        return None, (128, 128)
    if not isinstance(found, dict):
        raise WeightsError(f"{directory}/config.json: quantization_config is no object")
    method = found.get("quant_method")
    if method == "fp8":
        block = found.get("weight_block_size") or [128, 128]
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise WeightsError(f"{directory}/config.json: weight_block_size {block!r} is no pair of sizes")
        return None, (block[0], block[1])
    if method == QUANT_METHOD:
        return _compressed_scheme(directory, found), (128, 128)
    raise WeightsError(
        f"{directory} is quantized by {method!r}, which is not read here; known: fp8 in blocks, compressed-tensors "
        "(w8a16, w4a16, w8a8)"
    )


def _compressed_scheme(directory: Path, found: Mapping[str, Any]) -> Scheme:
    try:
        read = read_compressed_tensors(found)
    except ValueError as error:
        raise WeightsError(
            f"{directory}/config.json: quantization_config is not understood: {error}; known are symmetric w8a16 and "
            "w4a16 by channel or group (pack-quantized), w8a8 with dynamic tokens (int-quantized)"
        ) from error
    return Scheme(read.weight_bits, read.activation_bits, read.group_size)


def stored_parts(name: str, scheme: Scheme | None, stored: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The logical name of a stored tensor, and the endings of its parts; no endings where it is plain."""
    if scheme is None:
        return name, ()
    suffixes = _PACKED if scheme.packs else _PLAIN
    for suffix in suffixes:
        if name.endswith(f".{suffix}"):
            base = name.removesuffix(suffix)
            if all(base + part in stored for part in suffixes[:2]) or suffix != "weight":
                return f"{base}weight", suffixes
    return name, ()


def place_whole(tensor: LogicalTensor) -> tuple[Placement, ...]:
    """The stored tensors of a whole logical one; in which file is left open."""
    rows = (0, tensor.num_rows)
    if tensor.scheme is None:
        return (Placement("", tensor.name, tensor.dtype, tensor.shape, rows, values_of),)
    scheme, base = tensor.scheme, tensor.name.removesuffix("weight")
    groups = (tensor.num_rows, scheme.num_groups(tensor.shape[1]))
    scales = Placement("", f"{base}weight_scale", tensor.dtype, groups, rows, scales_of)
    if not scheme.packs:
        return (Placement("", tensor.name, "int8", tensor.shape, rows, values_of), scales)
    bits, words = scheme.weight_bits, -(-tensor.shape[1] // scheme.codes_per_word)

    def packed(rows: Rows) -> Tensor:
        return pack_rows(rows.values, bits)

    def shape(_: Rows) -> Tensor:
        import torch

        return torch.tensor(tensor.shape, dtype=torch.int64)

    return (
        Placement("", f"{base}weight_packed", "int32", (tensor.num_rows, words), rows, packed),
        scales,
        Placement("", f"{base}weight_shape", "int64", (2,), rows, shape, takes="none"),
    )


def values_of(rows: Rows) -> Tensor:
    """Plain values, or codes."""
    return rows.values


def scales_of(rows: Rows) -> Tensor:
    """The scales of a quantized tensor."""
    assert rows.scales is not None
    return rows.scales
