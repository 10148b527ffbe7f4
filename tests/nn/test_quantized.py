"""Quantized layers: the checkpoint's layout against loops over values, and kernels against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import PluginError, WeightsError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.core.specs import KernelSpec
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels import cpu_quantized, reference
from npu_zoo.nn.kernels.quantized import QuantizedWeight, pack_nibbles, unpack_nibbles
from npu_zoo.nn.kernels.table import bind_kernels
from npu_zoo.nn.linear import Linear
from npu_zoo.nn.quantization import Int8Weights, PackedWeights, WeightMethod, bind_quantization
from npu_zoo.registry import get_registry, load_code
from npu_zoo.selection import select_kernels
from npu_zoo.testing.quantized import packed_words

KERNELS = [
    (spec, dtype)
    for spec in get_registry().kernels.values()
    if spec.operation.startswith("linear_") and spec.chip in ("any", "cpu")
    for dtype in spec.dtypes
]
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}
"""Relative to the largest result."""


def config_of(bits: int, activations: int = 16, group_size: int | None = None) -> QuantizationConfig:
    return QuantizationConfig(weight_bits=bits, activation_bits=activations, group_size=group_size)


def weight_of(rows: int, width: int, bits: int, group_size: int | None, dtype: str) -> QuantizedWeight:
    """Random codes with both ends of their range, and a channel of zeros."""
    generator, half = torch.Generator().manual_seed(rows + width), 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, width), dtype=torch.int8, generator=generator)
    codes[0, 0], codes[-1, -1], codes[1] = -half, half - 1, 0
    scale = torch.rand(rows, width // (group_size or width), generator=generator) / half + 1e-3
    return QuantizedWeight(codes, scale.to(getattr(torch, dtype)).float(), bits, getattr(torch, dtype))


def exact(weight: QuantizedWeight) -> Tensor:
    """Value by value, in float64."""
    found = torch.empty(weight.codes.shape, dtype=torch.float64)
    size = weight.codes.shape[1] // weight.scale.shape[1]
    for row, codes in enumerate(weight.codes.tolist()):
        found[row] = torch.tensor([code * float(weight.scale[row, i // size]) for i, code in enumerate(codes)])
    return found


@cache
def due_weight(shape: tuple[int, int, int | None], bits: int, dtype: str) -> Tensor:
    return exact(weight_of(shape[0], shape[1], bits, shape[2], dtype))


def rounded(x: Tensor) -> Tensor:
    """Each row in 127 steps of its largest value."""
    rows = []
    for row in x.float():
        step = float(row.abs().max()) / 127 or 1.0
        rows.append((row / step).round().double() * step)
    return torch.stack(rows)


SHAPES = [(48, 64, None), (70, 96, 32), (130, 128, 64), (65, 256, 128), (20, 33, None), (64, 100, None), (3, 1, None)]


CASES = [
    pytest.param(spec, dtype, shape, id=f"{spec.name}-{dtype}-{shape}")
    for spec, dtype in KERNELS
    for shape in SHAPES
    if not (shape[2] and spec.operation == "linear_w8a8")  # which has a scale per channel
]


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize(("spec", "dtype", "shape"), CASES)
def test_a_kernel_equals_its_dequantized_weight(
    spec: KernelSpec, dtype: str, shape: tuple[int, int, int | None], rows: int
) -> None:
    scheme = spec.operation.removeprefix("linear_")
    weight, kernel = weight_of(shape[0], shape[1], int(scheme[1]), shape[2], dtype), load_code(spec.implementation)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(getattr(torch, dtype))
    x[0] = 0 if rows > 1 else x[0]
    packed = kernel.pack(weight)
    weight.codes.fill_(0)  # what it was given is overwritten by the next layer
    with torch.inference_mode():
        found = kernel.apply(x, packed)
    operand = rounded(x) if scheme == "w8a8" else x.double()
    due = operand @ due_weight(shape, int(scheme[1]), dtype).t()
    assert (found.dtype, found.shape) == (x.dtype, due.shape)
    assert float((found.double() - due).abs().max()) <= TOLERANCE[dtype] * float(due.abs().max().clamp(min=1e-6))
    assert torch.equal(kernel.apply(x[None], packed)[0], found)


def test_the_fast_paths_are_taken_where_they_fit() -> None:
    """Otherwise the tests above would compare the reference with itself."""
    if cpu_quantized._channels_of_a_block() is None:
        pytest.skip("torch packs int4 in another way on this CPU")
    for kernel, bits in ((cpu_quantized.WeightOnlyInt8Linear, 8), (cpu_quantized.WeightOnlyInt4Linear, 4)):
        for group_size in (None, 32):
            assert not isinstance(kernel.pack(weight_of(48, 64, bits, group_size, "bfloat16")), reference.StoredCodes)
        assert isinstance(kernel.pack(weight_of(20, 33, bits, None, "bfloat16")), reference.StoredCodes)


def test_another_layout_of_torchs_int4_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_quantized, "_channels_of_a_block", lambda: None)
    assert isinstance(
        cpu_quantized.WeightOnlyInt4Linear.pack(weight_of(48, 64, 4, None, "bfloat16")), reference.StoredCodes
    )


def test_sums_that_are_not_whole_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_quantized, "_sums_are_exact", lambda: False)
    packed = cpu_quantized.DynamicInt8Linear.pack(weight_of(48, 64, 8, None, "float32"))
    assert isinstance(packed, reference.StoredCodes)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), width=st.integers(1, 40), seed=st.integers(0, 999))
def test_packed_codes_come_back(bits: int, rows: int, width: int, seed: int) -> None:
    half, generator = 1 << (bits - 1), torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, width), generator=generator)
    method = PackedWeights(config_of(bits))
    due = method.tensors(rows, width)
    tensors = {"weight_packed": packed_words(codes, bits), "weight_scale": torch.ones(rows, 1)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: due[n][0] for n in tensors}
    assert torch.equal(method.weight(tensors, width, torch.float32).codes.long(), codes)
    if bits == 4:
        stored = pack_nibbles(codes.to(torch.int8))
        assert stored.shape == (rows, -(-width // 2))
        assert torch.equal(unpack_nibbles(stored, width).long(), codes)


def test_words_are_those_of_the_layout() -> None:
    """Written out: value j in bits 4 * j, with 8 added; and bits 8 * j, with 128 added."""
    codes = torch.tensor([[-8, 7, 0, 1, 2, 3, 4, -1, 5]])
    words = [0x7CBA98F0, 0xD]
    assert packed_words(codes, 4).tolist() == [words]
    assert packed_words(torch.tensor([[-128, 127, 0, 1, 2]]), 8).tolist() == [[0x8180FF00 - (1 << 32), 0x82]]


def contexts(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[BuildContext, Any]:
    config = config_of(int(scheme[1]), int(scheme[3:]))
    registry = get_registry()
    name: Any = str(dtype).removeprefix("torch.")
    kernels = bind_kernels(select_kernels(registry.kernels, "cpu", name, quantization=scheme))
    method = registry.quantization_methods[scheme].method
    return BuildContext(kernels, dtype, 64), bind_quantization(config, method, kernels)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8"])
def test_stacked_parts_with_halves(scheme: str) -> None:
    """Rows of heads come in halves, as in a plain layer, codes and scales alike."""
    context, quantization = contexts(scheme)
    layer = Linear(16, {"q_proj": 12, "kv": 5}, context, halves={"q_proj": (4, 2)})
    layer.quantize(quantization)
    views, bits = layer.checkpoint_views(), int(scheme[1])
    weights = {"q_proj": weight_of(12, 16, bits, None, "float32"), "kv": weight_of(5, 16, bits, None, "float32")}
    for part, weight in weights.items():
        stored = weight.codes if scheme == "w8a8" else packed_words(weight.codes.long(), bits)
        views[f"{part}.{'weight' if scheme == 'w8a8' else 'weight_packed'}"].copy_(stored)
        views[f"{part}.weight_scale"].copy_(weight.scale)
        if scheme != "w8a8":
            views[f"{part}.weight_shape"].copy_(torch.tensor(weight.codes.shape))
    layer.pack()
    x = torch.randn(3, 16)
    nope, rope, kv = layer.by_parts(x)
    operand = rounded(x) if scheme == "w8a8" else x.double()
    query = operand @ exact(weights["q_proj"]).t()
    heads = query.view(3, 2, 6)
    assert torch.allclose(nope.double(), heads[..., :4].flatten(1), atol=1e-5)
    assert torch.allclose(rope.double(), heads[..., 4:].flatten(1), atol=1e-5)
    assert torch.allclose(kv.double(), operand @ exact(weights["kv"]).t(), atol=1e-5)


def test_groups_have_to_divide_the_inputs() -> None:
    with pytest.raises(WeightsError, match="groups of 24 inputs do not divide its 64 inputs"):
        PackedWeights(config_of(4, group_size=24)).tensors(8, 64)
    assert Int8Weights(config_of(8, 8)).tensors(8, 64)["weight_scale"] == ((8, 1), torch.float32)


def test_a_scheme_without_kernels_is_refused() -> None:
    kernels: Any = SimpleNamespace(more={"linear_w8a16": reference.DequantizedLinear})
    with pytest.raises(PluginError, match="no plugin registers a kernel for experts_w8a16, which w8a16 takes"):
        bind_quantization(config_of(8), "npu_zoo.nn.quantization:PackedWeights", kernels)


def test_a_model_without_experts_takes_a_scheme_without_kernels_for_them() -> None:
    kernels: Any = SimpleNamespace(more={"linear_w8a16": reference.DequantizedLinear})
    bound = bind_quantization(config_of(8), "npu_zoo.nn.quantization:PackedWeights", kernels, has_experts=False)
    assert (bound.linear, bound.experts) == (reference.DequantizedLinear, None)
    kernels.more.clear()
    with pytest.raises(PluginError, match="no plugin registers a kernel for linear_w8a16, which w8a16 takes"):
        bind_quantization(config_of(8), "npu_zoo.nn.quantization:PackedWeights", kernels, has_experts=False)


class RowScales(WeightMethod):
    """A layout of somebody else's: ``weight`` int8, and ``scale`` of one dimension."""

    def tensors(self, rows: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((rows, in_features), torch.int8), "scale": ((rows,), torch.float32)}

    def weight(self, tensors: Any, in_features: int, dtype: torch.dtype) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight"], tensors["scale"].unsqueeze(1), 8, dtype)


def test_another_layouts_scales_follow_the_rows_of_halves() -> None:
    context, quantization = contexts("w8a16")
    quantization = replace(quantization, method=RowScales(quantization.config))
    layer = Linear(16, {"q_proj": 12, "kv": 5}, context, halves={"q_proj": (4, 2)})
    layer.quantize(quantization)
    weights = {"q_proj": weight_of(12, 16, 8, None, "float32"), "kv": weight_of(5, 16, 8, None, "float32")}
    for part, weight in weights.items():
        layer.checkpoint_views()[f"{part}.weight"].copy_(weight.codes)
        layer.checkpoint_views()[f"{part}.scale"].copy_(weight.scale[:, 0])
    layer.pack()
    x = torch.randn(3, 16)
    nope, rope, kv = layer.by_parts(x)
    heads = (x.double() @ exact(weights["q_proj"]).t()).view(3, 2, 6)
    assert torch.allclose(nope.double(), heads[..., :4].flatten(1), atol=1e-5)
    assert torch.allclose(rope.double(), heads[..., 4:].flatten(1), atol=1e-5)
    assert torch.allclose(kv.double(), x.double() @ exact(weights["kv"]).t(), atol=1e-5)


class Two:
    """The second of two ranks, which say nothing to each other here."""

    size, rank = 2, 1


@pytest.mark.parametrize(
    ("scheme", "method", "shared"),
    [
        ("w8a16", RowScales, {"weight"}),
        ("w8a8", Int8Weights, {"weight"}),
        ("w4a16", PackedWeights, {"weight_packed"}),
        ("w4a16-groups", PackedWeights, {"weight_packed", "weight_scale"}),
    ],
)
def test_ranks_share_columns_of_those_tensors_that_have_them(scheme: str, method: Any, shared: set[str]) -> None:
    context, quantization = contexts(scheme.partition("-")[0])
    config = quantization.config.model_copy(update={"group_size": 16 if "-" in scheme else None})
    two: Any = Two()
    ranks = replace(context.ranks, tp=two)
    layer = Linear(64, {"o_proj": 6}, replace(context, ranks=ranks), split="columns")
    layer.quantize(replace(quantization, config=config, method=method(config)))
    shards = layer.shards()
    assert {name.partition(".")[2] for name in shards} == shared
    whole = method(config).tensors(6, 64)
    for name, shard in shards.items():
        assert (shard.dim, shard.stop, 2 * shard.start) == (1, shard.size, shard.size)
        assert shard.whole(tuple(layer.checkpoint_views()[name].shape)) == whole[name.partition(".")[2]][0]


def test_operations_of_other_schemes_are_left_out() -> None:
    registry, dense = get_registry(), ModelConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=9, max_position_embeddings=64,
    )  # fmt: skip
    plain = {choice.operation for choice in select_kernels(registry.kernels, "cpu", "bfloat16", dense)}
    chosen = {c.operation: c for c in select_kernels(registry.kernels, "cpu", "bfloat16", dense, "w4a16")}
    assert set(chosen) - plain == {"linear_w4a16", "experts_w4a16"}
    assert plain <= set(chosen)
    assert chosen["experts_w4a16"].reason == "this model does not use it"
    assert isinstance(chosen["linear_w4a16"], KernelChoice)
    assert "reference_linear_w4a16" in " ".join(chosen["linear_w4a16"].passed_over)


def test_a_chip_without_kernels_falls_back_and_says_so() -> None:
    """310P has an operator for w8a8 alone."""
    registry = get_registry()
    kernels = {n: spec.model_copy(update={"requires": ()}) for n, spec in registry.kernels.items()}
    for scheme, fallback in (("w8a16", True), ("w4a16", True), ("w8a8", False)):
        choices = select_kernels(kernels, "ascend310p", "float16", quantization=scheme)
        linear = next(choice for choice in choices if choice.operation == f"linear_{scheme}")
        assert linear.fallback is fallback


def test_dequantizing_for_many_rows_takes_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most values that are dequantized at once stay below the bound, whatever the weight's size."""
    seen: list[int] = []
    product = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: None = None) -> Tensor:
        seen.append(weight.numel())
        return product(x, weight)

    monkeypatch.setattr(reference, "_BLOCK_VALUES", 64 * 128)
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for kernel, bits in ((reference.DequantizedLinear, 4), (cpu_quantized.WeightOnlyInt8Linear, 8)):
        weight = weight_of(1000, 128, bits, None, "bfloat16")
        kernel.apply(torch.randn(40, 128).bfloat16(), kernel.pack(weight))
    assert len(seen) == 2 * 16
    assert max(seen) == 64 * 128
