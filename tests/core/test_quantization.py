from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.compressed_tensors import read_compressed_tensors
from npu_zoo.core.quantization import QuantizationConfig, scheme_of, scheme_operations
from npu_zoo.testing.quantized import _config

TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("bits", "activations", "group_size", "scheme"),
    [(8, 16, None, "w8a16"), (8, 16, 64, "w8a16"), (4, 16, None, "w4a16"), (4, 16, 128, "w4a16"), (8, 8, None, "w8a8")],
)
def test_schemes(bits: int, activations: int, group_size: int | None, scheme: str) -> None:
    found = read_compressed_tensors(_config(bits, activations, group_size))
    assert (found.scheme, found.weight_bits, found.group_size) == (scheme, bits, group_size)
    assert found.ignores("lm_head")
    assert found.ignores("model.layers.3.self_attn.kv_b_proj")
    assert not found.ignores("model.layers.3.mlp.gate_proj")
    assert not found.ignores("lm_head_of_another")
    assert found.codes_per_word == (1 if activations == 8 else 32 // bits)


def changed(path: str, value: Any, **more: Any) -> dict[str, Any]:
    raw = copy.deepcopy(_config(8, 16, None))
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    return raw | more


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "only quant_method compressed-tensors is read"),
        ("int8", "only quant_method compressed-tensors is read"),
        (changed("format", "float-quantized"), "format"),
        (changed(f"{WEIGHTS}.type", "float"), "weights.type"),
        (changed(f"{WEIGHTS}.symmetric", False), "weights.symmetric"),
        (changed(f"{WEIGHTS}.num_bits", 2), "weights.num_bits"),
        (changed(f"{WEIGHTS}.strategy", "tensor"), "weights.strategy"),
        (changed(f"{WEIGHTS}.strategy", "group"), "strategy group lacks its group_size"),
        (changed("quantization_status", "frozen"), "quantization_status"),
        (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
        (changed("config_groups.group_0.targets", ["Embedding"]), "targets"),
        (changed("config_groups.group_0.input_activations", TOKENS), "pack-quantized goes with activations of 16 bits"),
        (changed("format", "int-quantized"), "int-quantized goes with activations of 8 bits"),
        (changed("ignore", ["re:("]), "ignore holds a pattern that cannot be read"),
        (changed("config_groups", {}), "config_groups"),
    ],
)
def test_what_is_not_read_says_why(raw: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_compressed_tensors(raw)


def test_a_scheme_may_have_a_name_of_its_own() -> None:
    assert QuantizationConfig(weight_bits=3, activation_bits=16).scheme == "w3a16"
    mine = QuantizationConfig(weight_bits=8, activation_bits=16, scheme="mine")
    assert (mine.scheme, mine.codes_per_word) == ("mine", 1)
    with pytest.raises(ValueError, match="weight_bits"):
        QuantizationConfig(weight_bits=0, activation_bits=16)
    with pytest.raises(ValueError, match="ignore holds a pattern that cannot be read"):
        QuantizationConfig(weight_bits=8, activation_bits=16, ignore=("re:(",))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(["format", "config_groups", "ignore", f"{WEIGHTS}.num_bits", WEIGHTS]), value=JSON)
def test_anything_else_is_a_value_error_at_most(key: str, value: Any) -> None:
    try:
        found = read_compressed_tensors(changed(key, value))
    except ValueError:
        return
    assert found.scheme in ("w8a16", "w4a16", "w8a8")


def test_operations_and_their_schemes() -> None:
    assert scheme_operations("w8a16") == ("linear_w8a16", "experts_w8a16")
    assert [scheme_of(name) for name in ("linear_w8a16", "experts_w4a8", "linear", "head_linear", "rms_norm")] == [
        "w8a16", "w4a8", None, None, None,
    ]  # fmt: skip
