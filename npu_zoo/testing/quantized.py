"""Tiny quantized checkpoints, and the plain ones that they stand for; independent of the package's own conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.compressed_tensors import QUANT_METHOD
from npu_zoo.core.errors import UsageError
from npu_zoo.core.quantization import CONFIG_KEY
from npu_zoo.registry import get_registry, load_code

if TYPE_CHECKING:
    from torch import Tensor

_NOT_QUANTIZED = ("lm_head", "embed_tokens", "norm", "gate", "kv_b_proj")
"""Last parts of names of layers that stay plain."""

_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    bits: int,
    activations: int = 16,
    group_size: int | None = None,
    dtype: str = "float32",
) -> tuple[Path, Path]:
    """Quantize a plain checkpoint of one safetensors file in the layout of compressed-tensors.

    Args:
        source: the plain checkpoint.
        target: gets the folders ``quantized`` and ``plain``.
        bits: of a code, 8 or 4.
        activations: 8 for the layout of int8 activations, else 16.
        group_size: inputs that share a scale; None for a scale per output channel.
        dtype: of the scales and of what is not quantized.

    Returns:
        The quantized checkpoint, and a plain one whose weights are exactly ``code * scale`` in float32.
    """
    import torch
    from safetensors.torch import load_file

    quantized: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if tensor.dim() != 2 or any(layer.rpartition(".")[2].endswith(end) for end in _NOT_QUANTIZED):
            quantized[name] = plain[name] = tensor.to(getattr(torch, dtype))
            continue
        codes, scale = codes_of(tensor.float(), bits, group_size)
        scale = scale.to(getattr(torch, dtype))
        plain[name] = restored(codes, scale)
        quantized |= _stored(layer, codes, scale, bits, packed=activations != 8)
    return (
        _write(source, target / "quantized", quantized, _config(bits, activations, group_size)),
        _write(source, target / "plain", plain, None),
    )


def quantized(plain: Path, directory: Path, scheme: str) -> Path:
    """A checkpoint in a registered scheme, made of a plain one; the plain one itself for ``none``.

    Args:
        directory: is made, where there is something to write.

    Raises:
        UsageError: the scheme's plugin reads a layout of its own and names nothing that writes it.
    """
    if scheme == "none":
        return plain
    method = get_registry().quantization_methods[scheme]
    if method.example:
        directory.mkdir(parents=True)
        load_code(method.example)(plain, directory)
        return directory
    if method.quant_method != QUANT_METHOD:
        raise UsageError(
            f"{scheme} is stored in a layout of its own; name a function that writes it in QuantizationSpec.example"
        )
    return quantize_checkpoint(plain, directory, bits=method.weight_bits, activations=method.activation_bits)[0]


def codes_of(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Symmetric codes of a [out, in] weight, int64, and their scales [out, groups]; a row of zeros has the scale 1."""
    import torch

    largest = 2 ** (bits - 1) - 1
    groups = weight.reshape(len(weight), -1, group_size or weight.shape[1])
    scale = groups.abs().amax(-1) / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (groups / scale.unsqueeze(-1)).round().long().clamp(-largest - 1, largest).flatten(1), scale


def restored(codes: Tensor, scale: Tensor) -> Tensor:
    """``code * scale`` in float32."""
    return (codes.float().reshape(len(codes), scale.shape[1], -1) * scale.float().unsqueeze(-1)).flatten(1)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] in int32 words, value by value: value j of a word in bits ``j * bits`` and up."""
    import torch

    per_word = 32 // bits
    words = torch.zeros(len(codes), -(-codes.shape[1] // per_word), dtype=torch.int64)
    for place in range(codes.shape[1]):
        unsigned = codes[:, place] + (1 << (bits - 1))
        words[:, place // per_word] += unsigned << (place % per_word * bits)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _stored(layer: str, codes: Tensor, scale: Tensor, bits: int, *, packed: bool) -> dict[str, Tensor]:
    import torch

    if not packed:
        return {f"{layer}.weight": codes.to(torch.int8), f"{layer}.weight_scale": scale}
    return {
        f"{layer}.weight_packed": packed_words(codes, bits),
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_shape": torch.tensor(codes.shape),
    }


def _config(bits: int, activations: int, group_size: int | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "group_size": group_size}
    weights["strategy"] = "group" if group_size else "channel"
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if activations == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": tokens if activations == 8 else None,
            }
        },
        "ignore": ["lm_head", r"re:.*\.kv_b_proj$", r"re:.*\.mlp\.gate$"],
    }


def _write(source: Path, target: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    config = json.loads((source / "config.json").read_text("utf-8"))
    if quantization is not None:
        config[CONFIG_KEY] = quantization
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target
