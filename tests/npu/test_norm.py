from __future__ import annotations

import pytest
import torch
import torch_npu

BF16 = "310" not in torch.npu.get_device_name(0)
HALVES = [torch.float16, *([torch.bfloat16] if BF16 else [])]


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(found.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = torch.randn(3, 5, 64).to(dtype), torch.randn(64).to(dtype)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-5)
    root = (x.double().pow(2).sum(-1, keepdim=True) / 64 + 1e-5).sqrt()
    close(y, x.double() / root * gamma.double(), dtype)
    assert (rstd.shape, rstd.dtype) == ((3, 5, 1), torch.float32)
    if BF16:  # the documents call it invalid on 310P
        torch.testing.assert_close(rstd.cpu().double(), 1 / root, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, gamma = torch.randn(4, 64).to(dtype), torch.randn(4, 64).to(dtype), torch.randn(64).to(dtype)
    y, _, total = torch_npu.npu_add_rms_norm(x.npu(), residual.npu(), gamma.npu(), 1e-6)
    assert torch.equal(total.cpu(), x + residual)
    summed = (x + residual).double()
    close(y, summed / (summed.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gamma.double(), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(4, 128).to(dtype)
    gate, up = x.double()[:, :64], x.double()[:, 64:]
    close(torch_npu.npu_swiglu(x.npu()), gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("inference", [False, True])
def test_fake_tensors_get_shapes(inference: bool) -> None:
    with torch._subclasses.FakeTensorMode(), torch.inference_mode(inference):
        x, gamma = torch.empty(4, 64, dtype=torch.float16, device="npu"), torch.empty(64, device="npu").half()
        y, _ = torch_npu.npu_rms_norm(x, gamma, 1e-5)
        assert (y.shape, torch_npu.npu_swiglu(x).shape) == ((4, 64), (4, 32))
