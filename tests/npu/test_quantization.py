from __future__ import annotations

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import NoSemantics

M, K, N = 5, 64, 32


def held(scale: torch.Tensor) -> torch.Tensor:
    """Scales rounded towards zero to the ten bits of mantissa that are stored of them."""
    mantissa, exponent = torch.frexp(scale.double())
    return torch.ldexp((mantissa * 2**11).trunc() / 2**11, exponent)


def test_dynamic_quant() -> None:
    x = torch.randn(M, K).half()
    codes, scales = torch_npu.npu_dynamic_quant(x.npu())
    assert codes.dtype is torch.int8
    assert int(codes.cpu().abs().max()) == 127
    torch.testing.assert_close(scales.cpu(), x.float().abs().amax(-1) / 127)
    error = (codes.cpu().float() * scales.cpu()[:, None] - x.float()).abs()
    assert bool((error <= scales.cpu()[:, None] / 2 + 1e-6).all())


def test_dynamic_quant_with_smooth_scales_of_groups() -> None:
    x, smooth = torch.randn(2, 3, K).half(), (torch.rand(2, K) + 0.5).half()
    codes, scales = torch_npu.npu_dynamic_quant(
        x.npu(), smooth_scales=smooth.npu(), group_index=torch.tensor([4, 6], dtype=torch.int32).npu()
    )
    for row in range(6):
        wide = x.view(6, K)[row].double() * smooth[0 if row < 4 else 1].double()
        step = float(wide.abs().max()) / 127
        assert float(scales.view(-1)[row]) == pytest.approx(step, rel=1e-5)
        assert float((codes.view(6, K)[row].cpu() - wide / step).abs().max()) <= 0.51


def test_dynamic_quant_to_four_bits() -> None:
    x = torch.randn(M, K).half()
    x[0] = 0
    packed, scales = torch_npu.npu_dynamic_quant(x.npu(), dst_type=torch.quint4x2)
    assert (packed.dtype, packed.shape) == (torch.int32, (M, K // 8))
    torch.testing.assert_close(scales.cpu(), x.float().abs().amax(-1) / 7)
    for row in range(M):
        for column in range(K):
            nibble = int(packed[row, column // 8]) >> 4 * (column % 8) & 0xF
            code = nibble - 16 if nibble > 7 else nibble
            step = float(scales[row])
            assert abs(code * step - float(x[row, column])) <= step * 0.51


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
    expected = (a.long() @ b.long() + bias).double() * held(scale)
    for given in (packed, scale.npu()):  # torch_npu packs scales that come without scales of tokens
        found = torch_npu.npu_quant_matmul(a.npu(), b.npu(), given, bias=bias.npu(), output_dtype=torch.float16)
        torch.testing.assert_close(found.cpu().double(), expected, atol=1e-6, rtol=2**-11)


def test_packed_scales_lose_their_lower_bits() -> None:
    scale = torch.tensor([0.1, -1.0, 3.14159274, 1 + 2**-10 - 2**-20])
    bits = [int(x) for x in scale.view(torch.int32)]
    cut = torch_npu.npu_trans_quant_param(scale.npu()).cpu()
    assert cut.tolist() == [(b & 0xFFFFE000) | 1 << 46 for b in bits]
    rounded = torch_npu.npu_trans_quant_param(scale.npu(), round_mode=1).cpu() & 0xFFFFFFFF
    values = rounded.to(torch.int32).view(torch.float32)
    assert float(values[3]) == 1 + 2**-10
    assert float(((values - scale) / scale).abs().max()) <= 2**-11
    offset = torch.tensor([-3.0, 1.6, 300.0, -1.4])
    packed = torch_npu.npu_trans_quant_param(scale.npu(), offset.npu()).cpu()
    assert [int(x) >> 37 & 0x1FF for x in packed] == [512 - 3, 2, 255, 512 - 1]
    assert (packed & 0xFFFFFFFF).tolist() == (cut & 0xFFFFFFFF).tolist()


def test_quant_matmul_to_codes() -> None:
    a, b = torch.randint(-9, 9, (M, K), dtype=torch.int8), torch.randint(-9, 9, (K, N), dtype=torch.int8)
    scale, offset = torch.rand(N) / 9, torch.randint(-20, 20, (N,)).float()
    expected = ((a.long() @ b.long()).double() * held(scale) + offset).round().clamp(-128, 127)
    found = torch_npu.npu_quant_matmul(a.npu(), b.npu(), scale.npu(), offset=offset.npu())
    assert found.dtype is torch.int8
    assert torch.equal(found.cpu().double(), expected)
    packed = torch_npu.npu_trans_quant_param(scale.npu(), offset.npu())
    assert torch.equal(torch_npu.npu_quant_matmul(a.npu(), b.npu(), packed).cpu().double(), expected)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quant_matmul_in_bfloat16_with_a_bias(dtype: torch.dtype) -> None:
    a, b = torch.randint(-9, 9, (2, M, K), dtype=torch.int8), torch.randint(-9, 9, (2, K, N), dtype=torch.int8)
    scale, bias = torch.rand(N) / 100, torch.randn(N).to(dtype)
    found = torch_npu.npu_quant_matmul(
        a.npu(), b.npu(), scale.to(dtype).npu(), bias=bias.npu(), output_dtype=torch.bfloat16
    )
    expected = torch.bmm(a.double(), b.double()) * scale.to(dtype).double() + bias.double()
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-2, rtol=2**-8)


@pytest.mark.chip("ascend910b")
def test_quant_matmul_to_sums() -> None:
    a, b = torch.randint(-9, 9, (M, K), dtype=torch.int8), torch.randint(-9, 9, (K, N), dtype=torch.int8)
    bias = torch.randint(-50, 50, (N,), dtype=torch.int32)
    found = torch_npu.npu_quant_matmul(a.npu(), b.npu(), torch.rand(N).npu(), bias=bias.npu(), output_dtype=torch.int32)
    assert torch.equal(found.cpu().long(), a.long() @ b.long() + bias)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("transposed", [False, True])
def test_quant_matmul_of_four_bits(transposed: bool) -> None:
    a, b = (torch.randint(-8, 8, shape, dtype=torch.int32) for shape in ((M, K), (K, N)))
    scale, tokens = torch.rand(N) / 100, torch.rand(M)
    left = torch_npu.npu_convert_weight_to_int4pack(a.npu())
    if transposed:
        right = torch_npu.npu_convert_weight_to_int4pack(b.t().contiguous().npu()).t()
    else:
        right = torch_npu.npu_convert_weight_to_int4pack(b.npu())
    found = torch_npu.npu_quant_matmul(
        left, right, scale.npu(), pertoken_scale=tokens.npu(), output_dtype=torch.bfloat16
    )
    expected = (a.long() @ b.long()).double() * scale.double() * tokens.double()[:, None]
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-3, rtol=2**-8)


@pytest.mark.chip("ascend910b")
def test_four_bits_come_back() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int32).repeat(4, 2)
    packed = torch_npu.npu_convert_weight_to_int4pack(codes.npu()).cpu()
    for row in range(4):
        for column in range(32):
            nibble = int(packed[row, column // 8]) >> 4 * (column % 8) & 0xF
            assert (nibble - 16 if nibble > 7 else nibble) == int(codes[row, column])


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize(("depth", "group"), [(K, 0), (K, 32), (96, 64), (80, 32)])
def test_weights_of_eight_bits(depth: int, group: int) -> None:
    x, codes = torch.randn(M, depth).half(), torch.randint(-128, 128, (depth, N), dtype=torch.int8)
    rows = -(-depth // group) if group else 1
    scale, offset = (torch.rand(rows, N) / 100).half(), torch.randint(-5, 5, (rows, N)).half()
    arguments = (scale, offset) if group else (scale[0], offset[0])
    found = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), codes.npu(), arguments[0].npu(), antiquant_offset=arguments[1].npu(), antiquant_group_size=group
    )
    weight = torch.empty(depth, N, dtype=torch.float64)
    for row in range(depth):
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
    transposed = torch_npu.npu_convert_weight_to_int4pack(codes.t().contiguous().npu()).t()
    found = torch_npu.npu_weight_quant_batchmatmul(x.npu(), transposed, scale.npu())
    torch.testing.assert_close(found.cpu().double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.chip("ascend910b")
def test_weights_of_four_bits_in_groups() -> None:
    x, codes = torch.randn(M, K).bfloat16(), torch.randint(-8, 8, (K, N), dtype=torch.int32)
    scale, offset = (torch.rand(2, N) / 10).bfloat16(), torch.randint(-4, 4, (2, N)).bfloat16()
    bias = torch.randn(N)
    found = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), torch_npu.npu_convert_weight_to_int4pack(codes.npu()), scale.npu(), antiquant_offset=offset.npu(),
        bias=bias.npu(), antiquant_group_size=32,
    )  # fmt: skip
    halves = [(codes[i * 32 : i * 32 + 32].double() + offset[i].double()) * scale[i].double() for i in range(2)]
    expected = x.double() @ torch.cat(halves) + bias.double()
    torch.testing.assert_close(found.cpu().double(), expected, atol=6e-2, rtol=1e-2)


@pytest.mark.chip("ascend910b")
def test_packed_scales_of_weights_have_no_semantics() -> None:
    x, codes = torch.randn(M, K).half(), torch.randint(-128, 128, (N, K), dtype=torch.int8)
    packed = torch_npu.npu_trans_quant_param(torch.rand(N).npu())
    with pytest.raises(NoSemantics, match="antiquant_scale"):
        torch_npu.npu_weight_quant_batchmatmul(x.npu(), codes.npu().t(), packed)


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


def test_older_products() -> None:
    x, weight, bias = torch.randn(M, K).half(), torch.randn(N, K).half(), torch.randn(N).half()
    product = x.double() @ weight.double().t()
    found = torch_npu.npu_linear(x.npu(), weight.npu(), None)
    torch.testing.assert_close(found.cpu().double(), product, atol=2e-2, rtol=2e-3)
    found = torch_npu.npu_linear(x.npu(), weight.npu(), bias.npu())
    torch.testing.assert_close(found.cpu().double(), product + bias.double(), atol=2e-2, rtol=2e-3)
    batch = torch.randn(3, K, N).half()
    found = torch_npu.npu_bmmV2(x.npu(), batch.npu(), [])
    expected = torch.stack([x.double() @ one.double() for one in batch])
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-2, rtol=2e-3)


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


@pytest.mark.chip("ascend910b")
def test_one_expert_with_scales_by_group() -> None:
    x, codes = torch.randn(M, K).half(), torch.randint(-8, 8, (1, K, N), dtype=torch.int32)
    scale, offset = (torch.rand(1, 2, N) / 10).half(), torch.zeros(1, 2, N).half()
    packed = torch_npu.npu_convert_weight_to_int4pack(codes[0].npu())[None]
    found = torch_npu.npu_grouped_matmul(
        x=[x.npu()], weight=[packed], antiquant_scale=[scale.npu()], antiquant_offset=[offset.npu()],
        split_item=3, group_type=0, group_list_type=1, group_list=torch.tensor([M]).npu(),
    )[0]  # fmt: skip
    weight = codes[0].double() * scale[0].double().repeat_interleave(K // 2, 0)
    torch.testing.assert_close(found.cpu().double(), x.double() @ weight, atol=5e-2, rtol=3e-2)
