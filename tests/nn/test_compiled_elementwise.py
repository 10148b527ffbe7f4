"""The compiled norms, rotations and activations on sizes that test_kernels.py does not have: many rows, odd widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_zoo.compiled.library import obstacle
from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.compiled import elementwise

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "the library serves here")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
WIDTHS = (2, 30, 64, 154)


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, due: Tensor) -> None:
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), due, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count} threads")
def _threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_many_rows(dtype: torch.dtype, width: int) -> None:
    rows = (1 << 15) // width + 100
    x, residual = (noise(rows, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = noise(width, dtype=dtype, seed=3)
    assert_close(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x.float(), weight.float(), 1e-5))
    normed, total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert_close(normed, reference.rms_norm(total.float(), weight.float(), 1e-5))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_that_no_cache_keeps(dtype: torch.dtype) -> None:
    """They go past the caches, more than a megabyte of them."""
    rows, width = 1100, 1024
    x, residual = (noise(rows, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = noise(width, dtype=dtype, seed=3)
    for _ in range(2):
        normed, total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        assert_close(normed, reference.rms_norm(total.float(), weight.float(), 1e-5))
    heads = noise(rows, 25, 64, dtype=dtype)
    query, key = heads[:, :16], heads[:, 16:24]
    cos, sin = noise(rows, 32, dtype=dtype, seed=4), noise(rows, 32, dtype=dtype, seed=5)
    found = elementwise.rotary_embedding(query, key, cos, sin)
    due = reference.rotary_embedding(query.float(), key.float(), cos.float(), sin.float())
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_a_part_of_each_row(dtype: torch.dtype, width: int) -> None:
    """As latent attention norms the first values of a projection."""
    whole, weight = noise(37, width + 13, dtype=dtype), noise(width, dtype=dtype, seed=1)
    x = whole[:, :width]
    assert_close(elementwise.rms_norm(x, weight, 1e-6), reference.rms_norm(x.float(), weight.float(), 1e-6))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_many_rows(dtype: torch.dtype, width: int) -> None:
    x = noise((1 << 15) // width + 100, 2 * width, dtype=dtype) * 20
    assert_close(elementwise.silu_and_mul(x), reference.silu_and_mul(x.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_far_from_zero(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-torch.inf, -1e4, -90.0, -87.5, 0.0, 87.5, 90.0, 1e4, torch.inf, torch.nan]], dtype=dtype)
    found = elementwise.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), -1))
    due = reference.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), -1).float())
    torch.testing.assert_close(found.float(), due, rtol=1e-2, atol=1e-30, equal_nan=True)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotations_of_many_heads(dtype: torch.dtype, head_dim: int) -> None:
    rows = (1 << 15) // (10 * head_dim) + 10
    query, key, _ = noise(rows, 10, head_dim, dtype=dtype).split((6, 2, 2), dim=1)
    angles = torch.outer(torch.arange(rows).float(), 1.0 / 10 ** torch.linspace(0, 3, head_dim // 2))
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    wide = [table.float() for table in tables]
    for found, due in zip(
        elementwise.rotary_embedding(query, key, *tables),
        reference.rotary_embedding(query.float(), key.float(), *wide),
        strict=True,
    ):
        assert_close(found, due)
    due = reference.interleaved_rotary_embedding(query.float(), *wide)
    assert_close(elementwise.interleaved_rotary_embedding(query, *tables), due)


def test_rows_that_are_not_contiguous_are_made_so() -> None:
    x, weight = noise(48, 33, dtype=torch.float32).t(), noise(48, dtype=torch.float32, seed=1)
    assert_close(elementwise.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    heads = noise(16, 4, 5, dtype=torch.float32).permute(2, 1, 0)
    tables = noise(8, 5, dtype=torch.float32).t(), noise(8, 5, dtype=torch.float32, seed=1).t()
    assert_close(
        elementwise.interleaved_rotary_embedding(heads, *tables),
        reference.interleaved_rotary_embedding(heads, *tables),
    )
