from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import NoSemantics

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


def test_a_tensor_is_cast_in_place() -> None:
    x = torch.randn(60, 40).half()
    device = x.npu()
    view = device[:2]
    assert torch_npu.npu_format_cast_(device, FRACTAL_NZ) is device
    assert torch_npu.get_npu_format(device) == FRACTAL_NZ
    assert torch.equal(device.cpu(), x)
    assert device.untyped_storage().nbytes() >= 64 * 48 * 2
    assert torch_npu.get_npu_format(view) == ND
    assert torch.equal(view.cpu(), x[:2])
    before = device.data_ptr()
    torch_npu.npu_format_cast_(device, FRACTAL_NZ)
    assert device.data_ptr() == before
    torch_npu.npu_format_cast_(device, ND)
    assert torch_npu.get_npu_format(device) == ND
    assert torch.equal(device.cpu(), x)


def test_a_cast_takes_the_format_of_a_tensor() -> None:
    x = torch.randn(32, 48).half()
    like = torch_npu.npu_format_cast(torch.zeros(32, 32).half().npu(), FRACTAL_NZ)
    found = torch_npu.npu_format_cast(x.npu(), like)
    assert torch_npu.get_npu_format(found) == FRACTAL_NZ
    assert torch.equal(found.cpu(), x)


def test_views_and_copies_of_a_cast() -> None:
    x = torch.randn(64, 32).half()
    nz = torch_npu.npu_format_cast(x.npu(), FRACTAL_NZ)
    assert torch.equal(nz.t().cpu(), x.t())
    assert torch.equal(nz[16:48].cpu(), x[16:48])
    assert torch_npu.get_npu_format(nz.t().contiguous()) == ND
    parameter = torch.nn.Parameter(nz, requires_grad=False)
    assert torch_npu.get_npu_format(parameter) == FRACTAL_NZ
    vector = torch_npu.npu_format_cast(x[0].npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(vector) == ND
    assert torch.equal(vector.cpu(), x[0])


@pytest.mark.chip("ascend910b")
def test_a_cast_with_another_block_has_no_semantics() -> None:
    x = torch.randn(32, 32).half().npu()
    for cast in (
        lambda: torch_npu.npu_format_cast(x, FRACTAL_NZ, customize_dtype=torch.int32),
        lambda: torch.ops.npu._npu_format_cast.aclnn(x, FRACTAL_NZ, 3),
    ):
        with pytest.raises(NoSemantics, match="customize_dtype"):
            cast()


def test_products_with_such_weights() -> None:
    x, weight = torch.randn(3, 32).half(), torch.randn(32, 16).half()
    nz = torch_npu.npu_format_cast(weight.npu(), FRACTAL_NZ)
    torch.testing.assert_close((x.npu() @ nz).cpu().double(), x.double() @ weight.double(), atol=2e-2, rtol=2e-2)


def test_a_cast_cannot_be_captured() -> None:
    x = torch.randn(32, 32).half().npu()
    with pytest.raises(RuntimeError, match="captured"), torch.npu.graph(torch.npu.NPUGraph()):
        torch_npu.npu_format_cast(x, FRACTAL_NZ)
    torch.npu.set_stream(torch.npu.default_stream())
