"""GGUF files of random checkpoints, read by the gguf package and by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import gguf_file
from harness.checkpoint import ensure_checkpoint
from harness.shapes import SHAPES
from safetensors.torch import load_file

gguf = pytest.importorskip("gguf")


def _written(name: str, dtype: str, folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The checkpoint's tensors, and a reader of the file."""
    checkpoint = ensure_checkpoint(folder, dataclasses.replace(SHAPES[name], dtype=dtype))
    target = folder / "model.gguf"
    assert gguf_file.main([str(checkpoint), str(target)]) == 0
    return load_file(checkpoint / "model.safetensors"), gguf.GGUFReader(target)


def _tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def _field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def test_transformers_finds_the_same_model_in_the_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _written("tiny", "float32", tmp_path)
    factory: Any = AutoModelForCausalLM
    plain = factory.from_pretrained(tmp_path / "tiny-float32-v2")
    read = factory.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for name, value in plain.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "tiny-mla"])
def test_bfloat16_stays_but_for_norms_and_routers(name: str, tmp_path: Path) -> None:
    weights, reader = _written(name, "bfloat16", tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    small = {name for name in kinds if "norm" in name or name.endswith(("ffn_gate_inp.weight", "exp_probs_b.bias"))}
    assert {kinds[name] for name in small} == {"F32"}
    assert {kinds[name] for name in kinds.keys() - small} == {"BF16"}
    held = sum(int(np.prod(tensor.shape)) for tensor in reader.tensors)
    assert held == sum(value.numel() for value in weights.values())


def test_experts_are_stacked_in_their_order(tmp_path: Path) -> None:
    weights, reader = _written("tiny-moe", "float32", tmp_path)
    stacked = _tensors(reader)["blk.1.ffn_down_exps.weight"]
    assert len(stacked) == SHAPES["tiny-moe"].experts.routed  # type: ignore[union-attr]
    for number, values in enumerate(stacked):
        assert np.array_equal(values, weights[f"model.layers.1.mlp.experts.{number}.down_proj.weight"].numpy())
    assert _field(reader, "general.architecture") == "deepseek"
    assert _field(reader, "deepseek.expert_shared_count") == 2


def test_latents_score_and_sum_as_they_do_expanded(tmp_path: Path) -> None:
    weights, reader = _written("tiny-mla", "float32", tmp_path)
    shape, found = SHAPES["tiny-mla"], _tensors(reader)
    latent, heads = shape.latent, shape.num_attention_heads
    assert latent is not None
    expand = weights["model.layers.0.self_attn.kv_b_proj.weight"].view(heads, -1, latent.kv_lora_rank).double()
    keys, values = expand.split([latent.nope, latent.value], 1)
    query, cached = torch.randn(heads, latent.nope).double(), torch.randn(latent.kv_lora_rank).double()
    folded = torch.from_numpy(found["blk.0.attn_k_b.weight"].copy()).double()
    expanded = (query[:, None] @ (keys @ cached)[..., None]).flatten()
    assert torch.allclose((folded @ query[..., None])[..., 0] @ cached, expanded)
    back = torch.from_numpy(found["blk.0.attn_v_b.weight"].copy()).double()
    assert torch.equal(back, values)
    assert _field(reader, "deepseek2.attention.head_count_kv") == 1
    assert _field(reader, "deepseek2.attention.key_length") == latent.kv_lora_rank + latent.rope
    assert _field(reader, "deepseek2.expert_group_used_count") == 1


def test_the_tokenizer_is_the_checkpoint_s(tmp_path: Path) -> None:
    _, reader = _written("tiny", "bfloat16", tmp_path)
    checkpoint = gguf_file.Checkpoint(tmp_path / "tiny-bfloat16-v2")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == SHAPES["tiny"].vocab_size
    for text, index in checkpoint.tokenizer["model"]["vocab"].items():
        assert tokens[index] == text
    assert tokens[checkpoint.config["eos_token_id"]] == "<｜end▁of▁sentence｜>"
