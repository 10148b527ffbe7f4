from __future__ import annotations

import pytest
import torch
import torch_npu

HEADS, SIZE, BLOCKS, BLOCK = 2, 64, 4, 16
SLOTS = torch.tensor([3, 17, 18, 63, 0], dtype=torch.int32)


def rows(*, seed: int) -> torch.Tensor:
    return torch.randn(len(SLOTS), HEADS, SIZE, generator=torch.Generator().manual_seed(seed)).half()


def element(cache: torch.Tensor, slot: int, head: int, column: int, *, nz: bool) -> float:
    block, offset = divmod(slot, BLOCK)
    if not nz:
        return float(cache[block, offset, head, column])
    channel = head * SIZE + column
    return float(cache[block, channel // 16, offset, channel % 16])


def check(cache: torch.Tensor, written: torch.Tensor, *, nz: bool) -> None:
    host = cache.cpu()
    for token, slot in enumerate(SLOTS.tolist()):
        for head in range(HEADS):
            for column in (0, 15, 16, 63):
                assert element(host, slot, head, column, nz=nz) == float(written[token, head, column])
    assert int((host != 0).sum()) == int((written != 0).sum())  # and nothing else


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("nz", [False, True])
def test_rows_go_to_their_slots(nz: bool) -> None:
    shape = (BLOCKS, HEADS * SIZE // 16, BLOCK, 16) if nz else (BLOCKS, BLOCK, HEADS, SIZE)
    keys, values = torch.zeros(shape).half().npu(), torch.zeros(shape).half().npu()
    key, value = rows(seed=1), rows(seed=2)
    torch_npu.npu_scatter_pa_kv_cache(
        key.npu(), value.npu(), keys, values, SLOTS.npu(), cache_mode="PA_NZ" if nz else "Norm"
    )
    check(keys, key, nz=nz)
    check(values, value, nz=nz)


@pytest.mark.parametrize("nz", [True, pytest.param(False, marks=pytest.mark.chip("ascend910b"))])
def test_the_older_operator_writes_the_same(nz: bool) -> None:
    shape = (BLOCKS, HEADS * SIZE // 16, BLOCK, 16) if nz else (BLOCKS, BLOCK, HEADS, SIZE)
    keys, values = torch.zeros(shape).half().npu(), torch.zeros(shape).half().npu()
    if nz:
        torch.npu.config.allow_internal_format = True
        keys, values = (torch_npu.npu_format_cast(cache, 29) for cache in (keys, values))
    key, value = rows(seed=3), rows(seed=4)
    torch_npu._npu_reshape_and_cache(
        key=key.npu(), value=value.npu(), key_cache=keys, value_cache=values, slot_indices=SLOTS.npu()
    )
    check(keys, key, nz=nz)
    check(values, value, nz=nz)


def latent_parts(kv: torch.Tensor, gamma: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the first 512 columns, and the rest with its pairs turned and brought apart."""
    latent = kv[..., :512].double()
    normed = latent / (latent.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gamma.double()
    turned = torch.complex(kv[..., 512::2].double(), kv[..., 513::2].double()) * torch.exp(1j * angle)
    return normed, torch.cat([turned.real, turned.imag], -1)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("mode", ["PA", "PA_NZ", "Norm"])
def test_latents_and_rotary_keys(mode: str) -> None:
    batch = 3
    kv, gamma = torch.randn(batch, 1, 1, 576).half(), torch.randn(512).half()
    angle = torch.rand(batch, 1, 1, 32).double() * 6
    cos, sin = (f(angle).repeat(1, 1, 1, 2).half() for f in (torch.cos, torch.sin))
    if mode == "Norm":
        caches = [torch.zeros(batch, 1, 8, width).half().npu() for width in (64, 512)]
        index = torch.tensor([[2], [0], [7]])
    else:
        caches = [torch.zeros(BLOCKS, BLOCK, 1, width).half().npu() for width in (64, 512)]
        index = torch.tensor([5, 40, 0])
    torch_npu.npu_kv_rmsnorm_rope_cache(
        kv.npu(), gamma.npu(), cos.npu(), sin.npu(), index.npu(), *caches, epsilon=1e-5, cache_mode=mode
    )
    normed, turned = latent_parts(kv, gamma, angle)
    for cache, expected in zip(caches, (turned, normed), strict=True):
        for token, slot in enumerate(index.flatten().tolist()):
            found = read(cache.cpu(), token, slot, mode)
            torch.testing.assert_close(found.double(), expected[token, 0, 0], atol=1e-2, rtol=1e-2)
        assert int((cache.cpu() != 0).flatten(2).any(-1).sum()) <= max(batch, BLOCKS * BLOCK)


def read(cache: torch.Tensor, token: int, slot: int, mode: str) -> torch.Tensor:
    if mode == "Norm":
        return cache[token, 0, slot]
    block, offset = divmod(slot, BLOCK)
    if mode == "PA":
        return cache[block, offset, 0]
    return cache[block].reshape(-1, BLOCK, 16)[:, offset].flatten()


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("mode", [None, "Norm"])
def test_no_mode_is_rows(mode: str | None) -> None:
    keys, values = (torch.zeros(BLOCKS, BLOCK, HEADS, SIZE).half().npu() for _ in range(2))
    key, value = rows(seed=5), rows(seed=6)
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), keys, values, SLOTS.npu(), cache_mode=mode)
    check(keys, key, nz=False)
    check(values, value, nz=False)


@pytest.mark.chip("ascend910b")
def test_fractals_of_eight_bits_are_twice_as_wide() -> None:
    key = torch.randint(1, 100, (len(SLOTS), HEADS, SIZE), dtype=torch.int8)
    cache = torch.zeros(BLOCKS, HEADS * SIZE // 32, BLOCK, 32, dtype=torch.int8).npu()
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), key.npu(), cache, cache.clone(), SLOTS.npu())
    host = cache.cpu()
    for token, slot in enumerate(SLOTS.tolist()):
        block, offset = divmod(slot, BLOCK)
        for channel in (0, 31, 32, 127):
            assert host[block, channel // 32, offset, channel % 32] == key[token].flatten()[channel]


@pytest.mark.chip("ascend910b")
def test_keys_and_values_of_other_widths() -> None:
    key, value = rows(seed=7), rows(seed=8)[..., :32].contiguous()
    keys, values = (torch.zeros(BLOCKS, BLOCK, HEADS, width).half().npu() for width in (SIZE, 32))
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), keys, values, SLOTS.npu(), cache_mode="Norm")
    check(keys, key, nz=False)
    for token, slot in enumerate(SLOTS.tolist()):
        assert torch.equal(values.cpu().flatten(0, 1)[slot], value[token])


@pytest.mark.chip("ascend910b")
def test_one_cache_alone() -> None:
    key, cache = rows(seed=9), torch.zeros(BLOCKS, BLOCK, HEADS, SIZE).half().npu()
    torch_npu._npu_reshape_and_cache_siso(key=key.npu(), key_cache=cache, slot_indices=SLOTS.npu())
    check(cache, key, nz=False)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("mode", ["PA", "PA_NZ"])
def test_latents_of_padding_are_not_written(mode: str) -> None:
    kv = torch.randn(2, 1, 1, 576).half()
    caches = [torch.zeros(BLOCKS, BLOCK, 1, width).half().npu() for width in (64, 512)]
    turn = [torch.ones(2, 1, 1, 64).half().npu() for _ in range(2)]
    index = torch.tensor([-1, 20]).npu()
    torch_npu.npu_kv_rmsnorm_rope_cache(kv.npu(), torch.ones(512).half().npu(), *turn, index, *caches, cache_mode=mode)
    for cache in caches:
        host = cache.cpu()
        assert read(host, 1, 20, mode).any()
        assert int(host.reshape(BLOCKS, -1).any(-1).sum()) == 1  # one block


@pytest.mark.chip("ascend910b")
def test_latents_beside_their_caches() -> None:
    kv, gamma, angle = torch.randn(2, 1, 3, 576).half(), torch.randn(512).half(), torch.rand(2, 1, 3, 32).double() * 6
    cos, sin = (f(angle).repeat(1, 1, 1, 2).half() for f in (torch.cos, torch.sin))
    caches = [torch.zeros(BLOCKS, BLOCK, 1, width).half().npu() for width in (64, 512)]
    index = torch.tensor([7, 3, 40, 41, 0, 63])
    _, _, keys, latents = torch_npu.npu_kv_rmsnorm_rope_cache(
        kv.npu(), gamma.npu(), cos.npu(), sin.npu(), index.npu(), *caches, cache_mode="PA", is_output_kv=True
    )
    normed, turned = latent_parts(kv, gamma, angle)
    for found, cache, expected in zip((keys, latents), caches, (turned, normed), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected, atol=1e-2, rtol=1e-2)
        assert torch.equal(cache.cpu().flatten(0, 1)[index], found.cpu().reshape(6, 1, -1))


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("mode", ["PA", "PA_NZ"])
def test_latents_of_eight_bits(mode: str) -> None:
    kv, gamma, angle = torch.randn(3, 1, 1, 576).half(), torch.randn(512).half(), torch.rand(3, 1, 1, 32).double() * 6
    cos, sin = (f(angle).repeat(1, 1, 1, 2).half() for f in (torch.cos, torch.sin))
    caches = [torch.zeros(BLOCKS, BLOCK, 1, width, dtype=torch.int8).npu() for width in (64, 512)]
    scales = [torch.rand(width) * 40 + 20 for width in (64, 512)]
    index = torch.tensor([5, 40, 0])
    torch_npu.npu_kv_rmsnorm_rope_cache(
        kv.npu(), gamma.npu(), cos.npu(), sin.npu(), index.npu(), *caches, cache_mode=mode,
        k_rope_scale=scales[0].npu(), c_kv_scale=scales[1].npu(),
    )  # fmt: skip
    normed, _ = latent_parts(kv, gamma, angle)
    expected = (normed * scales[1].double()).round().clamp(-128, 127)
    for token, slot in enumerate(index.tolist()):
        block, offset = divmod(slot, BLOCK)
        host = caches[1].cpu()[block]
        found = host[offset, 0] if mode == "PA" else host.reshape(-1, BLOCK, 32)[:, offset].flatten()
        assert (found.double() - expected[token, 0, 0]).abs().max() <= 1
        assert (found.double() == expected[token, 0, 0]).double().mean() > 0.99


@pytest.mark.parametrize("depth", [1, 2])
def test_updates_are_written_where_their_indices_point(depth: int) -> None:
    cache, updates = torch.zeros(4, 3), torch.arange(1.0, 3 * 3 ** (2 - depth) + 1).view(3, *[3] * (2 - depth))
    places = torch.tensor([[3, 1], [0, 2], [2, 0]], dtype=torch.int32)[:, :depth]
    on_device = cache.npu()
    torch_npu.npu_scatter_nd_update_(on_device, places.npu(), updates.npu())
    for place, update in zip(places.tolist(), updates, strict=True):
        cache[tuple(place)] = update
    assert torch.equal(on_device.cpu(), cache)
