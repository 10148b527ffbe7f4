"""The compiled kernels beyond the trials that every kernel has: odd shapes, strides, many rows and threads."""

from __future__ import annotations

import pytest
import torch

from npu_zoo.compiled.library import obstacle
from npu_zoo.nn.kernels.compiled.linear import PanelLinear
from npu_zoo.nn.kernels.compiled.memory import Slabs
from npu_zoo.nn.kernels.compiled.quantized import CodePanels, PanelInt4Linear, PanelInt8Linear
from npu_zoo.nn.kernels.compiled.reading import read
from npu_zoo.nn.kernels.quantized import QuantizedWeight

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


@pytest.mark.parametrize(("channels", "inputs"), [(48, 4160), (17, 5000)])
def test_products_larger_than_both_caches(channels: int, inputs: int) -> None:
    """Their sums wait in memory between parts of the inputs, and rows are cut unevenly."""
    weight = noise(channels, inputs, seed=1).bfloat16()
    packed = PanelLinear.pack(weight)
    for rows in (33, 257, 270, 529):
        x = noise(rows, inputs, seed=rows).bfloat16()
        found = PanelLinear.apply(x, packed)
        assert_close(found, x.float() @ weight.float().T)
        assert torch.equal(found[-3:], PanelLinear.apply(x[-3:], packed)), "a row's product depends on other rows"


@pytest.mark.parametrize("channels", [1024, 1040, 1000])
def test_results_that_no_cache_keeps(channels: int) -> None:
    """They go past the caches line by line, where they are lines, and are there for other threads at once."""
    weight = noise(channels, 64, seed=1).bfloat16()
    packed, x = PanelLinear.pack(weight), noise(700, 64).bfloat16()
    due = x.float() @ weight.float().T
    for _ in range(3):
        assert_close(PanelLinear.apply(x, packed), due)


def test_weights_share_slabs_and_leave_each_other_alone() -> None:
    slabs = Slabs()
    taken = [slabs.take(size) for size in (100, 64, 1, 3 << 20, 100 << 20, 5)]
    for number, memory in enumerate(taken):
        assert memory.data_ptr() % 64 == 0
        memory.fill_(number)
    assert [len(memory) for memory in taken] == [100, 64, 1, 3 << 20, 100 << 20, 5]
    assert all(bool((memory == number).all()) for number, memory in enumerate(taken))
    assert taken[1].data_ptr() == taken[0].data_ptr() + 128


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


def quantized(channels: int, inputs: int, group_size: int, bits: int) -> QuantizedWeight:
    generator, half = torch.Generator().manual_seed(7), 1 << (bits - 1)
    codes = torch.randint(-half, half, (channels, inputs), dtype=torch.int8, generator=generator)
    codes[0], codes[-1] = -half, half - 1
    scale = torch.rand(channels, inputs // group_size, generator=generator) / half + 1e-3
    return QuantizedWeight(codes, scale, bits, torch.bfloat16)


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    return weight.codes.float() * weight.scale.repeat_interleave(weight.group_size, 1)


KERNELS_BY_BITS = {8: PanelInt8Linear, 4: PanelInt4Linear}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("channels", "inputs", "group_size"),
    [
        *[(16, 64, 64), (48, 128, 128), (40, 256, 64), (17, 384, 128), (24, 100, 100), (1, 8, 8), (33, 2048, 128)],
        *[(48, 96, 32), (16, 1056, 32), (20, 192, 96), (16, 320, 160)],
    ],
)
def test_products_with_codes_of_any_shape(bits: int, channels: int, inputs: int, group_size: int) -> None:
    weight, kernel = quantized(channels, inputs, group_size, bits), KERNELS_BY_BITS[bits]
    packed, due = kernel.pack(weight), dequantized(weight)
    assert isinstance(packed, CodePanels)
    for rows in ROWS:
        x = noise(rows, inputs, seed=rows).bfloat16()
        assert_close(kernel.apply(x, packed), x.float() @ due.T)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_that_no_block_divides_are_left_to_another_kernel(bits: int) -> None:
    weight, kernel = quantized(64, 96, 48, bits), KERNELS_BY_BITS[bits]
    packed = kernel.pack(weight)
    assert not isinstance(packed, CodePanels)
    x = noise(3, 96).bfloat16()
    assert_close(kernel.apply(x, packed), x.float() @ dequantized(weight).T)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_input_far_above_the_others_does_not_drown_them(bits: int) -> None:
    """Some activations of real models are a thousand times the rest; those beyond their group keep their precision."""
    weight, kernel = quantized(32, 512, 128, bits), KERNELS_BY_BITS[bits]
    due = dequantized(weight)
    for rows in (1, 8):
        x = noise(rows, 512, seed=rows).bfloat16()
        x[:, 5] = 3000.0
        found = kernel.apply(x, kernel.pack(weight)).float()
        error = found - x.float() @ due.T
        # bfloat16 rounds a result by up to 2**-9 of it; what integers of 16 bits add is of the spike's group alone.
        bound = (x.float() @ due.T).abs() * 2**-8 + 3000 / 65278 * 128**0.5 * due.abs().max()
        assert (error.abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_rows_that_are_not_finite_are_told_apart(bits: int, value: float, rows: int) -> None:
    weight, kernel = quantized(20, 128, 64, bits), KERNELS_BY_BITS[bits]
    x = noise(rows, 128).bfloat16()
    x[0, 3] = value
    found = kernel.apply(x, kernel.pack(weight))
    assert not found[0].isfinite().any()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_of_zeros_give_zeros(bits: int) -> None:
    weight, kernel = quantized(20, 128, 64, bits), KERNELS_BY_BITS[bits]
    for rows in (1, 3, 33):
        assert not kernel.apply(torch.zeros(rows, 128, dtype=torch.bfloat16), kernel.pack(weight)).any()


@pytest.mark.parametrize("size", [0, 64, 64 * 37, 1 << 20])
def test_memory_is_read_to_the_end(size: int) -> None:
    memory = torch.arange(size // 4, dtype=torch.int32)
    assert read(memory) == int(memory.sum())
