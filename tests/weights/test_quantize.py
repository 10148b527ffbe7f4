"""Codes, scales and words against formulas written out value by value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import UsageError, WeightsError
from npu_zoo.weights.formats.ranked import _packed, _unpacked
from npu_zoo.weights.quantize import (
    Scheme,
    check_width,
    dequantize_blocks,
    dequantize_rows,
    pack_rows,
    quantize_rows,
    unpack_rows,
)

W8, W4 = Scheme.of("w8a16"), Scheme.of("w4a16")


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [W8, W4, Scheme.of("w8a8"), Scheme.of("w4a16", 8)], ids=str)
def test_codes_follow_from_the_scale_as_it_is_stored(scheme: Scheme, dtype: torch.dtype) -> None:
    values = matrix(5, 24).to(dtype)
    codes, scales = quantize_rows(values, scheme, dtype)
    size = scheme.group_size or 24
    most = 127 if scheme.weight_bits == 8 else 7
    for row in range(5):
        for group in range(24 // size):
            part = values[row, group * size : (group + 1) * size].float()
            scale = torch.tensor(float(part.abs().max()) / most).to(dtype)
            assert scales[row, group] == scale
            for place, value in enumerate(part.tolist()):
                due = torch.tensor(value / float(scale)).round().clamp(-most - 1, most)
                assert codes[row, group * size + place] == due


@given(rows=st.integers(1, 6), columns=st.integers(1, 40), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_the_error_is_half_a_step_at_most(rows: int, columns: int, bits: int, seed: int) -> None:
    values = matrix(rows, columns, seed)
    codes, scales = quantize_rows(values, Scheme(bits, 16), torch.float32)
    assert ((dequantize_rows(codes, scales) - values).abs() <= scales * 0.5001).all()


def test_a_channel_of_zeros_harms_only_itself() -> None:
    values = matrix(4, 16)
    alone, alone_scales = quantize_rows(values, W8, torch.bfloat16)
    values[2] = 0
    codes, scales = quantize_rows(values, W8, torch.bfloat16)
    assert scales[2] == 1
    assert not codes[2].any()
    for row in (0, 1, 3):
        assert torch.equal(codes[row], alone[row])
        assert scales[row] == alone_scales[row]


def test_a_scale_that_rounds_to_nothing_leaves_zeros() -> None:
    codes, scales = quantize_rows(torch.full((1, 4), 1e-7), W8, torch.float16)
    assert torch.isfinite(scales).all()
    assert codes.abs().max() <= 127
    assert (dequantize_rows(codes, scales) - 1e-7).abs().max() < 1e-6


def test_rows_do_not_depend_on_their_neighbours() -> None:
    values = matrix(8, 32)
    whole, scales = quantize_rows(values, W4, torch.bfloat16)
    for row in range(8):
        one, scale = quantize_rows(values[row : row + 1], W4, torch.bfloat16)
        assert torch.equal(one[0], whole[row])
        assert scale[0] == scales[row]


@given(rows=st.integers(1, 4), columns=st.integers(1, 35), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_words_hold_any_width(rows: int, columns: int, bits: int, seed: int) -> None:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    packed = pack_rows(codes, bits)
    per_word = 32 // bits
    assert packed.shape == (rows, -(-columns // per_word))
    assert torch.equal(unpack_rows(packed, bits, columns), codes)
    for row in range(rows):
        for column in range(columns):
            word = int(packed[row, column // per_word]) & 0xFFFFFFFF
            assert (word >> (column % per_word * bits)) & (2 * half - 1) == int(codes[row, column]) + half


def test_nibbles_of_the_ranked_layout() -> None:
    codes = torch.tensor([[-8, -1, 0, 7, 1, 2, 3, -4]], dtype=torch.int8)
    packed = _packed(codes)
    assert [(int(packed[0, 0]) >> (4 * place)) & 15 for place in range(8)] == [8, 15, 0, 7, 1, 2, 3, 12]
    assert torch.equal(_unpacked(packed), codes)


def test_blocks_of_float8() -> None:
    values = matrix(5, 7).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 8.0], [3.0, 1.0, 1.0]])
    found = dequantize_blocks(values, scales, (2, 3))
    for row in range(5):
        for column in range(7):
            assert found[row, column] == float(values[row, column]) * float(scales[row // 2, column // 3])


def test_names_of_schemes() -> None:
    assert (W8.name, W4.name, Scheme.of("w8a8").name) == ("w8a16", "w4a16", "w8a8")
    with pytest.raises(UsageError, match="unknown quantization 'w2a2'; known: w8a16, w4a16, w8a8"):
        Scheme.of("w2a2")
    with pytest.raises(UsageError, match="leave --group-size out"):
        Scheme.of("w8a8", 64)
    with pytest.raises(WeightsError, match=r"x\.weight has 100 input values a channel, which groups of 64"):
        check_width("x.weight", 100, Scheme.of("w4a16", 64))
