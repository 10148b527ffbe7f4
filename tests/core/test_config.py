"""ModelConfig.from_hf, SamplingParams, EngineArgs and the sealed EngineConfig."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import npu_zoo
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import ConfigError, UsageError, WeightsError
from npu_zoo.core.model_config import ModelConfig, RopeScaling
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.registry import get_registry

PACKAGE = Path(npu_zoo.__file__).parent


def raw(**changes: Any) -> dict[str, Any]:
    """A config.json in the spelling of transformers 4."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
    }
    return values | changes


YARN = {"mscale": 1.0, "beta_fast": 32, "original_max_position_embeddings": 4096}
V4_AND_V5 = [
    ({"rope_theta": 1e5}, {"rope_type": "default", "rope_theta": 1e5}, RopeScaling()),
    (
        {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
        RopeScaling(kind="linear", factor=4.0),
    ),
    (
        {"rope_theta": 1e5, "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2}},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e5},
        RopeScaling(kind="dynamic", factor=2.0),
    ),
    (
        {"rope_theta": 1e5, "rope_scaling": {"type": "yarn", "factor": 40, **YARN}},
        {"rope_type": "yarn", "factor": 40, **YARN, "rope_theta": 1e5},
        RopeScaling(kind="yarn", factor=40.0, parameters=YARN),
    ),
]


@pytest.mark.parametrize(("v4", "v5", "scaling"), V4_AND_V5)
def test_rope_reads_the_same_in_both_spellings(v4: dict[str, Any], v5: dict[str, Any], scaling: RopeScaling) -> None:
    old, new = ModelConfig.from_hf(raw(**v4)), ModelConfig.from_hf(raw(rope_parameters=v5))
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (1e5, scaling)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(("value", "expected"), [("bfloat16", "bfloat16"), ("float8_e4m3fn", None), (None, None)])
def test_dtype_reads_the_same_in_both_spellings(key: str, value: str | None, expected: str | None) -> None:
    assert ModelConfig.from_hf(raw(**{key: value})).torch_dtype == expected


def test_what_may_be_absent_follows_from_the_rest() -> None:
    config = ModelConfig.from_hf(raw())
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (64, 4, 10000.0)
    assert (config.eos_token_id, config.tie_word_embeddings, config.extra) == ((), False, {})


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(["head_dim", "num_key_value_heads", "rope_scaling", "eos_token_id", "rms_norm_eps"])
    assert ModelConfig.from_hf(raw(**nulls)).model_copy(update={"extra": {}}) == ModelConfig.from_hf(raw())


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 7], (2, 7))])
def test_one_end_id_or_several(eos: Any, expected: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(raw(eos_token_id=eos)).eos_token_id == expected


def test_a_family_reads_its_own_keys() -> None:
    source = raw(sliding_window=64)
    assert ModelConfig.from_hf(source).extra == {"sliding_window": 64}
    assert source == raw(sliding_window=64)


def test_experts_and_latent_attention_are_parts_of_their_own() -> None:
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_group": 2}
    latent = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24}
    config = ModelConfig.from_hf(raw(**experts, **latent, head_dim=16, q_lora_rank=None), {"topk_method": "noaux_tc"})
    assert config.moe
    assert config.mla
    assert (config.moe.n_group, config.moe.topk_method, config.moe.topk_group) == (2, "noaux_tc", 1)
    assert (config.head_dim, config.mla.cache_dim, config.mla.q_lora_rank) == (48, 80, None)
    assert config.extra == {}
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert "head_dim" not in config.to_hf()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_intermediate_size": 32}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_group": 3}, "do not divide into 3 groups"),
        ({"moe_intermediate_size": 32, "num_experts_per_tok": 5, "n_group": 2}, "5 experts per token cannot be chosen"),
        ({"moe_intermediate_size": 32, "num_experts_per_tok": 2, "topk_method": "random"}, "topk_method"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        ModelConfig.from_hf(raw(n_routed_experts=8, **changes))


def test_missing_keys_are_named_at_once() -> None:
    source = raw(num_hidden_layers="two")
    del source["hidden_size"], source["vocab_size"]
    with pytest.raises(WeightsError, match="lacks hidden_size, num_hidden_layers, vocab_size"):
        ModelConfig.from_hf(source)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'; known: none, linear, dynamic, yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": ["linear"]}, "rope_parameters"),
    ],
)
def test_a_value_of_the_wrong_form_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        ModelConfig.from_hf(raw(**changes))


def test_differences_name_both_values() -> None:
    one = ModelConfig.from_hf(raw(rope_scaling={"type": "linear", "factor": 4}))
    other = ModelConfig.from_hf(raw(vocab_size=32256, rms_norm_eps=1e-5))
    assert one.differences(other) == ["vocab_size: 1000, not 32256", "rope_scaling: linear 4, not none 1"]
    assert one.differences(one) == []


def real(folder: Path, name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((folder / "configs" / f"{name}.config.json").read_text()))


def test_the_real_deepseek_coder_config_is_the_variant_s(test_data: Path) -> None:
    config = real(test_data, "deepseek-coder-6.7b-instruct")
    _, variant = get_registry().find("deepseek_coder:6.7b-instruct")
    assert variant is not None
    assert variant.config is not None
    assert config.differences(variant.config) == []
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert (config.eos_token_id, config.bos_token_id) == (variant.config.eos_token_id, variant.config.bos_token_id)


def test_the_real_deepseek_r1_config() -> None:
    assert_shape_of_v3(real(Path(__file__).parents[1] / "data", "deepseek-r1.xft"))


@pytest.mark.parametrize("name", ["DeepSeek-V3.aic", "DeepSeek-V3.ascend", "DeepSeek-R1.aic"])
def test_real_deepseek_v3_configs(test_data: Path, name: str) -> None:
    assert_shape_of_v3(real(test_data, name))


def assert_shape_of_v3(config: ModelConfig) -> None:
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (7168, 61, 128)
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("yarn", 40.0)
    assert config.rope_scaling.parameters["original_max_position_embeddings"] == 4096
    assert config.moe
    assert config.mla
    assert (config.moe.n_routed_experts, config.moe.topk_method, config.mla.cache_dim) == (256, "noaux_tc", 576)


def test_the_real_deepseek_v2_lite_config(test_data: Path) -> None:
    config = real(test_data, "DeepSeek-V2-Lite.kt")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (2048, 27, 102400)
    assert config.rope_scaling.kind == "yarn"


# Sampling parameters

OUT_OF_RANGE = [
    ("n", 0),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("logprobs", -1),
    ("prompt_logprobs", True),
    ("seed", 2**64),
    ("seed", 1.0),
    ("stop", [""]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["</s>"]),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_sampling_parameter_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"\b{name}\b"):
        SamplingParams(**{name: value})


@given(st.lists(st.sampled_from(OUT_OF_RANGE), min_size=1).map(dict))
def test_all_sampling_faults_are_named_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**values)
    assert all(name in str(caught.value) for name in values)
    assert len(str(caught.value).split(";")) == len(values)


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(UsageError, match="min_tokens=9 exceeds max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(min_tokens=9, max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("top_p", 1), ("temperature", 0), ("seed", 2**64 - 1), ("seed", -(2**63)), ("logprobs", 0)],
)
def test_the_ends_of_the_ranges_are_inside(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_sampling_params_have_one_normal_form() -> None:
    assert SamplingParams(stop="\n\n") == SamplingParams(stop=["\n\n"]) == SamplingParams(stop=("\n\n",))
    assert SamplingParams(stop="\n\n").stop_strings == ("\n\n",)
    assert SamplingParams(stop_token_ids=[2]).stop_token_ids == (2,)
    assert (SamplingParams(temperature=0).greedy, SamplingParams().greedy) == (True, False)


# Requests, asked and checked


def test_engine_args_forbid_unknown_names() -> None:
    with pytest.raises(ValidationError, match="tensor_parallel"):
        EngineArgs(tensor_parallel=2)  # type: ignore[call-arg]


def test_every_flag_is_described() -> None:
    assert [name for name, found in EngineArgs.model_fields.items() if not found.description] == []


def test_an_engine_config_cannot_be_made_by_hand() -> None:
    values = dict.fromkeys(field.name for field in dataclasses.fields(EngineConfig))
    with pytest.raises(ConfigError, match=r"npu_zoo\.dispatch\.resolve"):
        EngineConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"npu_zoo\.dispatch\.resolve"):
        EngineConfig(**{**values, "seal": object()})  # type: ignore[arg-type]


def test_only_resolve_and_the_testing_kit_know_the_seal() -> None:
    allowed = {"core/config.py", "dispatch.py"}
    found = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if _mentions_seal(p)}
    assert "core/config.py" in found
    assert {name for name in found if name not in allowed and not name.startswith("testing/")} == set()


def _mentions_seal(path: Path) -> bool:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names |= {getattr(node, "id", ""), getattr(node, "attr", ""), str(getattr(node, "value", ""))}
        names |= {alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
    return "_SEAL" in names
