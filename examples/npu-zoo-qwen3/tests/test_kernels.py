"""Each kernel against its reference, and the references against transformers and against float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from npu_zoo.nn.kernels.quantized import QuantizedWeight
from npu_zoo_qwen3 import kernels

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""How far a result may be off, relative to itself and one more."""

Norm = pytest.mark.parametrize("kernel", [kernels.head_rms_norm, kernels.fused_head_rms_norm])
Product = pytest.mark.parametrize("kernel", [kernels.DequantizedRows, kernels.ScaledProduct])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33])
@Norm
def test_norms(kernel: type, rows: int, dtype: torch.dtype) -> None:
    x, weight, eps = kernels.head_norm_inputs(rows, dtype, seed=3)
    before = x.clone()
    found = kernel(x, weight, eps)
    wide = x.double()
    due = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert float(((found.double() - due).abs() / (1 + due.abs())).max()) < DTYPES[dtype]
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_transformers(dtype: torch.dtype) -> None:
    x, weight, eps = kernels.head_norm_inputs(5, dtype, seed=4)
    theirs = Qwen3RMSNorm(128, eps)
    theirs.weight.data = weight
    assert torch.equal(kernels.head_rms_norm(x, weight, eps), theirs(x).detach())


@Norm
def test_a_head_is_normed_by_itself(kernel: type) -> None:
    x = torch.zeros(1, 2, 4)
    x[0, 0], x[0, 1] = torch.tensor([3.0, 4.0, 0.0, 0.0]), 100.0
    found = kernel(x, torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.0)
    assert found[0, 0].tolist() == pytest.approx([3 / 2.5, 2 * 4 / 2.5, 0, 0])
    assert found[0, 1].tolist() == pytest.approx([1, 2, 3, 4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
@Product
def test_products(kernel: type[kernels.DequantizedRows], rows: int, dtype: torch.dtype) -> None:
    x, weight = kernels.linear_inputs(rows, dtype, seed=5)
    due = x.double() @ (weight.codes.double() * weight.scale.double()).t()
    packed = kernel.pack(weight)
    weight.codes.zero_()  # what a kernel is given is overwritten by the next layer
    weight.scale.zero_()
    found = kernel.apply(x, packed)
    assert (found.dtype, found.shape) == (dtype, due.shape)
    assert float((found.double() - due).abs().max()) < 5 * DTYPES[dtype] * float(due.abs().max())
    assert torch.equal(kernel.apply(x[None], packed)[0], found)


def test_half_precision_does_not_overflow_before_the_scale() -> None:
    """The sum of products of codes is 127 * 127 * 64, which float16 does not hold."""
    weight = QuantizedWeight(torch.full((2, 64), 127, dtype=torch.int8), torch.full((2, 1), 1e-4), 8, torch.float16)
    x = torch.full((1, 64), 127.0, dtype=torch.float16)
    packed = kernels.ScaledProduct.pack(weight)
    assert kernels.ScaledProduct.apply(x, packed).tolist() == [pytest.approx([127 * 127 * 64 * 1e-4] * 2, rel=1e-3)]


def test_blocks_make_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = kernels.linear_inputs(3, torch.float32, seed=6)
    packed = kernels.ScaledProduct.pack(weight)
    whole = kernels.ScaledProduct.apply(x, packed)
    monkeypatch.setattr(kernels, "_BLOCK_VALUES", 48 * 7)
    assert torch.allclose(kernels.ScaledProduct.apply(x, packed), whole, atol=1e-6)
