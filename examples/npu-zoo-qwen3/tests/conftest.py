"""Tiny random checkpoints, each with the model of transformers that computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from npu_zoo import LLM
from npu_zoo.testing.checkpoints import write_checkpoint

Write = Callable[..., Path]
Launch = Callable[..., LLM]


def with_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms that weigh values differently: transformers begins with ones, which would hide one that is left out."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator)) if "norm" in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a checkpoint without a tokenizer; keywords are hyperparameters."""

    def write_one(**hyperparameters: Any) -> Path:
        shape = {"architecture": "Qwen3ForCausalLM", "tokenizer": False, "head_dim": 32, **hyperparameters}
        directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **shape)
        file = directory / "model.safetensors"
        save_file(with_norms(load_file(file)), file, {"format": "pt"})
        return directory

    return write_one


@pytest.fixture
def launch() -> Launch:
    """Starts an engine in float32 on one thread, with small blocks; keywords go over that."""

    def start(weights: Path, **options: Any) -> LLM:
        defaults: dict[str, Any] = {"dtype": "float32", "hardware": "cpu", "max_model_len": 160, "threads": 1}
        defaults |= {"kv_cache_memory": "8MiB", "skip_tokenizer_init": True, "strict_kernels": True}
        if options.get("attention") != "flash":
            defaults["block_size"] = 16
        return LLM("qwen3:custom", weights=str(weights), **{**defaults, **options})

    return start


def reference_of(directory: Path) -> Any:
    """The checkpoint as transformers runs it."""
    return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def change_config(directory: Path, **values: Any) -> Path:
    """Change config.json; None takes a key out."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")
    return directory
