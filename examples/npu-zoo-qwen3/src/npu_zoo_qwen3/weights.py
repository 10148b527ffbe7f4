"""The quantization method's tensors: how a layer reads them, and how a checkpoint is brought into them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from npu_zoo.api import WeightsError
from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo.nn.quantization import WeightMethod
from npu_zoo_qwen3.int8_rows import make_section

_QUANTIZED = re.compile(r"(.+_proj)\.weight")
_INDEX = "model.safetensors.index.json"
_WRITTEN_ANEW = ("config.json", _INDEX)
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".gguf")


class Int8Rows(WeightMethod):
    """``weight``: int8 codes [rows, in_features]; ``scale``: float32 [rows]."""

    def tensors(self, rows: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See :meth:`WeightMethod.tensors`."""
        return {"weight": ((rows, in_features), torch.int8), "scale": ((rows,), torch.float32)}

    def weight(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> QuantizedWeight:
        """See :meth:`WeightMethod.weight`."""
        return QuantizedWeight(tensors["weight"], tensors["scale"].unsqueeze(1), self.config.weight_bits, dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes [out, in] of a weight, and their scale [out]: the largest magnitude over 127, or 1 of zeros."""
    wide = weight.float()
    scale = wide.abs().amax(1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale.unsqueeze(1)).round_().to(torch.int8), scale


def quantize_checkpoint(source: Path, target: Path) -> int:
    """Bring a plain checkpoint of safetensors files into the method's layout, a file at a time.

    Embedding, head and norms stay as they are. ``target`` is there once everything is written.

    Returns:
        The number of layers that were quantized.

    Raises:
        WeightsError: the source is no plain checkpoint of safetensors files, or the target holds something already.
    """
    config, files = _read_config(source), sorted(source.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{source} holds no *.safetensors; `npu-zoo convert --to hf-safetensors` makes them")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target} is there already; delete it or choose another directory")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    places: dict[str, str] = {}
    for file in files:
        tensors = _quantized(file)
        save_file(tensors, partial / file.name, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    if len(files) > 1:
        _write_json(partial / _INDEX, {"metadata": {}, "weight_map": places})
    _write_json(partial / "config.json", config | {"quantization_config": make_section(["lm_head"])})
    for file in source.iterdir():
        if file.is_file() and file.suffix not in _WEIGHT_FILES and file.name not in _WRITTEN_ANEW:
            shutil.copy(file, partial / file.name)
    partial.rename(target)
    return sum(name.endswith(".scale") for name in places)


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source}/config.json cannot be read: {error}") from error
    if config.get("quantization_config"):
        raise WeightsError(f"{source} is quantized already; name the plain checkpoint")
    return config


def _quantized(file: Path) -> dict[str, Tensor]:
    """A file's tensors, with codes and a scale in place of each linear layer's weight."""
    found: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no mapping
            tensor, layer = stored.get_tensor(name), _QUANTIZED.fullmatch(name)
            if layer is None:
                found[name] = tensor
            else:
                found[name], found[f"{layer[1]}.scale"] = quantize_rows(tensor)
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
