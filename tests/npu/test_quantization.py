from __future__ import annotations

import pytest
import torch
import torch_npu

M, K, N = 5, 64, 32


def test_dynamic_quant() -> None:
    x = torch.randn(M, K).half()
    codes, scales = torch_npu.npu_dynamic_quant(x.npu())
    assert codes.dtype is torch.int8
    assert int(codes.cpu().abs().max()) == 127
    torch.testing.assert_close(scales.cpu(), x.float().abs().amax(-1) / 127)
    error = (codes.cpu().float() * scales.cpu()[:, None] - x.float()).abs()
    assert bool((error <= scales.cpu()[:, None] / 2 + 1e-6).all())


def test_quant_matmul_with_a_scale_per_token() -> None:
    a, b = torch.randint(-128, 128, (M, K), dtype=torch.int8), torch.randint(-128, 128, (K, N), dtype=torch.int8)
    scale, tokens = torch.rand(N) / 1000, torch.rand(M) / 10
    found = torch_npu.npu_quant_matmul(
        a.npu(), b.npu(), scale.npu(), pertoken_scale=tokens.npu(), output_dtype=torch.float16
    )
    expected = (a.long() @ b.long()).double() * scale.double() * tokens.double()[:, None]
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-2, rtol=1e-3)


def test_quant_matmul_with_packed_scales_and_an_integer_bias() -> None:
    a, b = torch.randint(-9, 9, (M, K), dtype=torch.int8), torch.randint(-9, 9, (K, N), dtype=torch.int8)
    scale, bias = torch.rand(N) / 100, torch.randint(-50, 50, (N,), dtype=torch.int32)
    packed = torch_npu.npu_trans_quant_param(scale.npu())
    assert packed.dtype is torch.int64
    found = torch_npu.npu_quant_matmul(a.npu(), b.npu(), packed, bias=bias.npu(), output_dtype=torch.float16)
    expected = (a.long() @ b.long() + bias).double() * scale.double()
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-2, rtol=1e-3)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("group", [0, 32])
def test_weights_of_eight_bits(group: int) -> None:
    x, codes = torch.randn(M, K).half(), torch.randint(-128, 128, (K, N), dtype=torch.int8)
    rows = K // group if group else 1
    scale, offset = (torch.rand(rows, N) / 100).half(), torch.randint(-5, 5, (rows, N)).half()
    arguments = (scale, offset) if group else (scale[0], offset[0])
    found = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), codes.npu(), arguments[0].npu(), antiquant_offset=arguments[1].npu(), antiquant_group_size=group
    )
    weight = torch.empty(K, N, dtype=torch.float64)
    for row in range(K):
        source = row // group if group else 0
        weight[row] = (codes[row].double() + offset[source].double()) * scale[source].double()
    torch.testing.assert_close(found.cpu().double(), x.double() @ weight, atol=3e-2, rtol=3e-2)


@pytest.mark.chip("ascend910b")
def test_weights_of_four_bits() -> None:
    x, codes = torch.randn(M, K).half(), torch.randint(-8, 8, (K, N), dtype=torch.int32)
    packed = torch_npu.npu_convert_weight_to_int4pack(codes.npu())
    assert (packed.shape, packed.dtype) == ((K, N // 8), torch.int32)
    scale = (torch.rand(N) / 10).half()
    found = torch_npu.npu_weight_quant_batchmatmul(x.npu(), packed, scale.npu())
    expected = x.double() @ (codes.double() * scale.double())
    torch.testing.assert_close(found.cpu().double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.chip("ascend910b")
def test_grouped_products_of_eight_bits() -> None:
    a, b = torch.randint(-9, 9, (6, K), dtype=torch.int8), torch.randint(-9, 9, (2, K, N), dtype=torch.int8)
    scale, tokens = (torch.rand(2, N) / 100).bfloat16(), torch.rand(6)
    found = torch_npu.npu_grouped_matmul(
        x=[a.npu()], weight=[b.npu()], scale=[scale.npu()], per_token_scale=[tokens.npu()], split_item=3, group_type=0,
        group_list_type=1, group_list=torch.tensor([4, 2]).npu(), output_dtype=torch.bfloat16,
    )[0]  # fmt: skip
    expected = torch.cat([(a[:4].long() @ b[0].long()) * scale[0].double(), (a[4:].long() @ b[1].long()) * scale[1]])
    torch.testing.assert_close(found.cpu().double(), expected.double() * tokens.double()[:, None], atol=2e-2, rtol=2e-2)


@pytest.mark.chip("ascend910b")
def test_batched_product_between_permutations() -> None:
    x, weight = torch.randn(M, 3, 16).half(), torch.randn(3, 16, 128).half()
    found = torch_npu.npu_transpose_batchmatmul(x.npu(), weight.npu(), perm_x1=[1, 0, 2], perm_y=[1, 0, 2])
    expected = torch.stack([x[:, head].double() @ weight[head].double() for head in range(3)], 1)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-2, rtol=2e-2)


def test_quantize_with_given_scales() -> None:
    x, scale = torch.randn(M, N) * 3, torch.rand(N) / 10 + 0.01
    zero = torch.randint(-5, 5, (N,)).float()
    codes = torch_npu.npu_quantize(x.npu(), scale.npu(), zero.npu(), torch.qint8, 1, True)
    expected = ((x / scale).round() + zero).clamp(-128, 127)
    assert int((codes.cpu().int() - expected.int()).abs().max()) == 0


@pytest.mark.chip("ascend310p")
def test_experts_of_eight_bits_on_310p() -> None:
    x, codes = torch.randn(6, K).half(), torch.randint(-127, 128, (2, N, K), dtype=torch.int8)
    scale = torch.rand(2, N) / 100
    torch.npu.config.allow_internal_format = True
    weight = torch_npu.npu_format_cast(codes.npu(), 29)
    found = torch_npu.npu_quant_grouped_matmul_dequant(
        x.npu(), weight, scale.npu(), torch.tensor([2, 6]).npu(), quant_mode="pertoken"
    )
    restored = codes.double() * scale.double()[..., None]
    expected = torch.cat([x[:2].double() @ restored[0].t(), x[2:].double() @ restored[1].t()])
    torch.testing.assert_close(found.cpu().double(), expected, atol=0.3, rtol=3e-2)  # rows are quantised on the way


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_casts_by_their_own_operator(dtype: torch.dtype) -> None:
    x = torch.randn(M, N) * 9
    assert torch.equal(torch_npu._npu_dtype_cast(x.npu(), dtype).cpu(), x.to(dtype))
