"""Rope scaling against transformers, of every kind: frequencies, tables, the scale of attention, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels import cpu, reference
from npu_zoo.nn.kernels.table import bind_kernels
from npu_zoo.nn.rotary import RotaryEmbedding, attention_factor, inverse_frequencies, softmax_scale
from npu_zoo.registry import get_registry

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8}


def raw(rope: dict[str, Any], head_dim: int = 16, positions: int = 256, **more: Any) -> dict[str, Any]:
    """A config.json in the spelling of transformers 5."""
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": head_dim,
        "vocab_size": 9,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_theta": 10000.0, **rope},
        **more,
    }


def context(max_model_len: int, dtype: torch.dtype = torch.float32) -> BuildContext:
    choices = [
        KernelChoice(spec.operation, spec.name, spec.implementation, "", True)
        for spec in get_registry().kernels.values()
        if spec.name.startswith("reference_")
    ]
    return BuildContext(bind_kernels(choices), dtype, max_model_len)


def theirs(values: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**{**values, "rope_parameters": dict(values["rope_parameters"])})


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


@st.composite
def yarn_parameters(draw: st.DrawFn) -> dict[str, Any]:
    found = {
        "original_max_position_embeddings": draw(st.sampled_from([16, 64, 2048, 4096])),
        "beta_fast": draw(optional(st.sampled_from([32, 16.5, 4]))),
        "beta_slow": draw(optional(st.sampled_from([1, 0.5, 4]))),
        "attention_factor": draw(optional(st.sampled_from([1.0, 1.25]))),
        "mscale": draw(optional(st.sampled_from([0, 0.707, 1]))),
        "mscale_all_dim": draw(optional(st.sampled_from([0, 0.707, 1.0, 0.5]))),
    }
    stated = {key: value for key, value in found.items() if value is not None}
    return stated | draw(st.sampled_from([{}, {"truncate": True}, {"truncate": False}]))


@given(
    yarn=yarn_parameters(),
    kind=st.sampled_from(["linear", "dynamic", "yarn"]),
    factor=st.sampled_from([1.0, 2, 4.0, 3.7, 40.0]),
    head_dim=st.sampled_from([6, 16, 64, 128]),
    theta=st.sampled_from([1e4, 5e5]),
    length=st.integers(1, 5000),
)
def test_frequencies_are_transformers(
    yarn: dict[str, Any], kind: str, factor: float, head_dim: int, theta: float, length: int
) -> None:
    parameters = yarn if kind == "yarn" else {}
    values = raw({"rope_type": kind, "factor": factor, "rope_theta": theta, **parameters}, head_dim)
    due, due_factor = ROPE_INIT_FUNCTIONS[kind](theirs(values), seq_len=length)
    config = ModelConfig.from_hf(values)
    torch.testing.assert_close(inverse_frequencies(config, length), due, rtol=1e-6, atol=0)
    assert attention_factor(config.rope_scaling) == pytest.approx(due_factor, rel=1e-12)


SCALINGS = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn with mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [256, 700])
@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_are_transformers(kind: str, length: int, dtype: torch.dtype) -> None:
    values = raw(SCALINGS[kind], head_dim=32)
    positions = torch.arange(length)  # the last one makes transformers' dynamic scaling the run's
    due = LlamaRotaryEmbedding(theirs(values))(torch.empty(0, dtype=dtype), positions[None])
    found = RotaryEmbedding(ModelConfig.from_hf(values), context(length, dtype))(positions)
    for one, other in zip(found, due, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other[0, :, :16], rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", SCALINGS)
def test_latent_attention_rotates_and_scales_as_transformers(kind: str) -> None:
    values = raw(SCALINGS[kind], **LATENT)
    positions = torch.tensor([0, 3, 255])
    their_config = DeepseekV3Config(**{**values, "rope_parameters": dict(values["rope_parameters"])})
    due = DeepseekV3RotaryEmbedding(their_config)(torch.empty(0), positions[None])
    config = ModelConfig.from_hf({**values, "head_dim": None})
    for one, other in zip(RotaryEmbedding(config, context(256))(positions), due, strict=True):
        torch.testing.assert_close(one, other[0, :, :8], rtol=0, atol=1e-5)
    assert softmax_scale(config) == pytest.approx(DeepseekV3Attention(their_config, 0).scaling, rel=1e-12)


@pytest.mark.parametrize("kind", SCALINGS)
def test_other_attention_is_scaled_by_its_head_size_alone(kind: str) -> None:
    values = raw(SCALINGS[kind], head_dim=24)
    assert softmax_scale(ModelConfig.from_hf(values)) == LlamaAttention(theirs(values), 0).scaling


def test_dynamic_scaling_is_one_for_the_whole_run() -> None:
    config = ModelConfig.from_hf(raw(SCALINGS["dynamic"]))
    plain = ModelConfig.from_hf(raw(SCALINGS["none"]))
    assert torch.equal(inverse_frequencies(config, 256), inverse_frequencies(plain, 256))
    long = inverse_frequencies(config, 1024)
    assert (long[1:] < inverse_frequencies(plain, 1024)[1:]).all()
    assert torch.equal(RotaryEmbedding(config, context(1024))(torch.tensor([1]))[0][0], long.cos())


def test_yarn_applies_within_the_trained_length() -> None:
    short, long = (inverse_frequencies(ModelConfig.from_hf(raw(YARN)), length) for length in (8, 256))
    assert torch.equal(short, long)
    assert short[0] == 1.0
    assert short[-1] * 40 == pytest.approx(inverse_frequencies(ModelConfig.from_hf(raw({})), 8)[-1].item())


def test_an_unstated_factor_of_yarn_is_the_ratio_of_lengths() -> None:
    unstated = ModelConfig.from_hf(raw({**YARN, "factor": None}, positions=256)).rope_scaling
    assert unstated == ModelConfig.from_hf(raw({**YARN, "factor": 4.0})).rope_scaling


def test_nothing_is_computed_while_a_model_is_built() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(ModelConfig.from_hf(raw(YARN)), context(16))
    assert rotary(torch.tensor([0]))[0].device.type == "cpu"
    assert list(rotary.state_dict()) == []


# Interleaved pairs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("rows", "kv_heads", "dim"), [(1, 1, 2), (7, 1, 16), (5, 3, 64)])
def test_interleaved_pairs_are_transformers(
    rows: int, kv_heads: int, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(rows)
    # Queries are the end of wider heads, as in latent attention, and so are not contiguous.
    query = torch.randn(rows, 4, 8 + dim, generator=generator).to(dtype)[..., 8:]
    key = torch.randn(rows, kv_heads, dim, generator=generator).to(dtype)
    cos, sin = (torch.randn(rows, dim // 2, generator=generator).to(dtype) for _ in "ab")
    kept = query.clone(), key.clone()
    tables = [torch.cat((table, table), -1)[None] for table in (cos, sin)]
    due = apply_rotary_pos_emb_interleave(query.transpose(0, 1)[None], key.transpose(0, 1)[None], *tables)
    plain = [reference.interleaved_rotary_embedding(x, cos, sin) for x in (query, key)]
    fast = [cpu.interleaved_rotary_embedding(x, cos, sin) for x in (query, key)]
    for other, one, quick in zip(due, plain, fast, strict=True):
        assert torch.equal(one, other[0].transpose(0, 1))
        assert quick.dtype == dtype
        assert quick.is_contiguous()
        assert ((quick - one).abs() <= tolerance * (1 + one.abs())).all()
    assert torch.equal(query, kept[0])
    assert torch.equal(key, kept[1])


def test_a_pair_turns_together() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    quarter, none = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    found = reference.interleaved_rotary_embedding(x, quarter, none)
    assert found.tolist() == [[[-2.0, 3.0, 1.0, 4.0]]]


# Refusals


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "yarn", "factor": 40}, "lacks original_max_position_embeddings"),
        ({**YARN, "original_max_position_embeddings": None}, "lacks original_max_position_embeddings"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings.*greater than 0.*given 0"),
        ({**YARN, "original_max_position_embeddings": "4k"}, "original_max_position_embeddings.*given '4k'"),
        ({**YARN, "original_max_position_embeddings": True}, "original_max_position_embeddings.*given True"),
        ({**YARN, "beta_fast": "fast"}, "beta_fast"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_fast 1 is below beta_slow 2"),
        ({**YARN, "mscale": -1}, "mscale"),
        ({**YARN, "factor": 0}, "factor"),
        ({**YARN, "factor": float("inf")}, "factor"),
        ({"rope_type": "linear"}, "'linear' and lacks its factor"),
        ({"rope_type": "dynamic", "factor": None}, "'dynamic' and lacks its factor"),
        ({"rope_type": "llama3", "factor": 8}, "'llama3'; known: none, linear, dynamic, yarn"),
        ({"rope_type": "longrope", "factor": 8}, "'longrope'; known: none, linear, dynamic, yarn"),
    ],
)
def test_scalings_that_cannot_be_are_refused(rope: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        ModelConfig.from_hf(raw(rope))


@pytest.mark.parametrize("inside", [True, False])
def test_partly_rotated_heads_are_refused(inside: bool) -> None:
    part = {"partial_rotary_factor": 0.5}
    config = ModelConfig.from_hf(raw(part) if inside else raw({}, **part))
    with pytest.raises(WeightsError, match=r"partial_rotary_factor 0.5"):
        RotaryEmbedding(config, context(8))


# Lengths and differences


@pytest.mark.parametrize(
    ("rope", "longest", "unscaled"),
    [
        ({}, 16384, 16384),
        ({"rope_type": "linear", "factor": 4}, 16384, 4096),
        ({"rope_type": "dynamic", "factor": 4}, 65536, 16384),
        ({**YARN, "factor": 4, "original_max_position_embeddings": 4096}, 16384, 4096),
    ],
)
def test_the_longest_sequence_with_and_without_scaling(rope: dict[str, Any], longest: int, unscaled: int) -> None:
    config = ModelConfig.from_hf(raw(rope, positions=16384))
    assert (config.context_length, config.unscaled_length) == (longest, unscaled)


def test_differences_show_the_parameters_that_differ() -> None:
    one = ModelConfig.from_hf(raw({**YARN, "mscale": 1}))
    other = ModelConfig.from_hf(raw({**YARN, "mscale": 0.707, "beta_fast": 16}))
    found = "yarn 40 (original_max_position_embeddings 64, mscale 1.0)"
    due = "yarn 40 (original_max_position_embeddings 64, beta_fast 16.0, mscale 0.707)"
    assert one.differences(other) == [f"rope_scaling: {found}, not {due}"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({**YARN, "factor": 40, "mscale": 1}, {**YARN, "mscale": 1.0, "beta_fast": 32, "attention_factor": None}),
        ({**YARN, "truncate": True, "finetuned": True}, YARN),
        ({"rope_type": "linear", "factor": 4, "original_max_position_embeddings": 64}, SCALINGS["linear"]),
        ({"rope_type": "default", "factor": 2}, {}),
    ],
)
def test_spellings_of_one_scaling_do_not_differ(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(raw(one)).differences(ModelConfig.from_hf(raw(other))) == []
