"""Every registered kernel against the reference, and the reference against transformers and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from npu_zoo.core.config import KernelChoice
from npu_zoo.core.errors import PluginError
from npu_zoo.core.model_config import ModelConfig, RopeScaling
from npu_zoo.core.quantization import scheme_operations
from npu_zoo.core.specs import KernelSpec
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.table import Kernels, bind_kernels
from npu_zoo.nn.rotary import RotaryEmbedding
from npu_zoo.registry import get_registry, load_code
from npu_zoo.selection import SHARED_OPERATIONS, unavailable

TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
QUANTIZED = {name for scheme in get_registry().quantization_methods for name in scheme_operations(scheme)}
ELSEWHERE = {"route_tokens", "experts", "top_k_top_p"} | QUANTIZED
"""Operations whose kernels test_moe.py, test_quantized.py and the sampler's tests test."""
KERNELS = [
    (spec, dtype)
    for spec in get_registry().kernels.values()
    if spec.chip in ("any", "cpu") and not unavailable(spec) and spec.operation not in ELSEWHERE
    for dtype in spec.dtypes
]


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return noise(rows, 48, dtype=dtype), noise(48, dtype=dtype, seed=1), 1e-6


def _add_norm(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return noise(rows, 48, dtype=dtype), noise(rows, 48, dtype=dtype, seed=2), noise(48, dtype=dtype, seed=1), 1e-6


def _rotary(rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    # Queries and keys come as parts of one projection, and so are not contiguous.
    query, key, _ = noise(rows, 4 + 2 + 2, 16, dtype=dtype).split((4, 2, 2), dim=1)
    angles = torch.outer(torch.arange(rows).float(), 1.0 / 10 ** torch.linspace(0, 3, 8))
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


INPUTS: dict[str, Callable[[int, torch.dtype], tuple[Any, ...]]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "rotary_embedding": _rotary,
    "interleaved_rotary_embedding": lambda rows, dtype: _rotary(rows, dtype)[1:],
    "head_linear": lambda rows, dtype: (noise(rows, 3, 16, dtype=dtype), noise(3, 16, 24, dtype=dtype, seed=1)),
    "silu_and_mul": lambda rows, dtype: (noise(rows, 96, dtype=dtype),),
    "linear": lambda rows, dtype: (noise(rows, 48, dtype=dtype), noise(40, 48, dtype=dtype, seed=1)),
}
"""Arguments of every operation for a number of rows; for linear, the input and the weight."""


def run(implementation: Any, operation: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if operation == "linear":
        x, weight = arguments
        return (implementation.apply(x, implementation.pack(weight)),)
    result = implementation(*arguments)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("spec", "dtype"), KERNELS, ids=lambda value: getattr(value, "name", value))
def test_against_the_reference(spec: KernelSpec, dtype: str, rows: int) -> None:
    oracle = reference.Linear if spec.operation == "linear" else getattr(reference, spec.operation)
    with torch.inference_mode():
        arguments = INPUTS[spec.operation](rows, getattr(torch, dtype))
        kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        found = run(load_code(spec.implementation), spec.operation, arguments)
        due = run(oracle, spec.operation, tuple(a.float() if isinstance(a, Tensor) else a for a in kept))
    for one, other, name in zip(found, due, "abcd", strict=False):
        assert one.dtype == getattr(torch, dtype), name
        assert one.shape == other.shape
        scale = 1 + other.abs()
        assert ((one.float() - other).abs() / scale).max() <= TOLERANCE[dtype] * (
            10 if spec.operation == "linear" else 1
        )
    for argument, before in zip(arguments, kept, strict=True):
        assert not isinstance(argument, Tensor) or torch.equal(argument, before), "an argument was changed"


def test_every_operation_has_inputs_and_a_reference() -> None:
    operations = {spec.operation for spec in get_registry().kernels.values()} - ELSEWHERE
    assert operations == set(INPUTS)
    assert operations == {spec.operation for spec, _ in KERNELS if spec.name.startswith("reference_")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rms_norm_is_transformers(dtype: str) -> None:
    x, weight, eps = _norm(5, getattr(torch, dtype))
    theirs = LlamaRMSNorm(48, eps)
    theirs.weight.data = weight
    assert torch.equal(reference.rms_norm(x, weight, eps), theirs(x).detach())


def test_rms_norm_closed_form() -> None:
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert reference.rms_norm(x, weight, 0.0).tolist() == [pytest.approx([3 / 2.5, 2 * 4 / 2.5, 0, 0])]
    assert reference.rms_norm(x, weight, 93.75).tolist() == [pytest.approx([0.3, 0.8, 0, 0])]
    assert reference.rms_norm(torch.zeros(1, 4), weight, 1e-6).tolist() == [[0, 0, 0, 0]]


def test_add_rms_norm_is_the_norm_of_the_sum() -> None:
    x, residual, weight, eps = _add_norm(3, torch.float32)
    normed, total = reference.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference.rms_norm(x + residual, weight, eps))


def test_silu_and_mul_closed_form() -> None:
    x = torch.tensor([[0.0, 1.0, -2.0, 5.0, 3.0, 0.5]])
    sigmoid = torch.sigmoid(torch.tensor([0.0, 1.0, -2.0]))
    assert torch.allclose(reference.silu_and_mul(x), torch.tensor([[0.0, 1.0, -2.0]]) * sigmoid * x[:, 3:])


def context(dtype: torch.dtype, length: int = 64) -> BuildContext:
    choices = [
        KernelChoice(spec.operation, spec.name, spec.implementation, "", True)
        for spec in get_registry().kernels.values()
        if spec.name.startswith("reference_")
    ]
    return BuildContext(bind_kernels(choices), dtype, length)


def config(head_dim: int, theta: float, scaling: RopeScaling) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        vocab_size=9,
        max_position_embeddings=64,
        rope_theta=theta,
        rope_scaling=scaling,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [6, 16, 128])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_rotary_embedding_is_transformers(dtype: torch.dtype, head_dim: int, factor: float | None) -> None:
    positions = torch.tensor([0, 1, 5, 63, 17])
    query, key = noise(5, 4, head_dim, dtype=dtype), noise(5, 2, head_dim, dtype=dtype, seed=1)
    rope = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            rope_parameters={"rope_theta": 1e5, **rope},
        )
    )
    cos, sin = theirs(query, positions[None])
    due = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    scaling = RopeScaling(kind="linear", factor=factor) if factor else RopeScaling()
    tables = RotaryEmbedding(config(head_dim, 1e5, scaling), context(dtype))(positions)
    found = reference.rotary_embedding(query, key, *tables)
    for one, other in zip(found, due, strict=True):
        assert torch.allclose(one.float(), other[0].transpose(0, 1).float(), atol=1e-5 if factor else 1e-6)


def choice(operation: str, implementation: str) -> KernelChoice:
    return KernelChoice(operation, operation, implementation, "", False)


def test_binding_names_what_is_missing() -> None:
    with pytest.raises(PluginError, match="registers a kernel for add_rms_norm, rotary_embedding, interleaved_rotary"):
        bind_kernels([choice("rms_norm", "npu_zoo.nn.kernels.reference:rms_norm")])


def test_binding_keeps_further_operations() -> None:
    names = [name for name in Kernels.__dataclass_fields__ if name != "more"]
    where = "npu_zoo.nn.kernels.reference:"
    choices = [choice(name, where + ("Linear" if name == "linear" else name)) for name in names]
    bound = bind_kernels([*choices, choice("grouped_matmul", where + "Linear")])
    assert bound.more == {"grouped_matmul": reference.Linear}
    assert bound.linear is reference.Linear
    with pytest.raises(PluginError, match="calls the operation head_norm, which its family's spec does not name"):
        bound.more["head_norm"]


def test_the_shared_operations_are_those_that_every_run_binds() -> None:
    assert set(SHARED_OPERATIONS) == set(Kernels.__dataclass_fields__) - {"more"}
