from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.core.model_config import ModelConfig

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


def write_directory(directory: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**SHAPE, **config}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "model.safetensors").write_bytes(b"this is no safetensors file")
    return directory


@pytest.fixture
def weights(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint's config.json beside a weight file that cannot be read; keywords go over the shape."""

    def write(generation: dict[str, Any] | None = None, **config: Any) -> Path:
        return write_directory(tmp_path / "weights", generation, **config)

    return write


@pytest.fixture
def as_published(tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """Writes the config.json that a published checkpoint of this shape has."""

    def write(config: ModelConfig) -> Path:
        values = config.model_dump(exclude={"extra", "architecture", "eos_token_id", "rope_scaling"})
        scaling = {"type": "linear", "factor": config.rope_scaling.factor}
        return write_directory(
            tmp_path / "published",
            **values,
            eos_token_id=config.eos_token_id[0],
            rope_scaling=scaling if config.rope_scaling.kind == "linear" else None,
        )

    return write
