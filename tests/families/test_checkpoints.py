"""What a family's checkpoint must hold, and what its hyperparameters say of it before it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from npu_zoo.core.errors import WeightsError

SHAPES: list[dict[str, Any]] = [
    {"kind": "deepseek_v3"},
    {"kind": "deepseek_v3", "q_lora_rank": 20, "first_k_dense_replace": 0},
    {"kind": "deepseek_v2", "n_shared_experts": 2},
    {"kind": "deepseek_moe", "num_key_value_heads": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_parameters_is_the_checkpoints(make_pair: Callable[..., Any], shape: dict[str, Any]) -> None:
    pair = make_pair(**shape)
    llm = pair.launch()
    stored = load_file(pair.directory / "model.safetensors")
    config = llm.engine.config.model_config
    assert config.num_parameters == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "deepseek_moe"])
def test_a_missing_expert_is_named(make_pair: Callable[..., Any], kind: str) -> None:
    pair = make_pair(kind)
    path = pair.directory / "model.safetensors"
    tensors = load_file(path)
    gone = ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.2.mlp.gate.weight"]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, path, {"format": "pt"})
    with pytest.raises(WeightsError) as refusal:
        pair.launch()
    assert "2 missing" in str(refusal.value)
    assert all(name in str(refusal.value) for name in gone)


def test_latents_take_the_memory_of_one_head_whatever_their_number(make_pair: Callable[..., Any]) -> None:
    few, many = (make_pair("deepseek_v3", num_attention_heads=n, num_key_value_heads=n).launch() for n in (2, 8))
    assert few.engine.runner.cache.num_tokens == many.engine.runner.cache.num_tokens
    pool = few.engine.runner.attention.pool
    assert pool.nbytes == 3 * few.engine.runner.cache.num_tokens * (32 + 8) * 4


def test_the_up_projection_is_stored_once(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("deepseek_v3")
    stored = load_file(pair.directory / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"]
    projection = pair.launch().engine.runner.model.model.layers["1"].self_attn.kv_b_proj
    assert projection.keys.nbytes + projection.values.nbytes == stored.nbytes
    assert projection.weight.numel() == 0
    assert projection.stored.numel() == 0
