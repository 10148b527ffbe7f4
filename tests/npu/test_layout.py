from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch_npu

ND, FRACTAL_NZ = 2, 29


@pytest.fixture(autouse=True)
def _internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def test_a_cast_keeps_values_and_pads_storage() -> None:
    x = torch.randn(60, 40).half()
    nz = torch_npu.npu_format_cast(x.npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(nz) == FRACTAL_NZ
    assert torch.equal(nz.cpu(), x)
    assert nz.untyped_storage().nbytes() >= 64 * 48 * 2
    assert torch_npu.get_npu_format(nz.t()) == FRACTAL_NZ
    assert torch_npu.get_npu_format(torch.ops.npu._npu_format_cast(x.npu(), FRACTAL_NZ)) == FRACTAL_NZ
    back = torch_npu.npu_format_cast(nz, ND)
    assert torch_npu.get_npu_format(back) == ND
    assert torch.equal(back.cpu(), x)


def test_products_with_such_weights() -> None:
    x, weight = torch.randn(3, 32).half(), torch.randn(32, 16).half()
    nz = torch_npu.npu_format_cast(weight.npu(), FRACTAL_NZ)
    torch.testing.assert_close((x.npu() @ nz).cpu().double(), x.double() @ weight.double(), atol=2e-2, rtol=2e-2)


def test_a_cast_cannot_be_captured() -> None:
    x = torch.randn(32, 32).half().npu()
    with pytest.raises(RuntimeError, match="captured"), torch.npu.graph(torch.npu.NPUGraph()):
        torch_npu.npu_format_cast(x, FRACTAL_NZ)
    torch.npu.set_stream(torch.npu.default_stream())
