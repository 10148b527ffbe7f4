"""The closed forms of memory against models on the meta device, sums over ranks, and figures worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.features import splits_of
from npu_zoo.core.hardware import ITEMSIZE, PRODUCTS
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split, stage_layers
from npu_zoo.planning import RankPlan, Workload, plan_rank
from npu_zoo.registry import get_registry, load_code
from npu_zoo.selection import select_kernels

GIB = 1 << 30
WORKLOAD = Workload(4096)
ALONE = Split()

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 300,
    "max_position_embeddings": 512,
}  # fmt: skip
MOE = {
    **LLAMA, "architectures": ["DeepseekForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1, "head_dim": None,
    "scoring_func": "softmax", "num_key_value_heads": 8,
}  # fmt: skip
V3 = {
    **MOE, "architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 24, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
SHAPES = {"llama": LLAMA, "tied": {**LLAMA, "tie_word_embeddings": True}, "moe": MOE, "v3": V3}


def config_of(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf(raw)


def built_bytes(config: ModelConfig, dtype: str, *, mtp: bool = False) -> int:
    """What the model itself allocates, tied tables once."""
    import torch

    from npu_zoo.nn.context import BuildContext
    from npu_zoo.nn.kernels.table import bind_kernels
    from npu_zoo.nn.model import build_on_meta

    registry = get_registry()
    family = next(f for f in registry.families.values() if config.architecture in f.architectures)
    kernels = bind_kernels(select_kernels(registry.kernels, "cpu", dtype, config))  # type: ignore[arg-type]
    context = BuildContext(kernels, getattr(torch, dtype), 512, mtp=mtp)
    model = build_on_meta(load_code(family.model), config, context)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if config.tie_word_embeddings:
        head = model.get_parameter("lm_head.weight")
        total -= head.numel() * head.element_size()
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_one_device_are_what_the_model_allocates(shape: str, dtype: str) -> None:
    config = config_of(SHAPES[shape])
    assert plan_rank(config, dtype, ALONE, WORKLOAD).weights == built_bytes(config, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_predicts_further_tokens_takes_its_weights_and_a_layer_of_the_cache(dtype: str) -> None:
    config = config_of({**V3, "num_nextn_predict_layers": 1})
    plan, plain = (plan_rank(config, dtype, ALONE, WORKLOAD, mtp=mtp) for mtp in (True, False))
    assert plan.weights == built_bytes(config, dtype, mtp=True) > plain.weights == built_bytes(config, dtype)
    assert 3 * plan.cache_per_token == 4 * plain.cache_per_token


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_of_a_dense_model_share_all_but_the_norms(tp: int) -> None:
    config = config_of(LLAMA)
    whole = plan_rank(config, "bfloat16", ALONE, WORKLOAD).weights
    norms = (2 * 3 + 1) * 64 * 2
    share = plan_rank(config, "bfloat16", Split(tp), WORKLOAD).weights
    assert tp * (share - norms) == whole - norms


def test_experts_are_shared_whole_or_in_part() -> None:
    config = config_of(MOE)
    whole = plan_rank(config, "float16", ALONE, WORKLOAD).weights
    replicated = (2 * 3 + 1) * 64 * 2 + 2 * 8 * 64 * 4  # norms, and two layers' routers in float32
    for split in (Split(4), Split(4, ep=4), Split(4, ep=2)):
        assert 4 * (plan_rank(config, "float16", split, WORKLOAD).weights - replicated) == whole - replicated


def test_replicas_of_a_dense_model_share_nothing() -> None:
    config = config_of(LLAMA)
    whole = plan_rank(config, "bfloat16", ALONE, WORKLOAD)
    assert plan_rank(config, "bfloat16", Split(dp=4), WORKLOAD) == whole
    half = plan_rank(config, "bfloat16", Split(2), WORKLOAD)
    assert plan_rank(config, "bfloat16", Split(2, dp=2), WORKLOAD) == half


@pytest.mark.parametrize("split", [Split(dp=4), Split(dp=4, ep=2), Split(dp=4, ep=4), Split(2, dp=2, ep=4)])
def test_replicas_share_the_experts_of_their_stage(split: Split) -> None:
    """A rank has n / ep experts, tp x dp / ep ranks share each, and the rest is the replica's own."""
    config = config_of(MOE)
    routed = 2 * 8 * 3 * 64 * 32 * 2  # layers, experts, matrices of [64, 32] in two bytes
    alone = plan_rank(config, "float16", Split(split.tp), WORKLOAD)
    found = plan_rank(config, "float16", split, WORKLOAD)
    assert alone.weights - found.weights == routed // split.tp - routed // 4
    assert found.cache_per_token == alone.cache_per_token == 3 * 2 * 8 * 8 * 2 // split.tp


@pytest.mark.parametrize(("split", "width"), [(Split(dp=2), 16), (Split(dp=2, ep=2), 32), (Split(2, dp=2, ep=2), 16)])
def test_experts_compute_the_tokens_of_all_replicas(split: Split, width: int) -> None:
    config, tokens, longest = config_of(MOE), 512, 64
    stream = (4 * tokens * 64 + 2 * 8 * (tokens + longest)) * 2
    gathered = 2 * tokens  # of both replicas
    experts = gathered * 2 * (width + 2 * 64) * 2 + gathered * (64 + 8) * 4
    there_and_back = 2 * gathered * 64 * 2
    found = plan_rank(config, "float16", split, Workload(longest, 1, tokens)).activations
    assert found == stream + experts + there_and_back


def test_latent_attention_replicates_its_first_projections() -> None:
    config = config_of(V3)
    whole = plan_rank(config, "bfloat16", ALONE, WORKLOAD)
    norms = (2 * 3 + 1) * 64 + 3 * (48 + 32)
    down = 3 * (48 + 32 + 16) * 64
    replicated = 2 * (norms + down) + 2 * 8 * 65 * 4
    share = plan_rank(config, "bfloat16", Split(2, ep=2), WORKLOAD)
    assert 2 * (share.weights - replicated) == whole.weights - replicated
    assert share.cache_per_token == whole.cache_per_token == 3 * (32 + 16) * 2


def test_key_value_heads_below_the_world_size_are_copied() -> None:
    config = config_of(LLAMA)
    four, eight = (plan_rank(config, "bfloat16", Split(tp), WORKLOAD).cache_per_token for tp in (4, 8))
    assert four == eight == 3 * 2 * 16 * 2


def test_the_largest_stage_counts() -> None:
    config = config_of({**LLAMA, "num_hidden_layers": 4})
    layer = (64 * (8 + 2 * 4) * 16 + 8 * 16 * 64 + 3 * 64 * 96 + 2 * 64) * 2
    table, norm = 320 * 64 * 2, 64 * 2
    assert plan_rank(config, "bfloat16", Split(pp=2), WORKLOAD).weights == 2 * layer + table + norm
    assert plan_rank(config, "bfloat16", Split(pp=4), WORKLOAD).weights == layer + table + norm
    assert plan_rank(config, "bfloat16", Split(pp=2), WORKLOAD).cache_per_token == 2 * 2 * 4 * 16 * 2


@given(layers=st.integers(1, 200), stages=st.integers(1, 64))
def test_stages_are_balanced_and_cover_the_stack(layers: int, stages: int) -> None:
    found = stage_layers(layers, stages)
    assert [layer for stage in found for layer in stage] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert layers < stages or min(map(len, found)) > 0


@pytest.mark.parametrize(("bits", "per_value"), [(8, 1.0), (4, 0.5)])
def test_quantized_weights_and_their_scales(bits: int, per_value: float) -> None:
    config = config_of(LLAMA)
    plain = plan_rank(config, "bfloat16", ALONE, WORKLOAD).weights
    values = 3 * (64 * 16 * 16 + 128 * 64 + 3 * 64 * 96)
    channels = 3 * (16 * 16 + 64 + 2 * 96 + 64)
    found = plan_rank(config, "bfloat16", ALONE, WORKLOAD, weight_bits=bits).weights
    assert found == plain - 2 * values + int(per_value * values) + 2 * channels


def test_a_group_of_inputs_has_a_scale() -> None:
    config = config_of(LLAMA)
    by_channel, by_group = (
        plan_rank(config, "bfloat16", ALONE, WORKLOAD, weight_bits=4, group_size=size).weights for size in (None, 32)
    )
    groups = 3 * (16 * 16 * 2 + 64 * 4 + 2 * 96 * 2 + 64 * 3)  # of 64, 128, 64 and 96 inputs
    channels = 3 * (16 * 16 + 64 + 2 * 96 + 64)
    assert by_group - by_channel == 2 * (groups - channels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("device", "beside"), [("npu", 4 + 4), ("cpu", 4 + 8 + 16 * 8 // 64)])
def test_an_int8_cache_counts_codes_and_scales(device: str, beside: int, dtype: str) -> None:
    config = config_of(LLAMA)
    found = plan_rank(config, dtype, ALONE, WORKLOAD, kv_cache_dtype="int8", device=device)
    assert found.cache_per_token == 3 * 4 * (16 + 16 + beside)
    halved = plan_rank(config, dtype, Split(2), WORKLOAD, kv_cache_dtype="int8", device=device)
    assert halved.cache_per_token * 2 == found.cache_per_token


def test_a_context_that_is_read_back_from_int8_takes_room_on_a_device() -> None:
    """Room for the longest sequence, keys and values in the compute dtype, and one of both in float32."""
    config, longest = config_of(LLAMA), Workload(1 << 16, 1, 16)
    plain, int8 = (
        plan_rank(config, "bfloat16", ALONE, longest, kv_cache_dtype=stored).activations for stored in ("auto", "int8")
    )
    assert 0.8 < (int8 - plain) / ((1 << 16) * 4 * 16 * (2 * 2 + 4)) <= 1
    on_cpu = plan_rank(config, "bfloat16", ALONE, longest, kv_cache_dtype="int8", device="cpu")
    assert on_cpu.activations == plain


def test_tokens_and_batches() -> None:
    plan = RankPlan(weights=600, activations=200, cache_per_token=10)
    assert plan.cache_tokens(1000, 1.0) == 20
    assert plan.cache_tokens(1000, 0.5) == 10
    assert plan.largest_batch(1000, 1.0, 7) == 2
    assert plan.cache_tokens(799, 1.0) == plan.cache_tokens(100, 0.9) == 0


def test_longer_steps_and_more_sequences_never_take_less() -> None:
    for raw in SHAPES.values():
        config = config_of(raw)
        sizes = [
            plan_rank(config, "bfloat16", ALONE, Workload(length, seqs, tokens)).activations
            for length, seqs, tokens in ((128, 1, 16), (128, 1, 256), (1024, 1, 256), (1024, 512, 256))
        ]
        assert sizes == sorted(sizes)


def vendor_rows() -> list[Any]:
    return [
        pytest.param(variant, row, id=f"{family.name}-{variant.name}-{'-'.join(row.hardware)}-{number}")
        for family in get_registry().families.values()
        for variant in family.variants
        if variant.config
        for number, row in enumerate(family.matrix.of_size(variant.size, experimental=False))
        if row.hardware[0].startswith("atlas")
    ]


@pytest.mark.parametrize(("variant", "row"), vendor_rows())
def test_what_a_vendor_claims_fits_the_largest_card_that_is_sold(variant: Any, row: Any) -> None:
    workload, methods = Workload(2048, 16, 2048), get_registry().quantization_methods
    splits = {split for world in row.world_size for layout in row.parallelism for split in splits_of(layout, world)}
    assert splits
    for hardware in row.hardware:
        memory = max(PRODUCTS[hardware].memory_gib) * GIB
        for split in splits:
            for dtype in row.dtype:
                for quantization in row.quantization:
                    bits = methods[quantization].weight_bits if quantization in methods else None
                    plan = plan_rank(variant.config, dtype, split, workload, weight_bits=bits)
                    assert plan.cache_tokens(memory, 0.9) > 2048, (split, dtype, quantization)


def test_every_dtype_has_a_size() -> None:
    assert {"float32", "bfloat16", "float16", "int8"} <= set(ITEMSIZE)
