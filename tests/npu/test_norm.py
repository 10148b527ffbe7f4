from __future__ import annotations

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import NoSemantics

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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gemma_rms_norm_counts_from_one(dtype: torch.dtype) -> None:
    x, gamma = torch.randn(4, 64).to(dtype), torch.randn(64).to(dtype)
    y, rstd = torch_npu.npu_gemma_rms_norm(x.npu(), gamma.npu(), 1e-5)
    root = (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    close(y, x.double() / root * (1 + gamma.double()), dtype)
    torch.testing.assert_close(rstd.cpu().double(), 1 / root, atol=1e-4, rtol=1e-4)


def normed_sum(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    total = x1.double() + x2.double()
    return total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gamma.double() + beta.double()


@pytest.mark.parametrize("divides", [True, False])
def test_add_rms_norm_quant(divides: bool) -> None:
    x1, x2, gamma, beta = (torch.randn(*shape).half() for shape in ((4, 64), (4, 64), (64,), (64,)))
    scales = torch.rand(2, 64) / 20 + 0.05
    zero = torch.randint(-9, 9, (64,), dtype=torch.int32)
    given = scales if divides else 1 / scales
    y1, y2, total = torch_npu.npu_add_rms_norm_quant(
        x1.npu(), x2.npu(), gamma.npu(), given[0].npu(), zero.npu(), beta.npu(), given[1].npu(), div_mode=divides
    )
    assert torch.equal(total.cpu(), x1 + x2)
    normed = normed_sum(x1, x2, gamma, beta)
    for found, wanted in ((y1, normed / scales[0] + zero), (y2, normed / scales[1])):
        error = found.cpu().double() - wanted.clamp(-128, 127)
        assert float(error.abs().max()) <= 0.51
        assert int(found.abs().max()) > 20


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("mask", [None, [True, False], [False, True], [True, True]], ids=str)
def test_add_rms_norm_dynamic_quant(mask: list[bool] | None) -> None:
    x1, x2, gamma, beta = (torch.randn(*shape).half() for shape in ((4, 64), (4, 64), (64,), (64,)))
    smooth = [(torch.rand(64) + 0.5).half() for _ in range(2)]
    wanted = mask or [True, True]
    given = [(values if used else None) for values, used in zip(smooth, wanted, strict=True)]
    y1, y2, total, scale1, scale2 = torch_npu.npu_add_rms_norm_dynamic_quant(
        x1.npu(), x2.npu(), gamma.npu(), beta=beta.npu(), output_mask=mask,
        **{f"smooth_scale{i + 1}": None if one is None else one.npu() for i, one in enumerate(given)},
    )  # fmt: skip
    assert torch.equal(total.cpu(), x1 + x2)
    normed = normed_sum(x1, x2, gamma, beta)
    for codes, scale, values, used in zip((y1, y2), (scale1, scale2), smooth, wanted, strict=True):
        if not used:
            assert (codes.shape, scale.shape) == ((), ())
            continue
        expected = normed * values.double()
        torch.testing.assert_close(scale.cpu().double(), expected.abs().amax(-1) / 127, atol=1e-6, rtol=1e-5)
        error = (codes.cpu().double() * scale.cpu().double()[:, None] - expected).abs()
        assert bool((error <= scale.cpu()[:, None] * 0.51).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_older_activations(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 64) * 3).to(dtype)
    wide = x.double()
    close(torch_npu.npu_silu(x.npu()), wide / (1 + (-wide).exp()), dtype)
    fast = wide / (1 + (-1.702 * wide).exp())
    close(torch_npu.fast_gelu(x.npu()), fast, dtype)
    close(torch_npu.npu_fast_gelu(x.npu()), fast, dtype)
    device = x.npu()
    assert torch_npu.npu_silu_(device).data_ptr() == device.data_ptr()
    close(device, wide / (1 + (-wide).exp()), dtype)


ROWS, INNER, GROUPS = 6, 64, [2, 3]


def gated(row: torch.Tensor, mode: int, left: bool) -> torch.Tensor:
    """One row as the formulas of the page have it."""
    if mode == 1:
        gate, up = row[0::2], row[1::2]
    else:
        gate, up = (row[:INNER], row[INNER:]) if left else (row[INNER:], row[:INNER])
    if mode == 0:
        return gate / (1 + (-gate).exp()) * up
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize(("mode", "left"), [(0, True), (0, False), (1, False), (2, True), (2, False)])
def test_sums_are_scaled_back_gated_and_quantised(mode: int, left: bool) -> None:
    sums = torch.randint(-900, 900, (ROWS, 2 * INNER), dtype=torch.int32)
    weight_scale, tokens, smooth = torch.rand(2, 2 * INNER) / 20, torch.rand(ROWS, 1), torch.rand(2, INNER) + 0.5
    codes, scales = torch_npu.npu_dequant_swiglu_quant(
        sums.npu(), weight_scale=weight_scale.npu(), activation_scale=tokens.npu(), quant_scale=smooth.npu(),
        group_index=torch.tensor(GROUPS).npu(), activate_left=left, quant_mode=1, swiglu_mode=mode,
    )  # fmt: skip
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, (ROWS, INNER), (ROWS,))
    for row in range(sum(GROUPS)):
        group = 0 if row < GROUPS[0] else 1
        wide = sums[row].double() * weight_scale[group].double() * tokens[row].double()
        expected = gated(wide, mode, left) * smooth[group].double()
        scale = float(expected.abs().max()) / 127
        assert float(scales[row]) == pytest.approx(scale, rel=1e-4)
        assert float((codes[row].cpu().double() - expected / scale).abs().max()) <= 0.51


@pytest.mark.chip("ascend910b")
def test_a_bias_is_added_to_the_sums_and_floats_are_taken_as_they_are() -> None:
    sums = torch.randint(-900, 900, (ROWS, 2 * INNER), dtype=torch.int32)
    bias = torch.randint(-900, 900, (2 * INNER,), dtype=torch.int32)
    tokens, weight_scale = torch.rand(ROWS, 1) / 100, torch.rand(1, 2 * INNER)
    codes, scales = torch_npu.npu_dequant_swiglu_quant(
        sums.npu(), weight_scale=weight_scale.npu(), activation_scale=tokens.npu(), bias=bias.npu(), quant_mode=1
    )
    wide = (sums + bias).double() * tokens.double() * weight_scale.double()
    expected = torch.stack([gated(row, 0, False) for row in wide])
    error = (codes.cpu() * scales.cpu().double()[:, None] - expected).abs()
    assert bool((error <= scales.cpu()[:, None] * 0.51).all())
    x = torch.randn(ROWS, 2 * INNER).half()
    codes, scales = torch_npu.npu_dequant_swiglu_quant(x.npu(), activate_left=True, quant_mode=1)
    expected = torch.stack([gated(row, 0, True) for row in x.double()])
    error = (codes.cpu() * scales.cpu().double()[:, None] - expected).abs()
    assert bool((error <= scales.cpu()[:, None] * 0.51).all())


@pytest.mark.chip("ascend910b")
def test_quantisation_that_the_documents_disagree_on_is_refused() -> None:
    x = torch.randn(ROWS, 2 * INNER).half().npu()
    with pytest.raises(NoSemantics, match="quant_mode"):
        torch_npu.npu_dequant_swiglu_quant(x, quant_scale=torch.rand(1, INNER).npu(), quant_mode=0)


@pytest.mark.parametrize("inference", [False, True])
def test_fake_tensors_get_shapes(inference: bool) -> None:
    with torch._subclasses.FakeTensorMode(), torch.inference_mode(inference):
        x, gamma = torch.empty(4, 64, dtype=torch.float16, device="npu"), torch.empty(64, device="npu").half()
        y, _ = torch_npu.npu_rms_norm(x, gamma, 1e-5)
        assert (y.shape, torch_npu.npu_swiglu(x).shape) == ((4, 64), (4, 32))
