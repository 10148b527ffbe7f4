"""What steps cost at least, beside what transformers' own models are counted to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.evaluation.machine import describe_machine, floor_seconds
from npu_zoo.evaluation.work import NO_WORK, ModelWork, Work

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
LATENT: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


def config_of(hf: Any) -> ModelConfig:
    return ModelConfig.from_hf(hf.to_dict())


@pytest.fixture(scope="module")
def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**COMMON, attn_implementation="eager")).eval()


def counted(model: Any, context: int) -> int:
    """Operations of one token behind a context, as torch counts those of transformers' model."""
    with torch.inference_mode():
        cache = model(torch.zeros(1, context, dtype=torch.long)).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("context", [1, 40])
def test_operations_are_those_that_torch_counts(llama: Any, context: int) -> None:
    assert ModelWork(config_of(llama.config), "float32").step([(context, 1)], 1).operations == counted(llama, context)


def test_a_step_moves_every_weight_and_the_cache_once(llama: Any) -> None:
    work = ModelWork(config_of(llama.config), "bfloat16").step([(9, 1), (30, 2)], 2)
    weights = sum(p.numel() for p in llama.parameters()) - llama.model.embed_tokens.weight.numel()
    cached = 42 * 3 * 2 * 2 * 16  # tokens, layers, keys and values, heads, head size
    assert work.bytes == 2 * (weights + 3 * 64 + cached)


def test_latents_are_met_as_they_are_or_expanded_whichever_is_less() -> None:
    experts = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT, **experts)).eval()
    work = ModelWork(config_of(model.config), "float32")
    expansion = 2 * 3 * 4 * (16 + 16) * 32  # layers, heads, sizes of a head and of a latent
    for context in (1, 99):
        # transformers expands the latents of the whole context anew for every token.
        expanded = (context + 1) * (expansion + 2 * 3 * 4 * (24 + 16))
        absorbed = expansion + (context + 1) * 2 * 3 * 4 * (40 + 32)
        assert expanded > absorbed
        assert work.step([(context, 1)], 1).operations == counted(model, context) - expanded + absorbed
    products = counted(model, 1) - 2 * (expansion + 2 * 3 * 4 * 40)
    assert work.step([(0, 50)], 50).operations == 50 * (products + expansion) + 2 * 3 * 4 * 40 * 50 * 51 // 2


def test_experts_are_read_as_tokens_reach_them() -> None:
    config = config_of(DeepseekV3Config(**LATENT))
    work = ModelWork(config, "float32")
    expert = 2 * 3 * 64 * 48 * 4  # layers, matrices, and sizes of one expert in each layer
    bytes_of = [work.step([(0, 1)] * count, 0).bytes for count in (1, 2, 10_000)]
    token = config.hidden_size * 4 + work.cache_per_token
    assert bytes_of[1] - bytes_of[0] == pytest.approx(expert * 8 * ((1 - 0.75**2) - 0.25) + token, abs=1)
    assert bytes_of[2] - bytes_of[0] == pytest.approx(expert * (8 - 2) + 9_999 * token, rel=1e-6)


def test_runs_are_sums_of_steps(llama: Any) -> None:
    work = ModelWork(config_of(llama.config), "float32")
    assert work.decode([4, 7], 3) == sum((work.step([(4 + i, 1), (7 + i, 1)], 2) for i in range(3)), NO_WORK)
    assert work.prefill([5, 6]) == work.step([(0, 5), (0, 6)], 2)
    assert work.prefill([5, 6], cached=2) == work.step([(2, 3), (2, 4)], 2)
    assert work.step([], 0) == NO_WORK


def test_quantized_weights_and_caches_are_fewer_bytes_and_as_many_operations(llama: Any) -> None:
    config = config_of(llama.config)
    plain = ModelWork(config, "bfloat16").step([(20, 1)], 1)
    codes = QuantizationConfig(weight_bits=8, activation_bits=16)
    small = ModelWork(config, "bfloat16", quantization=codes, kv_cache_dtype="int8").step([(20, 1)], 1)
    assert small.operations == plain.operations
    assert small.bytes < plain.bytes


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    machine = describe_machine().model_copy(update={"bandwidth": 10.0, "peak": 100.0})
    assert floor_seconds(Work(50, 100), machine) == (5.0, "memory")
    assert floor_seconds(Work(5, 100), machine) == (1.0, "compute")
    with pytest.raises(ValueError, match="not measured"):
        floor_seconds(Work(5, 100), describe_machine())


def test_a_machine_is_described_with_what_was_measured() -> None:
    from npu_zoo.evaluation.machine import matrix_peak, read_bandwidth

    machine = describe_machine("cpu", 1)
    assert machine.cores >= 1
    assert machine.memory_gib > 0
    assert machine.cpu
    assert read_bandwidth(2**20, torch.device("cpu")) > 0
    assert matrix_peak(torch.float32, torch.device("cpu"), 64) > 0
