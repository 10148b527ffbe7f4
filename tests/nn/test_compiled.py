"""The compiled kernels beyond the trials that every kernel has: odd shapes, strides, many rows and threads."""

from __future__ import annotations

import pytest
import torch

from npu_zoo.compiled.library import obstacle
from npu_zoo.nn.kernels.compiled.linear import PanelLinear

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100, 300)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, due: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert (found.float() - due).abs().max() <= 1e-2 * due.abs().max()


@pytest.mark.parametrize(("channels", "inputs"), [(16, 32), (48, 64), (40, 33), (1, 1), (17, 100), (130, 2048)])
def test_products_of_any_shape(channels: int, inputs: int) -> None:
    weight = noise(channels, inputs, seed=1).bfloat16()
    packed = PanelLinear.pack(weight)
    for rows in ROWS:
        x = noise(rows, inputs, seed=rows).bfloat16()
        assert_close(PanelLinear.apply(x, packed), x.float() @ weight.float().T)


def test_inputs_that_stand_apart() -> None:
    """A part of another product's result has rows that are further apart than they are long."""
    weight, wide = noise(32, 64, seed=1).bfloat16(), noise(40, 3 * 64).bfloat16()
    packed = PanelLinear.pack(weight)
    for rows in (1, 5, 40):
        part = wide[:rows, 64:128]
        assert_close(PanelLinear.apply(part, packed), part.float() @ weight.float().T)
    columns = wide[:, :64:1].t().contiguous().t()[:5]
    assert_close(PanelLinear.apply(columns, packed), columns.float() @ weight.float().T)


def test_a_weight_whose_rows_stand_apart_is_packed_as_it_is() -> None:
    wide = noise(32, 100, seed=1).bfloat16()
    x = noise(4, 50).bfloat16()
    for weight in (wide[:, 10:60], noise(50, 32, seed=2).bfloat16().t()):
        assert_close(PanelLinear.apply(x, PanelLinear.pack(weight)), x.float() @ weight.float().T)


def test_leading_dimensions_are_kept() -> None:
    weight = noise(32, 64, seed=1).bfloat16()
    x = noise(2, 3, 64).bfloat16()
    found = PanelLinear.apply(x, PanelLinear.pack(weight))
    assert found.shape == (2, 3, 32)
    assert_close(found, x.float() @ weight.float().T)
    assert PanelLinear.apply(x[:0], PanelLinear.pack(weight)).shape == (0, 3, 32)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_what_is_not_a_number_stays_where_it_is(rows: int) -> None:
    """Padding is zeros, and zero times what lies beyond a row must not become NaN."""
    weight = noise(20, 40, seed=1).bfloat16()
    x = noise(rows, 40).bfloat16()
    x[0, 3] = torch.nan
    found = PanelLinear.apply(x, PanelLinear.pack(weight))
    assert found[0].isnan().all()
    assert not found[1:].isnan().any()


def test_the_number_of_threads_changes_nothing() -> None:
    weight, threads = noise(200, 256, seed=1).bfloat16(), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            packed = PanelLinear.pack(weight)
            found.append([PanelLinear.apply(noise(rows, 256).bfloat16(), packed) for rows in (1, 5, 70)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
